"""Batch files: an uploaded file of requests, one JSON object a line, each with a model of its own.

Azure wants its deployment's name in each line. The form is kept (on disk, where it is long) until its purpose is
known, since that may come behind the file; then the lines are written anew, in a thread: a file may be large.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

import msgspec

from gateway.body import too_much
from gateway.errors import ApiError
from gateway.multipart import FormReader, boundary_of
from gateway.spool import Spool

if TYPE_CHECKING:
    from gateway.messages import Request, Resource, Target

__all__ = ("map_batch",)

_IN_MEMORY = 1024 * 1024
_PIECE = 256 * 1024
_MAX_LINE = 64 * 1024 * 1024
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def map_batch(request: Request, find: Callable[[str], Target]) -> None:
    """Write deployments in the lines of an uploaded batch file; any other upload stays as it is.

    Raises ApiError 400 that names the line: one that is no request with a `body.model`, or whose model is in
    another resource than those before it.
    """
    boundary = boundary_of(request.headers.get("content-type"))
    if boundary is None:
        return
    form = FormReader(boundary, frozenset({"purpose"}), frozenset({"file"}))

    def watch(data: bytes) -> bool:
        form.feed(data)
        purpose = form.fields.get("purpose")
        return form.done or (purpose is not None and purpose.whole and purpose.text != "batch")

    body = request._body
    request._exchange.defer(lambda _: body.close())
    await body.look(watch, "send the field `purpose` before the file; a batch file must fit whole")
    purpose, file = form.fields.get("purpose"), form.fields.get("file")
    if purpose is None or purpose.text != "batch" or file is None or not file.whole:
        return
    looked_at = body.looked_at()
    lines = _Lines(find)
    made = await asyncio.to_thread(_rewritten, looked_at, file.start, file.end, lines)
    request._exchange.defer(lambda _: made.close())
    if lines.resource is not None:
        request.target = request.target.replace(resource=lines.resource)
    request.notes["model"] = ", ".join(lines.found)
    request.notes["batch_lines"] = lines.count
    body.replace(_Made(made))


class _Made:
    """The form with the new lines, as a body's source."""

    def __init__(self, file: IO[bytes]) -> None:
        self.length: int | None = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._file = file

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end."""
        return await asyncio.to_thread(self._file.read, _PIECE)

    async def rest(self, limit: int | None) -> bytes:
        """Return all of it, at most `limit` bytes."""
        if limit is not None and self.length is not None and self.length > limit:
            raise too_much(limit)
        return await asyncio.to_thread(self._file.read)


class _Lines:
    """Maps the models of lines, and sees to it that one resource has them all."""

    def __init__(self, find: Callable[[str], Target]) -> None:
        self.found: dict[str, str] = {}
        self.resource: Resource | None = None
        self.count = 0
        self._find = find

    def mapped(self, number: int, line: bytes) -> bytes:
        """Return a line with its deployment; a blank one, or one that has it, as it is."""
        if not line.strip():
            return line
        self.count += 1
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            fields = _fields.decode(text)
            body = _fields.decode(fields["body"])
            name: Any = msgspec.json.decode(body["model"])
        except KeyError as exc:
            raise _refused(number, f"it has no `{'body' if exc.args[0] == 'body' else 'body.model'}`") from None
        except (msgspec.DecodeError, RecursionError, ValueError):
            raise _refused(number, "it is not a JSON object with a JSON object `body`") from None
        if not isinstance(name, str):
            raise _refused(number, "its `body.model` must be text")
        deployment = self.found.get(name)
        if deployment is None:
            deployment = self._look_up(number, name)
        if deployment == name:
            return line
        body["model"] = msgspec.Raw(msgspec.json.encode(deployment))
        fields["body"] = msgspec.Raw(msgspec.json.encode(body))
        return msgspec.json.encode(fields) + (b"\r" if line.endswith(b"\r") else b"")

    def _look_up(self, number: int, name: str) -> str:
        try:
            target = self._find(name.strip())
        except ApiError as exc:
            raise _refused(number, exc.message, code=exc.code, status=exc.status) from None
        if self.found and target.resource != self.resource:
            raise _refused(
                number,
                f"its model {name!r} is in another Azure resource than those before it; one batch file goes to one",
            )
        self.resource = target.resource
        self.found[name] = deployment = target.deployment or name
        return deployment


def _refused(number: int, why: str, *, code: str | None = "invalid_batch_file", status: int = 400) -> ApiError:
    return ApiError(status, f"line {number} of the batch file cannot be used: {why}", param="file", code=code)


def _rewritten(form: Spool | bytes, start: int, end: int, lines: _Lines) -> IO[bytes]:
    """Return a file with the whole form, and new lines in it from `start` to `end`."""
    source: IO[bytes] = form.file() if isinstance(form, Spool) else io.BytesIO(form)
    made = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, prefix="gateway-")  # noqa: SIM115 -- its user closes it
    try:
        for piece in _pieces(source, start):
            made.write(piece)
        rest = b""
        number = 0
        for piece in _pieces(source, end - start):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                number += 1
                made.write(lines.mapped(number, line) + b"\n")
            if len(rest) > _MAX_LINE:
                raise _refused(number + 1, f"it is longer than {_MAX_LINE} bytes")
        if rest:
            made.write(lines.mapped(number + 1, rest))
        while piece := source.read(_PIECE):
            made.write(piece)
    except BaseException:
        made.close()
        raise
    return made


def _pieces(source: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (piece := source.read(min(size, _PIECE))):
        size -= len(piece)
        yield piece
