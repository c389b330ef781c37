"""Header fields, as bytes on the wire and as text for stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple, Self

from gateway.protocol.header_policy import KEY, UP, policy_of

__all__ = ("TOKEN", "Field", "Headers")

# A token (RFC 9110, 5.6.2), as the text of a regular expression: the names of fields, parameters and protocols.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 -- no password
_TOKEN = re.compile(TOKEN)

# What a header may never hold: it would end the line, or the string (RFC 9110, 5.5).
_UNSAFE = re.compile(r"[\r\n\0]")


class Field(NamedTuple):
    """One field: its name in lower case, its value, its line as it goes on the wire, and the bits of `policy_of.py`.

    What every hop asks of a field is worked out once, here; fields of the wire are kept and found again by
    their line (see `http1.py`).
    """

    name: bytes
    value: bytes
    line: bytes
    bits: int


def make_field(name: bytes, value: bytes) -> Field:
    """Return the field of a name, in any case, and a value."""
    lowered, bits = _of_name(name)
    return _new(Field, (lowered, value, b"%b: %b" % (name, value), bits))


# A named tuple's own way to make one costs twice as much.
_new = tuple.__new__


@lru_cache(maxsize=1024)
def _of_name(name: bytes) -> tuple[bytes, int]:
    lowered = name.lower()
    return lowered, policy_of(lowered)


@lru_cache(maxsize=1024)
def _wanted(name: str) -> bytes:
    return name.lower().encode("latin-1")


@lru_cache(maxsize=1024)
def _sound_name(name: str) -> tuple[bytes, bytes, int]:
    if not name or _UNSAFE.search(name):
        raise ValueError(f"header {name!r} has a line break or a NUL in it, or no name")
    raw = name.encode("latin-1")
    return (raw, *_of_name(raw))


def _sound(name: str, value: str) -> Field:
    """Return the field of a name and a value that a stage made. Raises ValueError."""
    raw, lowered, bits = _sound_name(name)
    if not value.isprintable() and _UNSAFE.search(value):
        raise ValueError(f"header {name!r} has a line break or a NUL in its value")
    encoded = value.encode("latin-1")
    return _new(Field, (lowered, encoded, b"%b: %b" % (raw, encoded), bits))


class Headers:
    """Header fields as a list, in order, found without regard to case.

    `fields` holds the bytes as they stand on the wire; a change makes another list, so that whoever has this one keeps
    it as it is. Text is latin-1, as HTTP has it.
    """

    __slots__ = ("_keys", "_up", "fields")

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] | Mapping[str, str] = ()) -> None:
        self._up: bytes | None = None
        self._keys: list[Field] | None = None
        if isinstance(pairs, Mapping):
            self.fields = [_sound(name, value) for name, value in pairs.items()]
        else:
            self.fields = [make_field(name, value) for name, value in pairs]

    @classmethod
    def of(cls, fields: list[Field], up: bytes | None = None, keys: list[Field] | None = None) -> Self:
        """Return headers that hold this very list; `up` and `keys` are what those return, if that is known."""
        headers = cls.__new__(cls)
        headers.fields = fields
        headers._up = up
        headers._keys = keys
        return headers

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether a text is valid as the name of a header."""
        return _TOKEN.fullmatch(text) is not None

    def presenting(self) -> list[Field]:
        """Return the fields that present a key."""
        if self._keys is None:
            self._keys = [field for field in self.fields if field[3] & KEY]
        return self._keys

    def up(self) -> bytes:
        """Return the lines of the fields that go on to Azure."""
        if self._up is None:
            self._up = b"\r\n".join([field[2] for field in self.fields if field[3] & UP])
        return self._up

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the first value of `name`, or `default`."""
        wanted = _wanted(name)
        for field in self.fields:
            if field[0] == wanted:
                return field[1].decode("latin-1")
        return default

    def getall(self, name: str) -> list[str]:
        """Return every value of `name`, in order."""
        wanted = _wanted(name)
        return [field[1].decode("latin-1") for field in self.fields if field[0] == wanted]

    def set(self, name: str, value: str) -> None:
        """Give `name` this one value. Raises ValueError where a value would break out of its line."""
        field = _sound(name, value)
        lowered = field[0]
        for each in self.fields:
            if each[0] == lowered:
                self.fields = [*[other for other in self.fields if other[0] != lowered], field]
                break
        else:
            self.fields = [*self.fields, field]
        self._up = self._keys = None

    def update(self, values: Mapping[str, str]) -> None:
        """Give each of these names its one value; one pass over the fields. Raises ValueError as `set` does."""
        made = [_sound(name, value) for name, value in values.items()]
        names = [name for name, _, _, _ in made]
        self.fields = [each for each in self.fields if each[0] not in names] + made
        self._up = self._keys = None

    def add(self, name: str, value: str) -> None:
        """Add a field, beside others of its name. Raises ValueError as `set` does."""
        self.fields = [*self.fields, _sound(name, value)]
        self._up = self._keys = None

    def remove(self, name: str) -> None:
        """Remove every field of this name; do nothing if there is none."""
        wanted = _wanted(name)
        for field in self.fields:
            if field[0] == wanted:
                self.fields = [each for each in self.fields if each[0] != wanted]
                self._up = self._keys = None
                return

    def copy(self) -> Headers:
        """Return a copy that can be changed apart."""
        return Headers.of(self.fields, self._up, self._keys)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for name, value, line, _ in self.fields:
            yield line[: len(name)].decode("latin-1"), value.decode("latin-1")

    def __len__(self) -> int:
        return len(self.fields)

    def __repr__(self) -> str:
        # Names only: values may be keys.
        return f"<Headers {', '.join(name for name, _ in self)}>"
