"""The fake Azure of `make soak`, in its own process: `python -m tests.soak.azure`. Prints its port.

A request chooses its response in `x-do`; every response and event repeats its `x-nonce`.
SIGUSR1 closes every connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys

from aiohttp import web

__all__ = ("LARGE", "event")

LARGE = 400
"""Number of events in a large stream, of some 4 KB each."""

_JSON = {"content-type": "application/json"}
_SSE = {"content-type": "text/event-stream"}


def event(nonce: str, number: int, filling: str = "") -> bytes:
    """Return one event of a stream."""
    choice = {"index": 0, "delta": {"content": f"{nonce} {number} {filling}"}, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


async def _answer(request: web.BaseRequest) -> web.StreamResponse:
    nonce, wish = request.headers.get("x-nonce", ""), request.headers.get("x-do", "json")
    if request.headers.get("upgrade", "").lower() == "websocket":
        return await _speak(request)
    transport = request.transport
    if wish == "early":  # before the body has arrived
        return web.Response(status=413, headers=_JSON, text=json.dumps({"error": {"message": nonce, "code": "413"}}))
    digest, size = hashlib.sha256(), 0
    async for piece in request.content.iter_chunked(65536):
        digest.update(piece)
        size += len(piece)
    if wish.startswith("status "):
        status = int(wish[7:])
        error = {"error": {"code": str(status), "message": f"{nonce}: no"}}
        more = {"retry-after": "1"} if status in (429, 503) else {}
        return web.Response(status=status, headers={**_JSON, **more}, text=json.dumps(error))
    if wish.startswith("stream "):
        return await _stream(request, nonce, wish)
    if wish in ("garbage", "half", "close", "late"):
        assert transport is not None
        raw = {
            "garbage": b"\x15\x03\x01\x00\x02\x02F",
            "half": b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id":',
            "close": b"",
            "late": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
        }[wish]
        transport.write(raw)
        transport.close()
        return web.Response()
    message = {"role": "assistant", "content": nonce}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
        "nonce": nonce,
        "size": size,
        "sha256": digest.hexdigest(),
    }
    return web.Response(headers=_JSON, body=json.dumps(answer).encode())


async def _stream(request: web.BaseRequest, nonce: str, wish: str) -> web.StreamResponse:
    """Stream as `stream COUNT SECONDS ENDING` requests."""
    _, count, seconds, ending = wish.split()
    filling = "x" * 4000 if int(count) >= LARGE else ""
    response = web.StreamResponse(headers=_SSE)
    await response.prepare(request)
    for number in range(int(count)):
        await response.write(event(nonce, number, filling))
        if float(seconds):
            await asyncio.sleep(float(seconds))
    if ending == "break" and request.transport is not None:
        request.transport.close()
        return response
    await response.write(b"data: [DONE]\n\n")
    return response


async def _speak(request: web.BaseRequest) -> web.StreamResponse:
    """Echo the messages of a WebSocket."""
    socket = web.WebSocketResponse(max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        if message.type is web.WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is web.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


async def _main() -> None:
    server = web.Server(_answer, handler_cancellation=True, access_log=None)

    def hang_up() -> None:
        for connection in list(server.connections):
            connection.force_close()

    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, hang_up)
    loop.add_signal_handler(signal.SIGTERM, over.set)
    listener = await loop.create_server(server, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{listener.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await over.wait()
    listener.close()
    await server.shutdown(timeout=0.1)


if __name__ == "__main__":
    asyncio.run(_main())
