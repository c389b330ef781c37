"""Batch files: an uploaded file of requests, one JSON object a line, each with its own model.

Azure needs the deployment's name in each line. The form is kept (on disk if it is long) until its purpose is known,
which may follow the file; then a thread rewrites the lines, because a file may be large.
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

_MAX_IN_MEMORY = 1024 * 1024
_CHUNK = 256 * 1024
_MAX_LINE = 16 * 1024 * 1024
# Azure accepts 100,000 requests in a file.
_MAX_LINES = 200_000
_PURPOSE = re.compile(r"[A-Za-z_-]{1,64}")
_MAX_LOGGED = 20  # models
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# A separate thread pool with a bounded queue: a file takes seconds. One caller gets at most half of the queue, so that
# it cannot make the gateway refuse the files of others.
_threads = ThreadPoolExecutor(2, "batch")
_MAX_QUEUED = 16
_MAX_OF_CALLER = 8
_queued: Counter[str] = Counter()  # files of each caller


async def map_batch(request: RequestView, find: Callable[[str], Target]) -> None:
    """Write deployments into the lines of an uploaded batch file; any other upload stays unchanged.

    Raises ApiError 400 with the number of a line that has no `body.model`, or whose model is in another resource than
    those before it; the errors of `find`, with the line; and 503 if too many files are being processed.
    """
    mapper = _LineMapper(find, request.target.resource)
    rewritten = await _read_upload(request, mapper)
    if rewritten is None:
        return
    request._exchange.defer(lambda _: rewritten.close())
    if mapper.target is not None:
        request.target = request.target.routed_to(mapper.target)
    request.notes["model"] = ", ".join([*mapper.deployments][:_MAX_LOGGED])
    request.notes["batch_lines"] = mapper.count
    # Copies of the request keep the original body: a retry maps it again.
    request._body = Body(_FileSource(rewritten))
    request._body.account = request._exchange


async def batch_models(request: RequestView) -> tuple[str, ...]:
    """Return the models in the lines of an uploaded batch file; raises as `map_batch` does."""
    mapper = _LineMapper(lambda name: request.target.replace(deployment=name))
    rewritten = await _read_upload(request, mapper)
    if rewritten is not None:
        rewritten.close()
        request._exchange.release_disk(_size(request._body.scanned()))
    return tuple(mapper.deployments)


async def _read_upload(request: RequestView, mapper: _LineMapper) -> IO[bytes] | None:
    """Read a form, and return it with the lines of its batch file rewritten; None if it has no batch file."""
    boundary = boundary_of(request.headers.getall("content-type"))
    if boundary is None:
        raise ApiError(400, "an upload must be multipart/form-data, with `purpose` and `file`", code="malformed_form")
    form = FormReader(boundary, {"purpose": True, "file": False})

    def is_batch() -> bool:
        purpose = form.fields.get("purpose")
        if purpose is None or not purpose.whole:
            return False
        text = purpose.text.strip(" \t\r\n")
        if not _PURPOSE.fullmatch(text):
            raise ApiError(400, "`purpose` must be one word, such as batch or assistants", param="purpose")
        return text.lower() == "batch"

    def feed(data: bytes | None) -> bool:
        if data is None:
            form.end()
        else:
            form.feed(data)
        # A batch is read to the end of the body, which may go on after the last boundary.
        known = form.done or ("purpose" in form.fields and form.fields["purpose"].whole)
        return known and not is_batch()

    body = request._body
    request._exchange.defer(lambda _: body.close())
    await body.scan(feed, "send the field `purpose` before the file; a batch file must fit completely")
    file = form.fields.get("file")
    if not is_batch():
        return None
    if file is None:
        raise ApiError(400, "a batch needs a `file`", param="file")
    upload = body.scanned()
    # The rewritten lines are about as long as the original ones.
    request._exchange.reserve_disk(_size(upload))
    return await _in_thread(upload, file.start, file.end, mapper, request.holder)


def _size(form: SpooledFile | bytes) -> int:
    return len(form) if isinstance(form, bytes) else form.size


async def _in_thread(form: SpooledFile | bytes, start: int, end: int, mapper: _LineMapper, holder: str) -> IO[bytes]:
    """Rewrite the lines in a thread. If the request is cancelled, the thread stops soon and leaves no file.

    Raises ApiError 503 if too many files are being processed, of all callers or of this one.
    """
    if _queued.total() >= _MAX_QUEUED:
        raise ApiError(503, "too many batch files are being processed; retry shortly", code="overloaded")
    if _queued[holder] >= _MAX_OF_CALLER:
        raise ApiError(
            503, "too many of your batch files are being processed; retry when one is done", code="overloaded"
        )
    _queued[holder] += 1
    work = _threads.submit(_rewrite, form, start, end, mapper)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        mapper.cancelled = True
        work.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        raise
    finally:
        _queued[holder] -= 1
        if not _queued[holder]:
            del _queued[holder]


class _FileSource:
    """The rewritten form, as the source of a body."""

    def __init__(self, file: IO[bytes]) -> None:
        self._left = file.seek(0, io.SEEK_END)
        self.length: int | None = self._left
        file.seek(0)
        self._file = file

    async def read(self) -> bytes | None:
        """Return the next bytes, or None at the end. Raises OSError or ValueError if the file is gone."""
        return await self._next(_CHUNK) if self._left else None

    async def rest(self, limit: int | None) -> bytes:
        """Return all remaining bytes, at most `limit`; raises as `read` does, and ApiError 413."""
        if limit is not None and self._left > limit:
            raise body_too_large(limit)
        return await self._next(self._left)

    async def _next(self, size: int) -> bytes:
        size = min(size, self._left)
        chunk = await asyncio.get_running_loop().run_in_executor(DISK_THREADS, _read_exactly, self._file, size)
        self._left -= size
        return chunk


class _LineMapper:
    """Maps the models of lines, and ensures that all deployments are in one resource.

    If the first model has a pool, this is `preferred`, or the resource of the pool's first deployment if the pool has
    none in `preferred`.
    """

    def __init__(self, find: Callable[[str], Target], preferred: Resource | None = None) -> None:
        self._preferred = preferred
        self.deployments: dict[str, str] = {}  # by model
        self.target: Target | None = None
        self.count = 0
        self.cancelled = False
        self._find = find

    def map(self, number: int, line: bytes) -> bytes:
        """Return a line with its deployment, and each key once, so that no reader gets another value."""
        self.count += 1
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            fields, body, name = _parse(text)
        except KeyError as exc:
            raise _line_error(number, f"it has no `{'body' if exc.args[0] == 'body' else 'body.model'}`") from None
        except (ApiError, RecursionError, TypeError):
            raise _line_error(number, "it is not a JSON object with a JSON object `body`") from None
        if not isinstance(name, str):
            raise _line_error(number, "its `body.model` must be text")
        deployment = self.deployments.get(name) or self._look_up(number, name)
        return _encode(fields, body, deployment) + (b"\r" if line.endswith(b"\r") else b"")

    def _look_up(self, number: int, name: str) -> str:
        try:
            target = self._find(name)
        except ApiError as exc:
            raise _line_error(number, exc.message, code=exc.code, status=exc.status) from None
        if self.target is None:
            self.target = target = target.pinned(self._preferred)
        elif self.target.resource is not None:
            in_resource = target.within(self.target.resource)
            if in_resource is None:
                raise _line_error(
                    number,
                    f"its model {name!r} is in another Azure resource than those before it; send one batch file per "
                    "resource",
                )
            target = in_resource
        self.deployments[name] = deployment = target.deployment or name
        return deployment


def _parse(line: bytes) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the fields of a line, those of its body, and its model."""
    try:
        fields = _decode_fields(line)
        body = _decode_fields(fields["body"])
        return fields, body, msgspec.json.decode(body["model"])
    except (msgspec.DecodeError, ValueError):
        decoded = decode_json(line, msgspec.json.decode)  # it accepts JSON that msgspec does not, more slowly
    return decoded, decoded["body"], decoded["body"]["model"]


