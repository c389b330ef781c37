"""Multipart forms (RFC 7578), read as they come and without I/O: where each field of interest begins and ends.

Nothing is changed or unwrapped: what matters are offsets, so that everything else can be passed on byte for byte.

Rule: what two readers could read in two ways is refused, because Azure's may be the other one: a boundary or a name
that is given twice, a line that is folded or malformed, a delimiter that only some would take for one, anything
behind the end. What OpenAI's SDKs, browsers and curl send is none of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.errors import ApiError
from gateway.protocol.headers import TOKEN
from gateway.protocol.media_type import media_type

__all__ = ("Field", "FormReader", "boundary_of")

# What one field of interest may hold, and the head of any part, in bytes.
_MAX_VALUE = 64 * 1024
_MAX_HEAD = 16 * 1024
# Parts of a form, and lines of a part's head. No operation has fifty of one or five of the other. Reading so many
# takes less than 5 ms in all, so a form cannot keep the event loop.
_MAX_PARTS = 256
_MAX_LINES = 16
# A parameter's value in quotes: a quote is never escaped in it, since readers differ in what a backslash means there.
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({TOKEN})=(?:({TOKEN})[ \t]*(?=;|$)|"([^"\r\n]*)")')
# File names and boundaries are often written without the quotes that they need; no reader can find a parameter in them.
_LOOSE = re.compile(r'[ \t]*;[ \t]*(filename\*?|boundary)=([^;"\r\n]+)(?=;|$)', re.IGNORECASE)
# Neither can one in a last file name, whatever its quotes and backslashes mean, where it has no semicolon.
_LAST = re.compile(r'[ \t]*;[ \t]*(filename)="([^;\r\n]*)"[ \t]*', re.IGNORECASE)
_KIND = re.compile(rf"[ \t]*({TOKEN}(?:/{TOKEN})?)")
_LINE = re.compile(rf"({TOKEN}):(.*)", re.DOTALL)
_HALF_BREAK = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the form is malformed: {why}", code="malformed_form")


def _parameters(text: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Read `kind; name=value; ...`: the kind in small letters, and the parameters; None where it is no such text."""
    found = _KIND.match(text)
    if found is None:
        return None
    kind, place = found.group(1).lower(), found.end()
    parameters = []
    while place < len(text):
        if (found := _LAST.fullmatch(text, place) or _LOOSE.match(text, place)) is not None:
            name, value = found.groups()
        elif (found := _PARAMETER.match(text, place)) is not None:
            name, token, quoted = found.groups()
            value = token if token is not None else quoted
            if value.endswith("\\"):
                return None
        else:
            break
        parameters.append((name.lower(), value.strip(" \t")))
        place = found.end()
    return (kind, parameters) if not text[place:].strip(" \t;") else None


