"""Batch files: an uploaded file of requests, one JSON object a line, each with a model of its own.

Azure wants its deployment's name in each line. The form is kept (on disk, where it is long) until its purpose is
known, since that may come behind the file; then the lines are written anew, in a thread: a file may be large.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, cast

import msgspec

from gateway.body.request_body import Body, body_too_large
from gateway.body.spooled_file import DISK_THREADS, SpooledFile
from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json
from gateway.protocol.multipart import FormReader, boundary_of

if TYPE_CHECKING:
    from gateway.azure.request_view import RequestView
    from gateway.azure.resources import Resource, Target

__all__ = ("batch_models", "map_batch")

_IN_MEMORY = 1024 * 1024
_PIECE = 256 * 1024
_MAX_LINE = 16 * 1024 * 1024
# Azure takes 100,000 requests in a file.
_MAX_LINES = 200_000
_PURPOSE = re.compile(r"[A-Za-z_-]{1,64}")
_SHOWN = 20  # names in the log
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])

# Threads of their own, and a bound on who waits for them: a file takes seconds. One caller has half of the places at
# most, so that nobody's files alone make those of others be refused.
_threads = ThreadPoolExecutor(2, "batch")
_MAX_WAITING = 16
_MAX_OF_ONE = 8
_waiting: Counter[str] = Counter()  # files of each caller


async def map_batch(request: RequestView, find: Callable[[str], Target]) -> None:
    """Write deployments in the lines of an uploaded batch file; any other upload stays as it is.

    Raises ApiError 400 that names the line: one that is no request with a `body.model`, or whose model is in
    another resource than those before it; what `find` raises, with the line; 503 where too many files are at work.
    """
    lines = _Lines(find, request.target.resource)
    made = await _read_upload(request, lines)
    if made is None:
        return
    request._exchange.defer(lambda _: made.close())
    if lines.target is not None:
        request.target = request.target.to(lines.target)
    request.notes["model"] = ", ".join([*lines.found][:_SHOWN])
    request.notes["batch_lines"] = lines.count
    # Copies of the request keep what came: whoever asks again maps it again.
    request._body = Body(_Made(made))
    request._body.account = request._exchange


async def batch_models(request: RequestView) -> tuple[str, ...]:
    """Return the models that the lines of an uploaded batch file name; raises as `map_batch` does."""
    lines = _Lines(lambda name: request.target.replace(deployment=name))
    made = await _read_upload(request, lines)
    if made is not None:
        made.close()
        request._exchange.let_go_of_disk(_size(request._body.scanned()))
    return tuple(lines.found)


async def _read_upload(request: RequestView, lines: _Lines) -> IO[bytes] | None:
    """Read a form, and write it anew with the lines of its batch file; None where it has none."""
    boundary = boundary_of(request.headers.getall("content-type"))
    if boundary is None:
        raise ApiError(400, "an upload is multipart/form-data, with `purpose` and `file`", code="malformed_form")
    form = FormReader(boundary, {"purpose": True, "file": False})

    def is_batch() -> bool:
        purpose = form.fields.get("purpose")
        if purpose is None or not purpose.whole:
            return False
        text = purpose.text.strip(" \t\r\n")
        if not _PURPOSE.fullmatch(text):
            raise ApiError(400, "`purpose` must be one word, such as batch or assistants", param="purpose")
        return text.lower() == "batch"

    def watch(data: bytes | None) -> bool:
        if data is None:
            form.end()
        else:
            form.feed(data)
        # (A batch is looked at to the body's end: what follows its last boundary is a part of it.)
        known = form.done or ("purpose" in form.fields and form.fields["purpose"].whole)
        return known and not is_batch()

    body = request._body
    request._exchange.defer(lambda _: body.close())
    await body.scan(watch, "send the field `purpose` before the file; a batch file must fit whole")
    file = form.fields.get("file")
    if not is_batch():
        return None
    if file is None:
        raise ApiError(400, "a batch needs a `file`", param="file")
    came = body.scanned()
    # The new lines are about as long as those that came.
    request._exchange.hold_on_disk(_size(came))
    return await _in_thread(came, file.start, file.end, lines, request.holder)


def _size(form: SpooledFile | bytes) -> int:
    return len(form) if isinstance(form, bytes) else form.size


async def _in_thread(form: SpooledFile | bytes, start: int, end: int, lines: _Lines, holder: str) -> IO[bytes]:
    """Write the lines anew in a thread; it stops soon, and leaves nothing, where nobody waits for it any more.

    Raises ApiError 503 where too many files are at work, of all callers together or of this one.
    """
    if _waiting.total() >= _MAX_WAITING:
        raise ApiError(503, "too many batch files are being read; try again", code="overloaded")
    if _waiting[holder] >= _MAX_OF_ONE:
        raise ApiError(503, "too many of your batch files are being read; try again", code="overloaded")
    _waiting[holder] += 1
    work = _threads.submit(_rewritten, form, start, end, lines)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        lines.cancelled = True
        work.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        raise
    finally:
        _waiting[holder] -= 1
        if not _waiting[holder]:
            del _waiting[holder]


class _Made:
    """The form with the new lines, as a body's source."""

    def __init__(self, file: IO[bytes]) -> None:
        self._left = file.seek(0, io.SEEK_END)
        self.length: int | None = self._left
        file.seek(0)
        self._file = file

    async def read(self) -> bytes | None:
        """Return the next bytes, or None at the end. Raises OSError or ValueError if the file is gone."""
        return await self._next(_PIECE) if self._left else None

    async def rest(self, limit: int | None) -> bytes:
        """Return all that is still to come, at most `limit` bytes; raises as `read` does, and ApiError 413."""
        if limit is not None and self._left > limit:
            raise body_too_large(limit)
        return await self._next(self._left)

    async def _next(self, size: int) -> bytes:
        size = min(size, self._left)
        piece = await asyncio.get_running_loop().run_in_executor(DISK_THREADS, _read_exactly, self._file, size)
        self._left -= size
        return piece


