"""A gateway with its own Azure and client, and the checks for each mutant.

One mutant runs at a time, on kept connections, so that the next request on each shows whether it was poisoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.config import load
from gateway.server import Server
from gateway.settings import Listen
from tests.fuzz import readings
from tests.fuzz.azure import Azure
from tests.fuzz.corpus import KEY, request
from tests.fuzz.mutants import Mutant
from tests.fuzz.responses import BadResponse, Response, read_responses

__all__ = ("CONFIGURATION", "Failure", "Lane", "errors")

CONFIGURATION = {
    "gateway.yaml": """
resources: {azure: {endpoint: "${ENDPOINT}"}}
timeouts: {head: 20, client: 20, first_byte: 20, idle: 20}
teams: [full.yaml]
pipeline:
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
""",
    "full.yaml": """
match: {path_prefix: /full}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - resource_ids
  - api_version: {version: 2024-10-21, otherwise: [v1, 2025-04-01-preview]}
  - parameters
  - missing_message
  - missing_fields
  - missing_delta
  - prompt_filter_chunk: merge
  - openai_errors
  - strip_azure_fields
  - model_echo
  - hide_azure_headers
  - sse_newline
""",
}
"""The default team changes no byte of a body; the team below `/full` has every stage that reads responses."""

# Seconds that may pass without a byte on any connection. Only a hang takes as long.
_DEADLINE = 15.0
# Seconds that a client waits for more bytes while the gateway waits for the rest of a mutant.
_QUIET = 0.03

# Errors logged by tasks of this lane; tasks of its server inherit the variable.
errors: contextvars.ContextVar[list[str]] = contextvars.ContextVar("errors")


@dataclass(frozen=True)
class Failure:
    """A violation that a mutant caused."""

    kind: str
    detail: str


class _Client(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, moved: Callable[[], None]) -> None:
        self._moved = moved
        self.received = b""
        self.ended = False
        self.broken = False
        self.came = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment] # of a TCP connection

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._moved()
        self.came.set()

    def eof_received(self) -> None:
        self.ended = True
        self.came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken = not self.ended
        self.ended = True
        self.came.set()

    async def send(self, pieces: list[bytes]) -> None:
        """Write each piece in its own turn of the loop."""
        for piece in pieces:
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            self._moved()
            if len(pieces) > 1:
                await asyncio.sleep(0)
                await asyncio.sleep(0)


class Lane:
    """One gateway under test. `attempt` returns the failures of a mutant."""

    def __init__(self, folder: Path, stage: str = "") -> None:
        """Keep the configuration in a folder; `stage` is the source of a stage that the default team has first."""
        self._folder = folder
        self._stage = stage
        self.azure = Azure(self._moved)
        self._timeout: asyncio.Timeout | None = None
        self.errors: list[str] = []
        self.statuses: dict[tuple[str, int], int] = {}
        """The number of responses by kind of mutant and status."""
        self._main: _Client | None = None
        self._beside: _Client | None = None
        self._number = 0
        self._attempts = 0

    async def start(self) -> None:
        """Start the fake Azure and a gateway in front of it."""
        errors.set(self.errors)
        await self.azure.start()
        for name, text in CONFIGURATION.items():
            (self._folder / name).write_text(text)
        if self._stage:
            (self._folder / "broken.py").write_text(self._stage)
            first = CONFIGURATION["gateway.yaml"].replace("pipeline:\n", "plugins_path: .\npipeline:\n  - broken\n")
            (self._folder / "gateway.yaml").write_text(first)
        loaded = load(self._folder / "gateway.yaml", {"ENDPOINT": self.azure.endpoint})
        self.server = Server(loaded.teams, replace(loaded.settings, listen=Listen("127.0.0.1", 0)))
        await self.server.start()

    async def stop(self) -> None:
        """Stop both."""
        self._hang_up()
        now = asyncio.Event()
        now.set()
        await self.server.stop(now=now)
        await self.azure.stop()

    def _hang_up(self) -> None:
        for client in (self._main, self._beside):
            if client is not None:
                client.transport.abort()
        self._main = self._beside = None

    async def settle(self) -> list[Failure]:
        """Close all connections and return what the gateway has not released."""
        self._hang_up()
        self.azure.hang_up()
        try:
            async with asyncio.timeout(_DEADLINE):
                while self._left():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return [Failure("something is left at the end", self._left())]
        return []

    def _left(self) -> str:
        http = self.server._http
        left = {
            "exchanges": len(self.server._running),
            "connections of clients": len(http.connections) if http is not None else 0,
            "connections to Azure": len(self.azure.connections),
        }
        return ", ".join(f"{count} {name}" for name, count in left.items() if count)

    # -- one mutant ------------------------------------------------------------------------------------

    async def attempt(self, mutant: Mutant) -> list[Failure]:
        """Send a mutant, then canaries on each connection that it used; return the failures."""
        self._attempts += 1
        failures: list[Failure] = []
        try:
            async with asyncio.timeout(_DEADLINE) as self._timeout:
                try:
                    found = self._request(mutant) if mutant.kind == "request" else self._response(mutant)
                    failures += await found
                except BadResponse as exc:
                    failures.append(Failure("the gateway wrote invalid HTTP", str(exc)))
                failures += await self._canary_beside()
        except TimeoutError:
            received = self._main.received if self._main is not None else b""
            failures.append(Failure("a hang", f"nothing more for {_DEADLINE:g} s after {received[-300:]!r}"))
        self._timeout = None
        failures += [Failure("an error in the log", error) for error in self.errors]
        failures += [Failure(fault.partition(":")[0], fault) for fault in self.azure.faults]
        self.errors.clear()
        self.azure.faults.clear()
        if failures:
            self._hang_up()
            self.azure.hang_up()
        return failures

    def _moved(self) -> None:
        """Restart the deadline, as there is progress."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + _DEADLINE)

    def _nonce(self) -> str:
        self._number += 1
        return f"nonce-{self._number}"

    async def _connected(self, client: _Client | None) -> _Client:
        if client is None or client.ended:
            loop = asyncio.get_running_loop()
            _, client = await loop.create_connection(
                lambda: _Client(self._moved), "127.0.0.1", self.server.address.port
            )
        client.received = b""
        client.came.clear()
        return client

    def _canary(self, nonce: str) -> bytes:
        return request(body=b'{"model":"gpt-4o"}', fields=[b"X-Nonce: " + nonce.encode()])

    async def _canary_beside(self) -> list[Failure]:
        """Send a request on another client connection; it probably uses the same connection to Azure."""
        fresh = self._beside is None or self._beside.ended
        self._beside = client = await self._connected(self._beside)
        nonce = self._nonce()
        await client.send([self._canary(nonce)])
        response = await self._next(client, ["POST"], 1)
        return _wrong_canary("on a new connection" if fresh else "on another connection", nonce, response)

    async def _next(self, client: _Client, methods: list[str], count: int) -> Response | None:
        """Wait for `count` complete responses and return the last, or None if the connection ends before."""
        while True:
            responses = read_responses(client.received, methods, ended=client.ended and not client.broken)
            if len(responses) >= count and responses[count - 1].whole:
                if len(responses) > count:
                    raise BadResponse(f"one response too many: {responses[count]}")
                return responses[count - 1]
            if client.ended:
                return None
            client.came.clear()
            await client.came.wait()

    # -- requests --------------------------------------------------------------------------------------

    async def _request(self, mutant: Mutant) -> list[Failure]:
        """Send a mutated request, then a canary on the same connection."""
        nonce = self._nonce()
        pieces = [*mutant.pieces, self._canary(nonce)]
        judged = readings.requests(pieces, asyncio.get_running_loop())
        methods = [message.start[0] for message in judged.messages]
        # If all requests are complete, the canary included, each gets a response, or the connection closes.
        whole = judged.whole and judged.end == "open" and _header(judged.messages[-1], b"x-nonce") == nonce.encode()
        self._main = client = await self._connected(self._main)
        await client.send(pieces)
        while True:
            responses = read_responses(client.received, methods, ended=client.ended and not client.broken)
            if client.ended or (whole and len(responses) == len(methods) and responses[-1].whole):
                break
            client.came.clear()
            if whole:
                await client.came.wait()
                continue
            try:
                await asyncio.wait_for(client.came.wait(), _QUIET)
            except TimeoutError:
                break
        self._main = client if whole and not client.ended else None
        if self._main is None:
            client.transport.abort()
        failures = [failure for response in responses for failure in self._sound(mutant, response)]
        failures += _crossed(judged, responses)
        if whole and len(responses) < len(methods):
            last = responses[-1] if responses else None
            if last is None or not (last.closes or last.status == 101):
                failures.append(Failure("a connection was closed without a response", repr(client.received[-300:])))
        if judged.end in ("open", "closed") and len(responses) > len(methods) + (not whole):
            failures.append(Failure("more responses than requests", f"{len(responses)} to {methods}"))
        return failures

    def _sound(self, mutant: Mutant, response: Response) -> Iterator[Failure]:
        """Yield the failures of a response by itself."""
        key = (mutant.kind, response.status)
        self.statuses[key] = self.statuses.get(key, 0) + 1
        if KEY.encode() in response.body or KEY.encode() in b"".join(response.fields.values()):
            yield Failure("a key in a response", repr(response))
        if b'"the gateway failed' in response.body:
            yield Failure("a failure of the gateway's own", repr(response.body[:300]))
        if response.status >= 500 and mutant.kind == "request":
            yield Failure(f"a {response.status} for a mutated request", repr(response.body[:300]))

    # -- responses -------------------------------------------------------------------------------------

    async def _response(self, mutant: Mutant) -> list[Failure]:
        """Request a mutated response, then a valid one on the same connection."""
        asked, plain = _asked(mutant)
        loop = asyncio.get_running_loop()
        pieces = [*mutant.pieces, mutant.late]
        judged = readings.response(pieces, loop, eof=mutant.ending == "close")
        if mutant.ending == "keep" and not (judged.whole and readings.our_response(pieces, eof=False).whole):
            # A parser waits here for bytes that never arrive.
            mutant = replace(mutant, ending="close")
            judged = readings.response(pieces, loop, eof=True)
        name = f"m{self._attempts}"
        self.azure.mutants = {name: mutant}
        self.azure.played.clear()
        self._main = client = await self._connected(self._main)
        old = b" HTTP/1.0\r\n" in asked
        await client.send([asked.replace(b"\r\n", b"\r\nX-Mutant: %b\r\n" % name.encode(), 1)])
        response = await self._next(client, ["GET"], 1)
        if response is None:
            responses = read_responses(client.received, ["GET"], ended=False)
            response = responses[0] if responses else None
        if mutant.late:
            # Late bytes must arrive before the next request, or they look like its response.
            await self.azure.played.wait()
        failures = self._compared(judged, response, plain=plain) if response is not None else []
        if response is None and not old:
            failures.append(Failure("a connection was closed without a response", "to a valid request"))
        if response is not None and response.whole and not client.ended and not response.closes and not old:
            nonce = self._nonce()
            client.received = b""
            await client.send([self._canary(nonce)])
            failures += _wrong_canary("on the same connection", nonce, await self._next(client, ["POST"], 1))
        else:
            self._main = None
            client.transport.abort()
        return failures

    def _compared(self, judged: readings.Reading, response: Response, *, plain: bool) -> list[Failure]:
        mutant = Mutant("response", b"")
        failures = list(self._sound(mutant, response))
        if response.status in (502, 503, 504) and _code(response):
            return failures  # the gateway refused Azure's response
        message = judged.messages[0] if judged.messages else None
        if message is None or message.start != (str(response.status),):
            if judged.end != "refused":
                failures.append(Failure("another status than Azure's", f"{response.status} for {message}"))
            return failures
        if 300 <= response.status < 400 and response.status != 304:
            failures.append(Failure("a redirect of Azure's reached a client", str(response.status)))
        if response.status == 205 and not response.body:
            return failures  # a 205 has no content (RFC 9110, 15.3.6), whatever Azure sends
        if (
            response.whole
            and message.end is None
            and judged.end != "refused"
            and b'"error"' not in response.body[-2000:]
        ):
            failures.append(Failure("a response that broke off was passed on as complete", repr(response.body[-200:])))
        if plain and response.whole and message.end is not None and not _same(response, message):
            failures.append(
                Failure("another body than Azure's", f"{response.body[-200:]!r} for {message.body[-200:]!r}")
            )
        return failures