def _encode(fields: dict[str, Any], body: dict[str, Any], deployment: str) -> bytes:
    if not all(isinstance(value, msgspec.Raw) for value in fields.values()):
        return json.dumps({**fields, "body": {**body, "model": deployment}}, separators=(",", ":")).encode()
    body["model"] = msgspec.Raw(msgspec.json.encode(deployment))
    fields["body"] = msgspec.Raw(msgspec.json.encode(body))
    return msgspec.json.encode(fields)


def _line_error(number: int, why: str, *, code: str | None = "invalid_batch_file", status: int = 400) -> ApiError:
    return ApiError(status, f"line {number} of the batch file is invalid: {why}", param="file", code=code)


def _rewrite(form: SpooledFile | bytes, start: int, end: int, mapper: _LineMapper) -> IO[bytes]:
    """Return a file with the form, its lines from `start` to `end` rewritten."""
    target = cast("IO[bytes]", tempfile.SpooledTemporaryFile(max_size=_MAX_IN_MEMORY, prefix="gateway-"))  # noqa: SIM115 -- the caller closes it
    try:
        if isinstance(form, SpooledFile):
            with form.lock:
                _write(form.file(), start, end, mapper, target)
        else:
            _write(io.BytesIO(form), start, end, mapper, target)
    except BaseException:
        target.close()
        raise
    return target


def _write(source: IO[bytes], start: int, end: int, mapper: _LineMapper, target: IO[bytes]) -> None:
    for chunk in _chunks(source, start):
        target.write(chunk)
    rest = source.seek(0, io.SEEK_END) - end
    source.seek(start)
    number, size = 0, 0
    partial: list[bytes] = []  # chunks of an incomplete line
    for chunk in _chunks(source, end - start):
        if mapper.cancelled:
            raise ApiError(499, "the client disconnected")
        first, *others = chunk.split(b"\n")
        partial.append(first)
        size += len(first)
        if size > _MAX_LINE:
            raise _line_error(number + 1, f"it is longer than {_MAX_LINE} bytes")
        if not others:
            continue
        out = []
        for line in (b"".join(partial), *others[:-1]):
            number += 1
            out.append(mapper.map(number, line) if line.strip() else line)
            out.append(b"\n")
        if number > _MAX_LINES:
            raise _line_error(number, f"the file has more than {_MAX_LINES} lines; Azure accepts 100,000 requests")
        target.write(b"".join(out))
        partial, size = [others[-1]], len(others[-1])
    last = b"".join(partial)
    target.write(mapper.map(number + 1, last) if last.strip() else last)
    for chunk in _chunks(source, rest):
        target.write(chunk)


def _chunks(source: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of a file. Raises OSError if it has fewer."""
    while size > 0:
        chunk = _read_exactly(source, min(size, _CHUNK))
        size -= len(chunk)
        yield chunk


def _read_exactly(source: IO[bytes], size: int) -> bytes:
    """Return the next `size` bytes of a file. Raises OSError if it has fewer, so that no form is truncated silently."""
    parts: list[bytes] = []
    while size > 0:
        chunk = source.read(size)
        if not chunk:
            raise OSError(errno.EIO, "a temporary file is shorter than the data written to it")
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)
