"""A gateway with an Azure and a client of its own, and what must hold of every mutant that goes through it.

One mutant at a time, on connections that are kept: so the next request on each shows whether one was poisoned.
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
from tests.fuzz.answers import Answer, BadAnswer, read_answers
from tests.fuzz.azure import Azure
from tests.fuzz.corpus import KEY, request
from tests.fuzz.mutants import Mutant

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
"""The default team changes no byte of a body; the team below `/full` has every stage that reads answers."""

# How many seconds may pass without a byte from or to anybody. It is no measure: only what hangs takes as long.
_DEADLINE = 15.0
# How long, in seconds, a client waits for more from a gateway that waits for the rest of a mutant.
_QUIET = 0.03

# What was logged as an error by tasks of this lane; those of a server inherit it.
errors: contextvars.ContextVar[list[str]] = contextvars.ContextVar("errors")


@dataclass(frozen=True)
class Failure:
    """What a mutant did that none may do."""

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
        """Write each piece in a turn of the loop of its own."""
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
        """Keep the configuration in a folder; `stage` is the source of one that the default team has first."""
        self._folder = folder
        self._stage = stage
        self.azure = Azure(self._moved)
        self._timeout: asyncio.Timeout | None = None
        self.errors: list[str] = []
        self.statuses: dict[tuple[str, int], int] = {}
        """How many answers there were of each status, by the kind of mutant."""
        self._main: _Client | None = None
        self._beside: _Client | None = None
        self._number = 0
        self._attempts = 0

    async def start(self) -> None:
        """Start the fake Azure, and a gateway in front of it."""
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
        """Stop all of it."""
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
        """Close all connections, and return what the gateway has not let go of."""
        self._hang_up()
        self.azure.hang_up()
        try:
            async with asyncio.timeout(_DEADLINE):
                while self._left():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            return [Failure("something is left when all is over", self._left())]
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
        """Send a mutant, then canaries on every connection that it touched; return what went wrong."""
        self._attempts += 1
        failures: list[Failure] = []
        try:
            async with asyncio.timeout(_DEADLINE) as self._timeout:
                try:
                    found = self._request(mutant) if mutant.kind == "request" else self._answer(mutant)
                    failures += await found
                except BadAnswer as exc:
                    failures.append(Failure("the gateway wrote what is no HTTP", str(exc)))
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
        """Begin the deadline again: there is progress."""
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
        """Send a request on another connection of a client: it is likely to get the connection to Azure just used."""
        fresh = self._beside is None or self._beside.ended
        self._beside = client = await self._connected(self._beside)
        nonce = self._nonce()
        await client.send([self._canary(nonce)])
        answer = await self._next(client, ["POST"], 1)
        return _wrong_canary("on a new connection" if fresh else "on another connection", nonce, answer)

    async def _next(self, client: _Client, methods: list[str], count: int) -> Answer | None:
        """Wait for so many whole answers and return the last, or None where the connection ends before."""
        while True:
            answers = read_answers(client.received, methods, ended=client.ended and not client.broken)
            if len(answers) >= count and answers[count - 1].whole:
                if len(answers) > count:
                    raise BadAnswer(f"an answer too many: {answers[count]}")
                return answers[count - 1]
            if client.ended:
                return None
            client.came.clear()
            await client.came.wait()

    # -- requests --------------------------------------------------------------------------------------

    async def _request(self, mutant: Mutant) -> list[Failure]:
        """Send a mutated request, and behind it a canary on the same connection."""
        nonce = self._nonce()
        pieces = [*mutant.pieces, self._canary(nonce)]
        judged = readings.requests(pieces, asyncio.get_running_loop())
        methods = [message.start[0] for message in judged.messages]
        # All is whole, the canary included: then each request is answered, or the connection closed on.
        whole = judged.whole and judged.end == "open" and _header(judged.messages[-1], b"x-nonce") == nonce.encode()
        self._main = client = await self._connected(self._main)
        await client.send(pieces)
        while True:
            answers = read_answers(client.received, methods, ended=client.ended and not client.broken)
            if client.ended or (whole and len(answers) == len(methods) and answers[-1].whole):
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
        failures = [failure for answer in answers for failure in self._sound(mutant, answer)]
        failures += _crossed(judged, answers)
        if whole and len(answers) < len(methods):
            last = answers[-1] if answers else None
            if last is None or not (last.closes or last.status == 101):
                failures.append(Failure("a connection was closed without an answer", repr(client.received[-300:])))
        if judged.end in ("open", "closed") and len(answers) > len(methods) + (not whole):
            failures.append(Failure("more answers than requests", f"{len(answers)} to {methods}"))
        return failures

    def _sound(self, mutant: Mutant, answer: Answer) -> Iterator[Failure]:
        """Yield what is wrong with an answer by itself."""
        key = (mutant.kind, answer.status)
        self.statuses[key] = self.statuses.get(key, 0) + 1
        if KEY.encode() in answer.body or KEY.encode() in b"".join(answer.fields.values()):
            yield Failure("a key in an answer", repr(answer))
        if b'"the gateway failed' in answer.body:
            yield Failure("a failure of the gateway's own", repr(answer.body[:300]))
        if answer.status >= 500 and mutant.kind == "request":
            yield Failure(f"a {answer.status} for a mutated request", repr(answer.body[:300]))

    # -- answers ---------------------------------------------------------------------------------------

    async def _answer(self, mutant: Mutant) -> list[Failure]:
        """Ask for a mutated answer, then for a sound one on the same connection."""
        asked, plain = _asked(mutant)
        loop = asyncio.get_running_loop()
        pieces = [*mutant.pieces, mutant.late]
        judged = readings.response(pieces, loop, eof=mutant.ending == "close")
        if mutant.ending == "keep" and not (judged.whole and readings.our_response(pieces, eof=False).whole):
            # A reader waits here, for what never comes.
            mutant = replace(mutant, ending="close")
            judged = readings.response(pieces, loop, eof=True)
        name = f"m{self._attempts}"
        self.azure.mutants = {name: mutant}
        self.azure.played.clear()
        self._main = client = await self._connected(self._main)
        old = b" HTTP/1.0\r\n" in asked
        await client.send([asked.replace(b"\r\n", b"\r\nX-Mutant: %b\r\n" % name.encode(), 1)])
        answer = await self._next(client, ["GET"], 1)
        if answer is None:
            answers = read_answers(client.received, ["GET"], ended=False)
            answer = answers[0] if answers else None
        if mutant.late:
            # Bytes that come while the next request is under way cannot be told from its answer: they come before it.
            await self.azure.played.wait()
        failures = self._compared(judged, answer, plain=plain) if answer is not None else []
        if answer is None and not old:
            failures.append(Failure("a connection was closed without an answer", "to a sound request"))
        if answer is not None and answer.whole and not client.ended and not answer.closes and not old:
            nonce = self._nonce()
            client.received = b""
            await client.send([self._canary(nonce)])
            failures += _wrong_canary("on the same connection", nonce, await self._next(client, ["POST"], 1))
        else:
            self._main = None
            client.transport.abort()
        return failures

    def _compared(self, judged: readings.Reading, answer: Answer, *, plain: bool) -> list[Failure]:
        mutant = Mutant("answer", b"")
        failures = list(self._sound(mutant, answer))
        if answer.status in (502, 503, 504) and _code(answer):
            return failures  # the gateway's own: it refused what Azure sent
        message = judged.messages[0] if judged.messages else None
        if message is None or message.start != (str(answer.status),):
            if judged.end != "refused":
                failures.append(Failure("another status than Azure's", f"{answer.status} for {message}"))
            return failures
        if 300 <= answer.status < 400 and answer.status != 304:
            failures.append(Failure("a redirect of Azure's reached a client", str(answer.status)))
        if answer.status == 205 and not answer.body:
            return failures  # it has no content (RFC 9110, 15.3.6), whatever Azure sends with it
        if answer.whole and message.end is None and judged.end != "refused" and b'"error"' not in answer.body[-2000:]:
            failures.append(Failure("an answer that broke off was handed on as whole", repr(answer.body[-200:])))
        if plain and answer.whole and message.end is not None and not _same(answer, message):
            failures.append(Failure("another body than Azure's", f"{answer.body[-200:]!r} for {message.body[-200:]!r}"))
        return failures


def _asked(mutant: Mutant) -> tuple[bytes, bool]:
    """Return the sound request that gets a mutated answer, and whether its team changes no byte of it."""
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


def _same(answer: Answer, message: readings.Message) -> bool:
    """Whether an answer has the body of Azure's; the gateway may undo its compression."""
    if answer.body == message.body:
        return True
    coding = _header(message, b"content-encoding").lower()
    if coding not in (b"gzip", b"x-gzip", b"deflate") or b"content-encoding" in answer.fields:
        return False
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(message.body) == answer.body
    return False