def _asked(mutant: Mutant) -> tuple[bytes, bool]:
    """Return a valid request for a mutated response, and whether its team leaves the body unchanged."""
    chosen = mutant.asked % 8
    plain = chosen % 2 == 0
    prefix = "" if plain else "/full"
    body = json.dumps({"model": "gpt-4o", "stream": chosen in (2, 3), "messages": []}).encode()
    version = b"1.0" if mutant.asked % 64 >= 56 else b"1.1"
    if chosen in (4, 5):
        return request(prefix + "/v1/files", method="GET", version=version), plain
    if chosen == 6:
        return request(prefix + "/v1/chat/completions", body, chunks=[9]), plain
    return request(prefix + "/v1/chat/completions", body, version=version), plain


def _same(response: Response, message: readings.Message) -> bool:
    """Whether a response has Azure's body; the gateway may decompress it."""
    if response.body == message.body:
        return True
    coding = _header(message, b"content-encoding").lower()
    if coding not in (b"gzip", b"x-gzip", b"deflate") or b"content-encoding" in response.fields:
        return False
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(message.body) == response.body
    return False


def _header(message: readings.Message, name: bytes) -> bytes:
    return next((value for each, value in reversed(message.fields) if each == name), b"")


def _code(response: Response) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        error: Any = json.loads(response.body)["error"]
        return str(error.get("code") or error.get("type") or "")
    return ""


