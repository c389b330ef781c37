"""Header fields: bytes in the message, text for stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple, Self

from gateway.protocol.header_policy import CREDENTIAL, TO_AZURE, policy_of

__all__ = ("TOKEN", "Field", "Headers")

# A token (RFC 9110, 5.6.2), as the text of a regular expression: the names of fields, parameters and protocols.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 -- no password
_TOKEN = re.compile(TOKEN)

# Characters that no header may hold: they would end the line or the string (RFC 9110, 5.5).
_UNSAFE = re.compile(r"[\r\n\0]")


class Field(NamedTuple):
    """One field: its name in lower case, its value, its line as sent, and its flags (see `header_policy.py`).

    The flags are computed once, when the field is made; parsed fields are cached by their line (see `http1_fields.py`).
    """

    name: bytes
    value: bytes
    line: bytes
    flags: int


def make_field(name: bytes, value: bytes) -> Field:
    """Return the field of a name, in any case, and a value."""
    lowered, flags = _name_and_flags(name)
    return _new(Field, (lowered, value, b"%b: %b" % (name, value), flags))


# Half the cost of calling the named tuple.
_new = tuple.__new__


@lru_cache(maxsize=1024)
def _name_and_flags(name: bytes) -> tuple[bytes, int]:
    lowered = name.lower()
    return lowered, policy_of(lowered)


@lru_cache(maxsize=1024)
def _encoded_name(name: str) -> bytes:
    return name.lower().encode("latin-1")


@lru_cache(maxsize=1024)
def _checked_name(name: str) -> tuple[bytes, bytes, int]:
    if not name or _UNSAFE.search(name):
        raise ValueError(f"header {name!r} has a line break or a NUL in its name, or no name")
    raw = name.encode("latin-1")
    return (raw, *_name_and_flags(raw))


def _checked_field(name: str, value: str) -> Field:
    """Return the field of a name and a value that a stage made. Raises ValueError."""
    raw, lowered, flags = _checked_name(name)
    if not value.isprintable() and _UNSAFE.search(value):
        raise ValueError(f"header {name!r} has a line break or a NUL in its value")
    encoded = value.encode("latin-1")
    return _new(Field, (lowered, encoded, b"%b: %b" % (raw, encoded), flags))


class Headers:
    """Header fields as a list, in order. Names are case-insensitive.

    `fields` holds the bytes as received. A change makes a new list, so a holder of the old list keeps it unchanged.
    Text is latin-1, as HTTP defines it.
    """

    __slots__ = ("_credential_fields", "_lines_to_azure", "fields")

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] | Mapping[str, str] = ()) -> None:
        self._lines_to_azure: bytes | None = None
        self._credential_fields: list[Field] | None = None
        if isinstance(pairs, Mapping):
            self.fields = [_checked_field(name, value) for name, value in pairs.items()]
        else:
            self.fields = [make_field(name, value) for name, value in pairs]

    @classmethod
    def of(
        cls, fields: list[Field], lines_to_azure: bytes | None = None, credential_fields: list[Field] | None = None
    ) -> Self:
        """Return headers that use `fields` itself, without a copy.

        `lines_to_azure` and `credential_fields` are the results of the methods of these names, if already computed.
        """
        headers = cls.__new__(cls)
        headers.fields = fields
        headers._lines_to_azure = lines_to_azure
        headers._credential_fields = credential_fields
        return headers

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether a text is valid as the name of a header."""
        return _TOKEN.fullmatch(text) is not None

    def credential_fields(self) -> list[Field]:
        """Return the fields in which a client presents its key."""
        if self._credential_fields is None:
            self._credential_fields = [field for field in self.fields if field[3] & CREDENTIAL]
        return self._credential_fields

    def lines_to_azure(self) -> bytes:
        """Return the lines of the fields that go on to Azure."""
        if self._lines_to_azure is None:
            self._lines_to_azure = b"\r\n".join([field[2] for field in self.fields if field[3] & TO_AZURE])
        return self._lines_to_azure

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the first value of `name`, or `default`."""
        wanted = _encoded_name(name)
        for field in self.fields:
            if field[0] == wanted:
                return field[1].decode("latin-1")
        return default

    def getall(self, name: str) -> list[str]:
        """Return every value of `name`, in order."""
        wanted = _encoded_name(name)
        return [field[1].decode("latin-1") for field in self.fields if field[0] == wanted]

    def set(self, name: str, value: str) -> None:
        """Replace all values of `name` with this one. Raises ValueError if the value has a line break."""
        field = _checked_field(name, value)
        lowered = field[0]
        for each in self.fields:
            if each[0] == lowered:
                self.fields = [*[other for other in self.fields if other[0] != lowered], field]
                break
        else:
            self.fields = [*self.fields, field]
        self._lines_to_azure = self._credential_fields = None

    def update(self, values: Mapping[str, str]) -> None:
        """Set several fields in one pass. Raises ValueError as `set` does."""
        made = [_checked_field(name, value) for name, value in values.items()]
        names = [name for name, _, _, _ in made]
        self.fields = [each for each in self.fields if each[0] not in names] + made
        self._lines_to_azure = self._credential_fields = None

    def add(self, name: str, value: str) -> None:
        """Add a field; keep others of its name. Raises ValueError as `set` does."""
        self.fields = [*self.fields, _checked_field(name, value)]
        self._lines_to_azure = self._credential_fields = None

    def remove(self, name: str) -> None:
        """Remove every field of this name; do nothing if there is none."""
        wanted = _encoded_name(name)
        for field in self.fields:
            if field[0] == wanted:
                self.fields = [each for each in self.fields if each[0] != wanted]
                self._lines_to_azure = self._credential_fields = None
                return

    def copy(self) -> Headers:
        """Return an independent copy."""
        return Headers.of(self.fields, self._lines_to_azure, self._credential_fields)

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