def _header(message: readings.Message, name: bytes) -> bytes:
    return next((value for each, value in reversed(message.fields) if each == name), b"")


def _code(answer: Answer) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        error: Any = json.loads(answer.body)["error"]
        return str(error.get("code") or error.get("type") or "")
    return ""


_NONCE = re.compile(rb'"nonce": ?"([^"\\]*)"')
_READ = re.compile(rb'"read": ?\["([A-Z]+)", ?"([a-z]*)", ?([0-9]+), ?([0-9]+)\]')
# Operations whose body goes to Azure as it came; of the last one where its model is a deployment's name already.
_UNCHANGED = ("/v1/chat/completions", "/v1/embeddings", "/v1/files", "/v1/audio/transcriptions")
_FORM = "/v1/audio/transcriptions"


def _crossed(judged: readings.Reading, answers: list[Answer]) -> Iterator[Failure]:
    """Yield each answer that is another request's, or tells of a body that was not sent."""
    for message, answer in zip(judged.messages, answers, strict=False):
        nonce, read = _NONCE.search(answer.body), _READ.search(answer.body)
        given = [value for name, value in message.fields if name == b"x-nonce"]
        if nonce is not None and nonce.group(1) and nonce.group(1) not in given:
            yield Failure("an answer of another request", f"{nonce.group(1)!r} to {message.start}")
        elif read is not None and answer.whole and _unchanged(message):
            size, check = int(read.group(3)), int(read.group(4))
            if message.end is None and judged.end == "refused":
                continue  # ours took a body that the judge refuses
            if message.end is None:
                yield Failure("an unfinished request was answered", f"{size} bytes of {message.start}")
            elif (size, check) != (len(message.body), zlib.crc32(message.body)):
                yield Failure("Azure got another body than was sent", f"{size} of {len(message.body)} bytes")


def _unchanged(message: readings.Message) -> bool:
    path = message.start[1].partition("?")[0]
    return path in _UNCHANGED and (path != _FORM or message.body.count(b'name="model"\r\n\r\nwhisper\r\n') == 1)


def _wrong_canary(where: str, nonce: str, answer: Answer | None) -> list[Failure]:
    kind = f"a canary {where} got no answer of its own"
    if answer is None:
        return [Failure(kind, "the connection was closed")]
    found = _NONCE.search(answer.body)
    if answer.status != 200 or found is None or found.group(1).decode() != nonce:
        return [Failure(kind, f"{answer.status} {answer.body[:300]!r}")]
    return []
