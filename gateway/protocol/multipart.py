"""Multipart forms (RFC 7578), parsed as they arrive and without I/O: where each field of interest begins and ends.

Nothing is changed or decoded: the result is offsets, so that everything else can be passed on byte for byte.

Rule: input that two readers could read differently is refused, because Azure's reader may be the other one: a boundary
or a name that is given twice, a folded or malformed line, a delimiter that only some readers would recognize, anything
after the end. OpenAI's SDKs, browsers and curl send none of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.errors import ApiError
from gateway.protocol.headers import TOKEN
from gateway.protocol.media_type import media_type

__all__ = ("FormField", "FormReader", "boundary_of")

# Maximum size of a value that is kept, and of the head of a part, in bytes.
_MAX_VALUE = 64 * 1024
_MAX_HEAD = 16 * 1024
# Maximum number of parts, and of lines in a part's head. No operation has fifty of one or five of the other. To read
# this many takes less than 5 ms in all, so a form cannot block the event loop.
_MAX_PARTS = 256
_MAX_LINES = 16
# A parameter. A quoted value has no escaped quotes, because readers differ in the meaning of a backslash there.
_PARAMETER = re.compile(rf'[ \t]*;[ \t]*({TOKEN})=(?:({TOKEN})[ \t]*(?=;|$)|"([^"\r\n]*)")')
# File names and boundaries often lack the quotes that they need; no reader can find a parameter in them.
_UNQUOTED = re.compile(r'[ \t]*;[ \t]*(filename\*?|boundary)=([^;"\r\n]+)(?=;|$)', re.IGNORECASE)
# Nor can a reader find one in a file name at the end, whatever its quotes and backslashes mean, if it has no semicolon.
_LAST_FILENAME = re.compile(r'[ \t]*;[ \t]*(filename)="([^;\r\n]*)"[ \t]*', re.IGNORECASE)
_KIND = re.compile(rf"[ \t]*({TOKEN}(?:/{TOKEN})?)")
_HEADER_LINE = re.compile(rf"({TOKEN}):(.*)", re.DOTALL)
_HALF_LINE_BREAK = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the form is malformed: {why}", code="malformed_form")


def _parse_parameters(text: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Parse `kind; name=value; ...`; return the kind in lower case, and the parameters. None if it is malformed."""
    found = _KIND.match(text)
    if found is None:
        return None
    kind, offset = found.group(1).lower(), found.end()
    parameters = []
    while offset < len(text):
        if (found := _LAST_FILENAME.fullmatch(text, offset) or _UNQUOTED.match(text, offset)) is not None:
            name, value = found.groups()
        elif (found := _PARAMETER.match(text, offset)) is not None:
            name, token, quoted = found.groups()
            value = token if token is not None else quoted
            if value.endswith("\\"):
                return None
        else:
            break
        parameters.append((name.lower(), value.strip(" \t")))
        offset = found.end()
    return (kind, parameters) if not text[offset:].strip(" \t;") else None


def boundary_of(content_types: list[str]) -> bytes | None:
    """Return the boundary of a body with these Content-Type headers; None if it is not `multipart/form-data`.

    Raises ApiError 400 if it is, and its boundary is missing or ambiguous.
    """
    if "multipart/form-data" not in map(media_type, content_types):
        return None
    parsed = _parse_parameters(content_types[0]) if len(content_types) == 1 else None
    if parsed is None:
        raise _malformed("its Content-Type is not one well-formed multipart/form-data")
    boundaries = [value for name, value in parsed[1] if name.partition("*")[0] == "boundary"]
    if len(boundaries) != 1 or "boundary" not in dict(parsed[1]) or not _BOUNDARY.fullmatch(boundaries[0]):
        raise _malformed("its Content-Type has no valid boundary")
    return boundaries[0].encode("ascii")