def boundary_of(content_types: list[str]) -> bytes | None:
    """Return the boundary of a `multipart/form-data` body, given its Content-Type headers; None where it is none.

    Raises ApiError 400 where it is one, and its boundary cannot be told for sure.
    """
    if "multipart/form-data" not in map(media_type, content_types):
        return None
    read = _parameters(content_types[0]) if len(content_types) == 1 else None
    if read is None:
        raise _malformed("its Content-Type is not one well-formed multipart/form-data")
    boundaries = [value for name, value in read[1] if name.partition("*")[0] == "boundary"]
    if len(boundaries) != 1 or "boundary" not in dict(read[1]) or not _BOUNDARY.fullmatch(boundaries[0]):
        raise _malformed("its Content-Type has no sound boundary")
    return boundaries[0].encode("ascii")


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
    """Finds fields in a form, by their names without regard to case.

    `wanted` has the fields of interest, and whether their values are kept. `fields` are those found so far;
    `first` is where the first part begins, `done` says that the form has ended. Of the fields that `alike` names
    there may be one, and of each other field of interest one.
    """

    def __init__(self, boundary: bytes, wanted: Mapping[str, bool], alike: frozenset[str] = frozenset()) -> None:
        self.fields: dict[str, Field] = {}
        self.first = -1
        self.done = False
        self.boundary = boundary
        self._dashes = b"--" + boundary
        self._wanted = wanted
        self._alike = alike
        # The first boundary has no line before it: one is made up.
        self._data = b"\r\n"
        self._offset = -2  # of the first byte of `_data`
        self._place = 0  # what stands before it has been read
        self._new = 0  # about where the bytes begin that came last
        self._head = False  # a part's head comes next
        self._current: Field | None = None
        self._begins = 0
        self._parts = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises ApiError 400 where they are no form."""
        self._new = max(0, len(self._data) - self._place - 1)
        self._data = self._data[self._place :] + data
        self._offset += self._place
        self._place = 0
        while self._take_end() if self.done else self._take_head() if self._head else self._take_value():
            pass

    def end(self) -> None:
        """Note the body's end. Raises ApiError 400 where the form has not ended."""
        if not self.done:
            raise _malformed("it breaks off before its last boundary")

    def _take_value(self) -> bool:
        """Go on to the next delimiter; whether there was one."""
        data, start = self._data, self._place
        # Only a delimiter that follows a line break counts. A value may be full of others: they cost no step each.
        behind = max(0, start - 1)
        feed = data.find(b"\n" + self._dashes, behind)
        found = feed + 1 if feed >= 0 else -1
        if feed >= 0 and (feed <= start or data[feed - 1 : feed] != b"\r"):
            raise _malformed("a boundary does not follow a line break of its own")
        if data.find(b"\r" + self._dashes, behind, feed if feed >= 0 else len(data)) >= 0:
            raise _malformed("a boundary does not follow a line break of its own")
        if found < 0:
            # Half a delimiter, with the line break before it, may be there already.
            self._collect(max(start, len(data) - len(self._dashes) - 1))
            return False
        self._collect(found - 2)
        if self._current is not None:
            self._current.end = self._offset + found - 2
            self._current.next = self._offset + found
            self._current = None
        self._begins = self._offset + found
        if self.first < 0:
            self.first = self._begins
        self._place = found + len(self._dashes)
        self._head = True
        return True

    def _take_head(self) -> bool:
        """Read a part's head; whether it was there, or the form has ended."""
        data, start = self._data, self._place
        if data.startswith(b"--", start):
            self.done = True
            self._place += 2
            return True
        end = data.find(b"\r\n\r\n", start)
        # Looked for before the head has ended, which it might never do.
        if _HALF_BREAK.search(data, max(start, self._new), end if end >= 0 else len(data)):
            raise _malformed("a part's head has half a line break")
        if end - start > _MAX_HEAD or (end < 0 and len(data) - start > _MAX_HEAD):
            raise _malformed("a part's head is too long")
        if end < 0:
            return False
        first, *lines = data[start:end].split(b"\r\n")
        if first.strip(b" \t"):
            raise _malformed("its parts are not divided by its boundary")
        if len(lines) > _MAX_LINES:
            raise _malformed(f"a part's head has more than {_MAX_LINES} lines")
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _malformed(f"it has more than {_MAX_PARTS} parts")
        name, plain = _name(lines)
        self._place = end + 4
        self._head = False
        if name in self._wanted:
            if not plain:
                raise _malformed(f"the field {name!r} is encoded, or in another charset than UTF-8")
            if name in self.fields or (name in self._alike and self._alike & self.fields.keys()):
                raise ApiError(400, f"the form has two fields {name!r}", param=name, code="malformed_form")
            self._current = Field(name, self._begins, self._offset + self._place, keeps=self._wanted[name])
            self.fields[name] = self._current
            # An empty value has its delimiter's line break right behind the head.
        return True

    def _take_end(self) -> bool:
        """Look at what follows the last boundary: blank lines at most."""
        if self._data[self._place :].strip(b" \t\r\n"):
            raise _malformed("something follows its last boundary")
        self._place = len(self._data)
        return False

    def _collect(self, end: int) -> None:
        current = self._current
        if current is not None and current.keeps:
            current.value += self._data[self._place : end]
            if len(current.value) > _MAX_VALUE:
                raise ApiError(400, f"the form's field {current.name!r} is too long", param=current.name)
        self._place = end


# A field's name that every reader reads alike: not one that some decode (RFC 2047), unescape or trim.
_NAME = re.compile(r"(?!.*=\?)[!-~](?:[ -~]*[!-~])?")
_PLAIN = ("7bit", "8bit", "binary")


def _name(lines: list[bytes]) -> tuple[str, bool]:
    """Return the name of a part's field, in small letters, and whether its value is plain text, by its head.

    Raises ApiError 400 where the name cannot be told for sure.
    """
    names = []
    plain = True
    for line in lines:
        found = _LINE.fullmatch(line.decode("utf-8", "replace"))
        if found is None or "\n" in found.group(2) or "\r" in found.group(2):
            raise _malformed("a line of a part's head is no header field")
        field, value = found.group(1).lower(), found.group(2)
        if field == "content-disposition":
            read = _parameters(value)
            if read is None or read[0] != "form-data":
                raise _malformed("a part's Content-Disposition is no well-formed form-data, its file name perhaps")
            names += [(name, value) for name, value in read[1] if name.partition("*")[0] == "name"]
        elif field == "content-transfer-encoding":
            plain = plain and value.strip(" \t").lower() in _PLAIN
        elif field == "content-type" and "charset" in value.lower():
            read = _parameters(value)
            charsets = [value.lower() for name, value in read[1] if name == "charset"] if read else []
            plain = plain and charsets in (["utf-8"], ["us-ascii"])
    name = names[0][1] if len(names) == 1 and names[0][0] == "name" else ""
    if not _NAME.fullmatch(name) or "\\" in name:
        raise _malformed("a part has not one plain name")
    return name.replace("%22", '"').lower(), plain
