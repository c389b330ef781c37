"""Multipart forms (RFC 7578), read as they come and without I/O: where each field of interest begins and ends.

Nothing is changed or unwrapped: what matters are offsets, so that everything else can be passed on byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gateway.errors import ApiError

__all__ = ("Field", "FormReader", "boundary_of")

# What one field of interest may hold, and the head of any part, in bytes.
_MAX_VALUE = 64 * 1024
_MAX_HEAD = 16 * 1024
_MAX_PARTS = 10_000
_BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"\\]{1,70})"|([^\s";,]{1,70}))(?=[\s;]|$)', re.IGNORECASE)
_DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data[ \t]*((?:;[^\r\n]*)?)", re.IGNORECASE)
_NAME = re.compile(rb';[ \t]*name=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s";]+))', re.IGNORECASE)
_QUOTED = re.compile(rb'"(?:[^"\\\r\n]|\\.)*"')


def boundary_of(content_type: str | None) -> bytes | None:
    """Return the boundary of a `multipart/form-data` body, or None where it is none."""
    kind, _, _ = (content_type or "").partition(";")
    if kind.strip().lower() != "multipart/form-data":
        return None
    found = _BOUNDARY.search(content_type or "")
    if found is None:
        raise ApiError(400, "the form has no boundary in its Content-Type", code="malformed_form")
    return (found.group(1) or found.group(2)).encode("latin-1", "replace")


@dataclass
class Field:
    """One field of interest: its value is `body[start:end]`, its part `body[begins:next]`.

    `end` and `next` are -1 until its end has come; `value` is kept only where `keeps` is set.
    """

    name: str
    begins: int
    start: int
    end: int = -1
    next: int = -1
    keeps: bool = True
    value: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Whether its end has come."""
        return self.end >= 0

    @property
    def text(self) -> str:
        """Its value as text."""
        return self.value.decode("utf-8", "replace")


class FormReader:
    """Finds fields in a form: `keep` are those whose values are wanted, `mark` those of which the place is.

    `fields` are the fields found so far; `first` is where the first part begins, `done` says that the form
    has ended. A second field of the same name is refused: two readers could take either for the one that counts.
    """

    def __init__(self, boundary: bytes, keep: frozenset[str], mark: frozenset[str] = frozenset()) -> None:
        self.fields: dict[str, Field] = {}
        self.first = -1
        self.done = False
        self.boundary = boundary
        self._delimiter = b"\r\n--" + boundary
        self._keep = keep
        self._mark = mark
        # The first boundary has no line before it: one is made up.
        self._data = b"\r\n"
        self._offset = -2  # of the first byte of `_data`
        self._head = False  # a part's head comes next
        self._current: Field | None = None
        self._begins = 0
        self._parts = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises ApiError 400 where they are no form."""
        if self.done:
            return
        self._data = self._data + data if self._data else data
        while self._take_head() if self._head else self._take_value():
            pass

    def _take_value(self) -> bool:
        """Go on to the next delimiter; whether there was one."""
        end = self._data.find(self._delimiter)
        if end < 0:
            keep = len(self._delimiter) - 1
            if len(self._data) > keep:
                self._pass(len(self._data) - keep)
            return False
        if self._current is not None:
            self._collect(end)
            self._current.end = self._offset + end
            self._current.next = self._offset + end + 2
            self._current = None
        self._begins = self._offset + end + 2
        if self.first < 0:
            self.first = self._begins
        self._drop(end + len(self._delimiter))
        self._head = True
        return True

    def _take_head(self) -> bool:
        """Read a part's head; whether it was there and another part may follow."""
        if self._data[:2] == b"--":
            self.done = True
            self._data = b""
            return False
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > _MAX_HEAD:
                raise ApiError(400, "a part of the form has no end of its head", code="malformed_form")
            return False
        lines = self._data[:end].split(b"\r\n")
        if lines[0].strip(b" \t"):
            # The boundary goes on: it is another one, which only begins like ours.
            raise ApiError(400, "the form's parts are not divided by its boundary", code="malformed_form")
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ApiError(400, f"the form has more than {_MAX_PARTS} parts", code="malformed_form")
        name = _name(lines[1:])
        self._drop(end + 4)
        self._head = False
        if name in self._keep or name in self._mark:
            if name in self.fields:
                raise ApiError(400, f"the form has two fields {name!r}", param=name, code="malformed_form")
            self._current = Field(name, self._begins, self._offset, keeps=name in self._keep)
            self.fields[name] = self._current
        # An empty value has its delimiter's line break right behind the head.
        return True

    def _pass(self, size: int) -> None:
        if self._current is not None:
            self._collect(size)
        self._drop(size)

    def _collect(self, size: int) -> None:
        current = self._current
        if current is not None and current.keeps:
            current.value += self._data[:size]
            if len(current.value) > _MAX_VALUE:
                raise ApiError(400, f"the form's field {current.name!r} is too long", param=current.name)

    def _drop(self, size: int) -> None:
        self._data = self._data[size:]
        self._offset += size


def _name(lines: list[bytes]) -> str:
    """Return the name of a part's field; "" where it has none."""
    for line in lines:
        found = _DISPOSITION.fullmatch(line)
        if found is not None:
            # What stands in quotes could look like another parameter: names are sought around them.
            rest = found.group(1)
            names = [match for match in _NAME.finditer(rest) if not _inside_quotes(rest, match.start())]
            if len(names) != 1:
                return ""
            value = names[0].group(1) if names[0].group(1) is not None else names[0].group(2)
            text: str = (
                value.replace(b'\\"', b'"').replace(b"\\\\", b"\\").replace(b"%22", b'"').decode(errors="replace")
            )
            return text
    return ""


def _inside_quotes(line: bytes, place: int) -> bool:
    return any(match.start() < place < match.end() for match in _QUOTED.finditer(line))
