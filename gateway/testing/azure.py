"""A fake Azure server: it responds like Azure, and records its requests."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web

from gateway.azure.resources import Resource
from gateway.protocol.headers import Headers
from gateway.testing import surface

__all__ = (
    "FakeAzure",
    "Seen",
)

_PATH = re.compile(r"/openai/(?:(v1)/|deployments/([^/]+)/)?(.+)")
_FORM_MODEL = re.compile(rb'name="model"(?:\r\n[^\r\n]+)*\r\n\r\n([^\r\n]*)\r\n')
_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(-preview)?")
_SAFE = {kind: {"filtered": False, "severity": "safe"} for kind in ("hate", "self_harm", "sexual", "violence")}
_CREATED = 1_769_122_116


@dataclass
class Seen:
    """One request that the fake Azure received. `left` means that its client disconnected before the response ended."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: Headers
    body: bytes
    left: bool = False

    def json(self) -> Any:
        """Return the body as JSON."""
        return msgspec.json.decode(self.body)


@dataclass
class FakeAzure:
    r"""A server on loopback that responds like Azure: completions and embeddings in full, the rest in outline.

    It checks the key, the api-version and whether that has the operation. It knows its deployments (an unknown one is a
    404 without a content type, as recorded in 2026). It streams `words`, one chunk each, `delay` seconds apart, after
    Azure's first chunk without choices. Ids of created objects begin with `tag`; with `own_ids`, only ids that it
    created exist. `ending` is the end of a stream: Azure has sent `[DONE]\n\n`, `[DONE]\n` and `[DONE]`. With
    `asynchronous_filter`, chats have chunks of filter results without a delta. A WebSocket responds to each
    `response.create`. `respond` and `speak` replace its HTTP responses and its WebSocket messages.

        async with FakeAzure(ending=b"data: [DONE]") as azure:
            ...  # azure.endpoint, azure.requests
    """

    api_key: str = "azure-key"
    deployments: Sequence[str] = ("gpt-4o", "gpt-35-turbo", "text-embedding-3-small")
    words: Sequence[str] = ("Hello", " there", "!")
    delay: float = 0.0
    ending: bytes = b"data: [DONE]\n\n"
    newline: bytes = b"\n"
    asynchronous_filter: bool = False
    content_type: str = "text/event-stream; charset=utf-8"
    base_path: str = ""
    port: int = 0
    tag: str = "fake"
    own_ids: bool = False
    ids: set[str] = field(default_factory=set)
    _created: int = 0
    respond: Callable[[Seen, web.BaseRequest], Awaitable[web.StreamResponse | None]] | None = None
    speak: Callable[[Seen, web.WebSocketResponse], Awaitable[None]] | None = None
    requests: list[Seen] = field(default_factory=list)
    streaming: int = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen on a port of loopback."""
        self._server = web.Server(self._handle, handler_cancellation=True)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._server, "127.0.0.1", self.port, backlog=2048)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        self._listener.close()
        await self._server.shutdown(timeout=0.1)

    @property
    def endpoint(self) -> str:
        """The URL of the resource."""
        return f"http://127.0.0.1:{self.port}{self.base_path}"

    @property
    def resource(self) -> Resource:
        """The resource, for the target of a pipeline."""
        return Resource("azure", self.endpoint)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._server.connections)

    @property
    def text(self) -> str:
        """The text of every response."""
        return "".join(self.words)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        seen = Seen(
            request.method,
            request.raw_path.partition("?")[0],
            parse_qsl(request.raw_path.partition("?")[2], keep_blank_values=True),
            Headers(request.raw_headers),
            b"",
        )
        self.requests.append(seen)
        try:
            seen.body = await request.content.read()
            response = await self.respond(seen, request) if self.respond is not None else None
            return response if response is not None else await self._respond(seen, request)
        except (asyncio.CancelledError, ConnectionError):
            seen.left = True
            raise

    async def _respond(self, seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        versions = [value for name, value in seen.query if name == "api-version"]
        found = _PATH.fullmatch(seen.path.removeprefix(self.base_path))
        v1, deployment, operation = found.groups() if found else (None, None, "")
        if (seen.headers.get("upgrade") or "").lower() == "websocket" and not v1:
            versions = [version for version in versions if surface.on_socket(operation, version)]
        # Azure has one error for a wrong path and for a missing or unknown version.
        if not self._has(v1, deployment, operation, versions):
            return _json({"error": {"code": "404", "message": "Resource not found"}}, 404)
        if not self._authorized(seen.headers, bool(v1)):
            message = (
                "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid "
                "key for an active subscription and use a correct regional API endpoint for your resource."
            )
            return _json({"error": {"code": "401", "message": message}}, 401)
        form = _FORM_MODEL.search(seen.body)
        body: Any = {"model": form.group(1).decode()} if form is not None else {}
        if seen.body and (
            seen.body[:1] == b"{" or (seen.headers.get("content-type") or "").startswith("application/json")
        ):
            try:
                body = seen.json()
            except ValueError:
                return _json({"error": {"code": "BadRequest", "message": "invalid JSON"}}, 400)
        if deployment is not None and operation.startswith("images/") and "model" in body:
            return _json({"error": {"code": "BadRequest", "message": "model is not allowed here"}}, 400)
        if (seen.headers.get("upgrade") or "").lower() == "websocket":
            return await self._open(seen, request, operation)
        if deployment is None and surface.needs_deployment(seen.method, operation):
            deployment = body.get("model", "")
        if deployment is not None and deployment not in self.deployments:
            message = (
                "The API deployment for this resource does not exist. If you created the deployment within the last "
                "5 minutes, please wait a moment and try again."
            )
            error = {"type": "invalid_request_error", "code": "DeploymentNotFound", "message": message}
            return _json({"error": error}, 404, content_type="")
        if seen.method == "POST" and operation == "embeddings":
            return _json(_embeddings(body))
        if seen.method == "POST" and operation in ("chat/completions", "completions"):
            if body.get("stream"):
                return await self._stream(request, body, chat=operation != "completions")
            return _json(_completion(self.text, chat=operation != "completions"))
        return await self._outline(seen, request, operation, body)

    async def _open(self, seen: Seen, request: web.BaseRequest, operation: str) -> web.StreamResponse:
        """Respond to a WebSocket's handshake and its messages."""
        named = [value for name, value in seen.query if name in ("model", "deployment")]
        if operation == "realtime" and any(name not in self.deployments for name in named):
            return _json({"error": {"code": "DeploymentNotFound", "message": "No such deployment"}}, 404)
        socket = web.WebSocketResponse(protocols=("realtime",), autoping=False, max_msg_size=0)
        await socket.prepare(request)
        self.streaming += 1
        try:
            await (self.speak or self._speak)(seen, socket)
        finally:
            self.streaming -= 1
        return socket

    async def _speak(self, seen: Seen, socket: web.WebSocketResponse) -> None:
        """Respond to each `response.create` like the Realtime and the Responses API."""
        named = [value for name, value in seen.query if name in ("model", "deployment")]
        if named:
            await socket.send_json({"type": "session.created", "session": {"id": "sess_1", "model": named[0]}})
        async for message in socket:
            if message.type is web.WSMsgType.PING:
                await socket.pong(message.data)
            if message.type is not web.WSMsgType.TEXT:
                continue
            event = message.json()
            if not isinstance(event, dict) or event.get("type") != "response.create":
                await socket.send_json({"type": "echo", "event": event})
                continue
            model = event.get("model") or (named[0] if named else "")
            if model not in self.deployments:
                error = {"type": "invalid_request_error", "code": "DeploymentNotFound", "message": f"no {model!r}"}
                await socket.send_json({"type": "error", "status": 404, "error": error})
                continue
            self._created += 1
            response = {"id": f"resp_{self.tag}{self._created:08d}", "object": "response", "model": model}
            await socket.send_json({"type": "response.created", "response": {**response, "status": "in_progress"}})
            for word in self.words:
                await socket.send_json({"type": "response.output_text.delta", "delta": word})
            done = "response.done" if named else "response.completed"
            usage = {"input_tokens": 9, "output_tokens": len(self.words), "total_tokens": 9 + len(self.words)}
            await socket.send_json({"type": done, "response": {**response, "status": "completed", "usage": usage}})

    def _has(self, v1: str | None, deployment: str | None, operation: str, versions: list[str]) -> bool:
        if v1:
            return surface.on_v1(operation) and (not versions or versions in (["v1"], ["preview"]))
        if len(versions) != 1 or not _VERSION.fullmatch(versions[0]):
            return False
        if deployment is not None:
            return surface.on_deployment(operation, versions[0])
        return surface.on_resource(operation, versions[0])

    async def _outline(
        self, seen: Seen, request: web.BaseRequest, operation: str, body: dict[str, Any]
    ) -> web.StreamResponse:
        """Respond to operations that create, read and delete objects by id."""
        unknown = surface.ids_of(operation) - self.ids
        if self.own_ids and unknown:
            return _json({"error": {"code": "NotFound", "message": f"No such object: {min(unknown)}"}}, 404)
        if seen.method != "DELETE" and surface.BINARY.fullmatch(operation):
            response = web.Response(body=b"\x00\x01binary", headers={**_LIMITS})
            response.content_type = "application/octet-stream"
            return response
        self._created += 1
        content, created = surface.content_of(seen.method, operation, f"{self.tag}{self._created:08d}")
        if seen.method == "DELETE":
            self.ids.discard(content["id"])
        if created:
            self.ids.add(content["id"])
            for name in ("model", "input_file_id", "previous_response_id"):
                if name in body:
                    content[name] = body[name]
        if body.get("stream") and operation == "responses":
            return await self._events(
                request,
                {"type": "response.created", "response": content},
                {"type": "response.completed", "response": content},
            )
        return _json(content)

    async def _events(self, request: web.BaseRequest, *events: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": self.content_type, **_LIMITS})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for event in events:
            await response.write(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event)))
        await response.write_eof()
        return response

    def _authorized(self, headers: Headers, v1: bool) -> bool:
        key, bearer = headers.get("api-key"), headers.get("authorization", "") or ""
        token = bearer.removeprefix("Bearer ")
        return key == self.api_key or token.startswith("eyJ") or (v1 and token == self.api_key)

    async def _stream(self, request: web.BaseRequest, body: Any, *, chat: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": self.content_type, "x-ms-region": "Fake", **_LIMITS})
        response.enable_chunked_encoding()
        self.streaming += 1
        try:
            await response.prepare(request)
            for chunk in _chunks(self.words, body, chat=chat, results=chat and self.asynchronous_filter):
                data = b"data: " + msgspec.json.encode(chunk) + self.newline * 2
                await response.write(data)
                if self.delay:
                    await asyncio.sleep(self.delay)
            if self.ending:
                await response.write(self.ending.replace(b"\n", self.newline))
            await response.write_eof()
        finally:
            self.streaming -= 1
        return response


_LIMITS = {
    "x-ratelimit-limit-requests": "120",
    "x-ratelimit-remaining-requests": "119",
    "x-ratelimit-reset-requests": "500",
    "x-request-id": "cb65b8a6-2302-4e91-9a26-0b44ecfdd5e0",
}


def _json(content: object, status: int = 200, content_type: str = "application/json") -> web.Response:
    response = web.Response(status=status, body=msgspec.json.encode(content), headers={**_LIMITS})
    if content_type:
        response.headers["content-type"] = content_type
    else:
        response.headers.popall("content-type", None)
        response.headers["content-type"] = ""
    return response


def _completion(text: str, *, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "content_filter_results": _SAFE, "logprobs": None}
    if chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    return {
        "choices": [choice],
        "created": _CREATED,
        "id": "chatcmpl-fake",
        "model": "gpt-4o-2024-11-20",
        "object": "chat.completion" if chat else "text_completion",
        "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}],
        "usage": _USAGE,
    }


_USAGE = {"completion_tokens": 3, "prompt_tokens": 9, "total_tokens": 12}


def _chunks(words: Sequence[str], body: Any, *, chat: bool, results: bool) -> Iterator[dict[str, Any]]:
    """Yield a stream's chunks like Azure: keys in order, an empty first chunk, usage if requested."""
    filter_results: dict[str, Any] = {
        "choices": [
            {
                "content_filter_offsets": {"check_offset": 44, "start_offset": 44, "end_offset": 198},
                "content_filter_results": _SAFE,
                "finish_reason": None,
                "index": 0,
            }
        ],
        "created": 0,
        "id": "",
        "model": "",
        "object": "",
    }
    yield {
        "choices": [],
        "created": 0,
        "id": "",
        "model": "",
        "object": "",
        "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}],
    }

    with_usage = bool((body.get("stream_options") or {}).get("include_usage"))

    def chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        return {
            "choices": choices,
            "created": _CREATED,
            "id": "chatcmpl-fake",
            "model": "gpt-4o-2024-11-20",
            "object": "chat.completion.chunk" if chat else "text_completion",
            **({"usage": usage} if with_usage else {}),
        }

    def choice(content: str | None, finish: str | None) -> dict[str, Any]:
        result: dict[str, Any] = {"content_filter_results": _SAFE, "finish_reason": finish, "index": 0}
        if chat:
            result["delta"] = {} if content is None else {"content": content}
        else:
            result["text"] = content or ""
        return result

    first = choice("", None)
    if chat:
        first["delta"]["role"] = "assistant"
    yield chunk([first])
    for word in words:
        yield chunk([choice(word, None)])
        if results:
            yield filter_results
    yield chunk([choice(None, "stop")])
    if results:
        yield filter_results
    if with_usage:
        yield chunk([], _USAGE)


def _embeddings(body: Any) -> dict[str, Any]:
    value = body.get("input", "")
    texts = value if isinstance(value, list) else [value]
    vector = [0.25, -0.5, 0.125]
    embedding: object = vector
    if body.get("encoding_format") == "base64":
        embedding = base64.b64encode(struct.pack("<3f", *vector)).decode()
    data = [{"embedding": embedding, "index": index, "object": "embedding"} for index, _ in enumerate(texts)]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return {"data": data, "model": "text-embedding-3-small", "object": "list", "usage": usage}
