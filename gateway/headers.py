"""Header fields, as bytes on the wire and as text for stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

__all__ = ("Headers",)

# What a header value may never hold: it would end the line, or the string (RFC 9110, 5.5).
UNSAFE = re.compile(rb"[\r\n\0]")


class Headers:
    """Header fields as a list of (name, value) pairs, in order, found without regard to case.

    `raw` holds the bytes as they stand on the wire. Text is latin-1, as HTTP has it.
    """

    __slots__ = ("raw",)

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] | Mapping[str, str] = ()) -> None:
        self.raw: list[tuple[bytes, bytes]] = []
        if isinstance(pairs, Mapping):
            for name, value in pairs.items():
                self.add(name, value)
        else:
            self.raw.extend(pairs)

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the first value of `name`, or `default`."""
        wanted = name.lower().encode("latin-1")
        for key, value in self.raw:
            if key.lower() == wanted:
                return value.decode("latin-1")
        return default

    def getall(self, name: str) -> list[str]:
        """Return every value of `name`, in order."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for key, value in self.raw if key.lower() == wanted]

    def set(self, name: str, value: str) -> None:
        """Give `name` this one value. Raises ValueError where a value would break out of its line."""
        self.remove(name)
        self.add(name, value)

    def add(self, name: str, value: str) -> None:
        """Add a field, beside others of its name. Raises ValueError as `set` does."""
        raw_name, raw_value = name.encode("latin-1"), value.encode("latin-1")
        if UNSAFE.search(raw_name) or UNSAFE.search(raw_value) or not raw_name:
            raise ValueError(f"header {name!r} has a line break or a NUL in it")
        self.raw.append((raw_name, raw_value))

    def remove(self, name: str) -> None:
        """Remove every field of this name; do nothing if there is none."""
        wanted = name.lower().encode("latin-1")
        self.raw = [pair for pair in self.raw if pair[0].lower() != wanted]

    def copy(self) -> Headers:
        """Return a copy that can be changed apart."""
        return Headers(self.raw)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for key, value in self.raw:
            yield key.decode("latin-1"), value.decode("latin-1")

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        # Names only: values may be keys.
        return f"<Headers {', '.join(name for name, _ in self)}>"