@dataclass
class FormField:
    """One field of interest: its value is `body[start:end]`, its part `body[part_start:part_end]`.

    `end` and `part_end` are -1 until the field has ended; `value` is kept only if `keep_value` is set.
    """

    name: str
    part_start: int
    start: int
    end: int = -1
    part_end: int = -1
    keep_value: bool = True
    value: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Whether it has ended."""
        return self.end >= 0

    @property
    def text(self) -> str:
        """Its value as text."""
        return self.value.decode("utf-8", "replace")


class FormReader:
    """Finds fields in a form, by their case-insensitive names.

    `wanted` has the names of interest, and whether to keep their values. `fields` are the fields found so far; `first`
    is the offset of the first part; `done` is set when the form has ended. A form may have each field of interest once,
    and of the fields in `alike` only one.
    """

    def __init__(self, boundary: bytes, wanted: Mapping[str, bool], alike: frozenset[str] = frozenset()) -> None:
        self.fields: dict[str, FormField] = {}
        self.first = -1
        self.done = False
        self.boundary = boundary
        self._dashes = b"--" + boundary
        self._wanted = wanted
        self._alike = alike
        # The first boundary has no line break before it: insert one.
        self._data = b"\r\n"
        self._data_offset = -2  # of the first byte of `_data` in the body
        self._position = 0  # in `_data`: everything before it has been parsed
        self._at_head = False  # a part's head is next
        self._current: FormField | None = None
        self._part_start = 0
        self._parts = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises ApiError 400 if they are malformed."""
        self._new = max(0, len(self._data) - self._position - 1)
        self._data = self._data[self._position :] + data
        self._data_offset += self._position
        self._position = 0
        while self._read_end() if self.done else self._read_head() if self._at_head else self._read_value():
            pass

    def end(self) -> None:
        """Note the body's end. Raises ApiError 400 if the form has not ended."""
        if not self.done:
            raise _malformed("it ends before its last boundary")

    def _read_value(self) -> bool:
        """Advance to the next delimiter; return whether there is one."""
        data, start = self._data, self._position
        # Only a delimiter that follows a line break counts. A value may be full of others: they cost no step each.
        search_from = max(0, start - 1)
        line_feed = data.find(b"\n" + self._dashes, search_from)
        found = line_feed + 1 if line_feed >= 0 else -1
        if line_feed >= 0 and (line_feed <= start or data[line_feed - 1 : line_feed] != b"\r"):
            raise _malformed("a boundary does not follow a line break of its own")
        if data.find(b"\r" + self._dashes, search_from, line_feed if line_feed >= 0 else len(data)) >= 0:
            raise _malformed("a boundary does not follow a line break of its own")
        if found < 0:
            # The end of the data may be the beginning of a delimiter, with the line break before it.
            self._advance(max(start, len(data) - len(self._dashes) - 1))
            return False
        self._advance(found - 2)
        if self._current is not None:
            self._current.end = self._data_offset + found - 2
            self._current.part_end = self._data_offset + found
            self._current = None
        self._part_start = self._data_offset + found
        if self.first < 0:
            self.first = self._part_start
        self._position = found + len(self._dashes)
        self._at_head = True
        return True

    def _read_head(self) -> bool:
        """Parse a part's head, or the end of the form; return whether it is complete."""
        data, start = self._data, self._position
        if data.startswith(b"--", start):
            self.done = True
            self._position += 2
            return True
        end = data.find(b"\r\n\r\n", start)
        # Check before the head has ended: it might never end.
        if _HALF_LINE_BREAK.search(data, max(start, self._new), end if end >= 0 else len(data)):
            raise _malformed("the head of a part has half a line break")
        if end - start > _MAX_HEAD or (end < 0 and len(data) - start > _MAX_HEAD):
            raise _malformed(f"the head of a part is longer than {_MAX_HEAD} bytes")
        if end < 0:
            return False
        first, *lines = data[start:end].split(b"\r\n")
        if first.strip(b" \t"):
            raise _malformed("its parts are not divided by its boundary")
        if len(lines) > _MAX_LINES:
            raise _malformed(f"the head of a part has more than {_MAX_LINES} lines")
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _malformed(f"it has more than {_MAX_PARTS} parts")
        name, plain = _parse_part_head(lines)
        self._position = end + 4
        self._at_head = False
        if name in self._wanted:
            if not plain:
                raise _malformed(f"the field {name!r} is encoded, or has another charset than UTF-8")
            if name in self.fields or (name in self._alike and self._alike & self.fields.keys()):
                raise ApiError(400, f"the form has two fields {name!r}; send one", param=name, code="malformed_form")
            self._current = FormField(
                name, self._part_start, self._data_offset + self._position, keep_value=self._wanted[name]
            )
            self.fields[name] = self._current
            # The delimiter of an empty value begins with the line break right after the head.
        return True

    def _read_end(self) -> bool:
        """Check the bytes after the last boundary: only blank lines are allowed."""
        if self._data[self._position :].strip(b" \t\r\n"):
            raise _malformed("there are bytes after its last boundary")
        self._position = len(self._data)
        return False

    def _advance(self, end: int) -> None:
        """Advance to `end` within a value, and keep the value if it is wanted."""
        current = self._current
        if current is not None and current.keep_value:
            current.value += self._data[self._position : end]
            if len(current.value) > _MAX_VALUE:
                raise ApiError(
                    400, f"the form's field {current.name!r} is longer than {_MAX_VALUE} bytes", param=current.name
                )
        self._position = end


# A name that all readers read alike: not one that some decode (RFC 2047), unescape or trim.
_NAME = re.compile(r"(?!.*=\?)[!-~](?:[ -~]*[!-~])?")
_PLAIN = ("7bit", "8bit", "binary")


def _parse_part_head(lines: list[bytes]) -> tuple[str, bool]:
    """Return the name of a part's field, in lower case, and whether its value is plain text.

    Raises ApiError 400 if the name is missing or ambiguous.
    """
    names = []
    plain = True
    for line in lines:
        found = _HEADER_LINE.fullmatch(line.decode("utf-8", "replace"))
        if found is None or "\n" in found.group(2) or "\r" in found.group(2):
            raise _malformed("a line in the head of a part is not a header field")
        header, value = found.group(1).lower(), found.group(2)
        if header == "content-disposition":
            parsed = _parse_parameters(value)
            if parsed is None or parsed[0] != "form-data":
                raise _malformed("a part's Content-Disposition is not a well-formed form-data; check the file name")
            names += [(name, value) for name, value in parsed[1] if name.partition("*")[0] == "name"]
        elif header == "content-transfer-encoding":
            plain = plain and value.strip(" \t").lower() in _PLAIN
        elif header == "content-type" and "charset" in value.lower():
            parsed = _parse_parameters(value)
            charsets = [value.lower() for name, value in parsed[1] if name == "charset"] if parsed else []
            plain = plain and charsets in (["utf-8"], ["us-ascii"])
    name = names[0][1] if len(names) == 1 and names[0][0] == "name" else ""
    if not _NAME.fullmatch(name) or "\\" in name:
        raise _malformed("a part does not have exactly one plain name")
    return name.replace("%22", '"').lower(), plain