class _Lines:
    """Maps the models of lines, and sees to it that one resource has them all.

    Of the first model's pool that is the `preferred` one, or, where the pool is not in it, the pool's first.
    """

    def __init__(self, find: Callable[[str], Target], preferred: Resource | None = None) -> None:
        self._preferred = preferred
        self.found: dict[str, str] = {}
        self.target: Target | None = None
        self.count = 0
        self.cancelled = False
        self._find = find

    def mapped(self, number: int, line: bytes) -> bytes:
        """Return a line with its deployment; each key once, so that nobody reads another one's value."""
        self.count += 1
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            fields, body, name = _read(text)
        except KeyError as exc:
            raise _refused(number, f"it has no `{'body' if exc.args[0] == 'body' else 'body.model'}`") from None
        except (ApiError, RecursionError, TypeError):
            raise _refused(number, "it is not a JSON object with a JSON object `body`") from None
        if not isinstance(name, str):
            raise _refused(number, "its `body.model` must be text")
        deployment = self.found.get(name) or self._look_up(number, name)
        return _written(fields, body, deployment) + (b"\r" if line.endswith(b"\r") else b"")

    def _look_up(self, number: int, name: str) -> str:
        try:
            target = self._find(name)
        except ApiError as exc:
            raise _refused(number, exc.message, code=exc.code, status=exc.status) from None
        if self.target is None:
            self.target = target = target.settled(self._preferred)
        elif self.target.resource is not None:
            there = target.within(self.target.resource)
            if there is None:
                raise _refused(
                    number,
                    f"its model {name!r} is in another Azure resource than those before it; one batch file goes to one",
                )
            target = there
        self.found[name] = deployment = target.deployment or name
        return deployment


def _read(line: bytes) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return a line's fields, those of its body, and the model in it."""
    try:
        fields = _fields.decode(line)
        body = _fields.decode(fields["body"])
        return fields, body, msgspec.json.decode(body["model"])
    except (msgspec.DecodeError, ValueError):
        slow = decode_json(line, msgspec.json.decode)  # which knows what msgspec does not take
    return slow, slow["body"], slow["body"]["model"]


def _written(fields: dict[str, Any], body: dict[str, Any], deployment: str) -> bytes:
    if not all(isinstance(value, msgspec.Raw) for value in fields.values()):
        return json.dumps({**fields, "body": {**body, "model": deployment}}, separators=(",", ":")).encode()
    body["model"] = msgspec.Raw(msgspec.json.encode(deployment))
    fields["body"] = msgspec.Raw(msgspec.json.encode(body))
    return msgspec.json.encode(fields)


def _refused(number: int, why: str, *, code: str | None = "invalid_batch_file", status: int = 400) -> ApiError:
    return ApiError(status, f"line {number} of the batch file cannot be used: {why}", param="file", code=code)


def _rewritten(form: SpooledFile | bytes, start: int, end: int, lines: _Lines) -> IO[bytes]:
    """Return a file with the whole form, and new lines in it from `start` to `end`."""
    made = cast("IO[bytes]", tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, prefix="gateway-"))  # noqa: SIM115 -- its user closes it
    try:
        if isinstance(form, SpooledFile):
            with form.lock:
                _write(form.file(), start, end, lines, made)
        else:
            _write(io.BytesIO(form), start, end, lines, made)
    except BaseException:
        made.close()
        raise
    return made


def _write(source: IO[bytes], start: int, end: int, lines: _Lines, made: IO[bytes]) -> None:
    for piece in _pieces(source, start):
        made.write(piece)
    rest = source.seek(0, io.SEEK_END) - end
    source.seek(start)
    number, size = 0, 0
    begun: list[bytes] = []  # of a line that has not ended
    for piece in _pieces(source, end - start):
        if lines.cancelled:
            raise ApiError(499, "the client left")
        first, *others = piece.split(b"\n")
        begun.append(first)
        size += len(first)
        if size > _MAX_LINE:
            raise _refused(number + 1, f"it is longer than {_MAX_LINE} bytes")
        if not others:
            continue
        out = []
        for line in (b"".join(begun), *others[:-1]):
            number += 1
            out.append(lines.mapped(number, line) if line.strip() else line)
            out.append(b"\n")
        if number > _MAX_LINES:
            raise _refused(number, f"it is one of more than {_MAX_LINES}; Azure takes 100,000 requests")
        made.write(b"".join(out))
        begun, size = [others[-1]], len(others[-1])
    last = b"".join(begun)
    made.write(lines.mapped(number + 1, last) if last.strip() else last)
    for piece in _pieces(source, rest):
        made.write(piece)


def _pieces(source: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of a file. Raises OSError if it has fewer."""
    while size > 0:
        piece = _read_exactly(source, min(size, _PIECE))
        size -= len(piece)
        yield piece


def _read_exactly(source: IO[bytes], size: int) -> bytes:
    """Return the next `size` bytes of a file. Raises OSError if it has fewer: a form must not be cut unseen."""
    parts: list[bytes] = []
    while size > 0:
        piece = source.read(size)
        if not piece:
            raise OSError(errno.EIO, "a temporary file is shorter than what was written to it")
        parts.append(piece)
        size -= len(piece)
    return b"".join(parts)