_NONCE = re.compile(rb'"nonce": ?"([^"\\]*)"')
_READ = re.compile(rb'"read": ?\["([A-Z]+)", ?"([a-z]*)", ?([0-9]+), ?([0-9]+)\]')
# Operations whose body goes to Azure unchanged; the last one only if its model is a deployment's name.
_UNCHANGED = ("/v1/chat/completions", "/v1/embeddings", "/v1/files", "/v1/audio/transcriptions")
_FORM = "/v1/audio/transcriptions"


def _crossed(judged: readings.Reading, responses: list[Response]) -> Iterator[Failure]:
    """Yield a failure for each response to another request, or to a body that was not sent."""
    for message, response in zip(judged.messages, responses, strict=False):
        nonce, read = _NONCE.search(response.body), _READ.search(response.body)
        given = [value for name, value in message.fields if name == b"x-nonce"]
        if nonce is not None and nonce.group(1) and nonce.group(1) not in given:
            yield Failure("a response to another request", f"{nonce.group(1)!r} to {message.start}")
        elif read is not None and response.whole and _unchanged(message):
            size, check = int(read.group(3)), int(read.group(4))
            if message.end is None and judged.end == "refused":
                continue  # our parser accepted a body that the judge refuses
            if message.end is None:
                yield Failure("an unfinished request got a response", f"{size} bytes of {message.start}")
            elif (size, check) != (len(message.body), zlib.crc32(message.body)):
                yield Failure("Azure got another body than the client sent", f"{size} of {len(message.body)} bytes")


def _unchanged(message: readings.Message) -> bool:
    path = message.start[1].partition("?")[0]
    return path in _UNCHANGED and (path != _FORM or message.body.count(b'name="model"\r\n\r\nwhisper\r\n') == 1)


def _wrong_canary(where: str, nonce: str, response: Response | None) -> list[Failure]:
    kind = f"a canary {where} got no response of its own"
    if response is None:
        return [Failure(kind, "the connection was closed")]
    found = _NONCE.search(response.body)
    if response.status != 200 or found is None or found.group(1).decode() != nonce:
        return [Failure(kind, f"{response.status} {response.body[:300]!r}")]
    return []
