"""WebSocket frames as bytes, with no I/O (RFC 6455, 5).

Rule 1: what the RFC forbids is refused before a byte of it goes on: reserved bits (no extension is ever agreed on),
unknown opcodes, a mask where there must be none or none where there must be one, lengths that are not as short as they
can be, fragments out of order, long or fragmented control frames, close codes that must not be sent.
Rule 2: memory is bounded: of a data frame that nobody reads, nothing is kept but its head.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

__all__ = (
    "BINARY",
    "CLOSE",
    "PING",
    "PONG",
    "TEXT",
    "BadFrame",
    "Control",
    "Frames",
    "Message",
    "Passed",
    "close_frame",
    "frame",
)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))

# Codes that may stand in a frame: those of RFC 6455 (7.4.1), the registered ones, and those for libraries and programs.
_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))
_MAX_REASON = 123


class BadFrame(Exception):
    """What came is no frame that may come here. `code` is the close code that says so."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Passed(NamedTuple):
    """Bytes of data frames that are passed on as they came; `messages` of them end here."""

    data: bytes
    messages: int


class Control(NamedTuple):
    """A ping, a pong or a close: its payload, and the whole frame as it came."""

    opcode: int
    payload: bytes
    raw: bytes

    @property
    def code(self) -> int | None:
        """The close code; None where the frame has none."""
        return int.from_bytes(self.payload[:2]) if self.opcode == CLOSE and self.payload else None


class Message(NamedTuple):
    """A whole message, its fragments joined, unmasked."""

    opcode: int
    payload: bytes


class Frames:
    """Reads what one side sends. `masked` says that it is the client, whose frames are masked.

    With `whole`, messages are kept until they are whole; else data frames pass as they come, and only control frames
    are kept.
    """

    __slots__ = (
        "_in_message",
        "_kept",
        "_left",
        "_masked",
        "_message",
        "_missing",
        "_most",
        "_opcode",
        "_size",
        "_whole",
        "closed",
        "error",
    )

    def __init__(self, *, masked: bool, most: int, whole: bool = False) -> None:
        self._masked = masked
        self._most = most
        self._whole = whole
        self._kept: list[bytes] = []  # of a frame that is kept until it, or its head, is whole
        self._missing = 0  # how many bytes at least it still lacks
        self._left = 0  # bytes to come of a data frame that is passed on
        self._in_message = False  # its last fragment is still to come
        self._opcode = TEXT  # of the message whose fragments come
        self._message = bytearray()  # what has come of it
        self._size = 0  # of the message
        self.closed = False
        """It has said that nothing more comes, or what came was no frame."""
        self.error: BadFrame | None = None
        """What was wrong with what came last; what was right before it was returned."""

    @property
    def between(self) -> bool:
        """Whether nothing of a frame was passed on that is not whole: a control frame may be put here."""
        return not self._left

    @property
    def between_messages(self) -> bool:
        """Whether a message may be put here, too: none was passed on whose last fragment is still to come."""
        return self._whole or not (self._left or self._in_message)

    def feed(self, data: bytes) -> list[Passed | Control | Message]:
        """Take bytes; returns what they are, in order. Where some are no frame, `error` says so from then on."""
        out: list[Passed | Control | Message] = []
        if self._kept:
            self._kept.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return out
            data = b"".join(self._kept)
            self._kept.clear()
        self._missing = 1
        place = start = messages = 0  # `start`: where the bytes begin that are passed on together
        size = len(data)
        while place < size and not self.closed:
            if self._left:
                step = min(self._left, size - place)
                self._left -= step
                place += step
                continue
            try:
                found = _read_head(data, place, self._masked)
                if found is None:
                    break
                final, opcode, head, length = found
                if opcode < CLOSE and not self._whole:
                    messages += self._begin(final, opcode, length)
                    place += head
                    self._left = length
                    continue
                if opcode < CLOSE:
                    self._check_size(opcode, length)
                elif not final or length > 125:
                    raise BadFrame(1002, "a control frame is fragmented or too long")
                end = place + head + length
                if end > size:
                    self._missing = end - size
                    break
                if place > start:
                    out.append(Passed(data[start:place], messages))
                    start, messages = place, 0
                payload = data[end - length : end]
                if self._masked:
                    payload = mask(payload, data[end - length - 4 : end - length])
                if opcode >= CLOSE:
                    out.append(self._control(opcode, payload, data[place:end]))
                elif (message := self._add(final, opcode, payload)) is not None:
                    out.append(message)
                place = start = end
            except BadFrame as exc:
                self.error, self.closed = exc, True
        if place > start:
            out.append(Passed(data[start:place], messages))
        if place < size and not self.closed:
            self._kept.append(data[place:])
        return out

    def _begin(self, final: bool, opcode: int, length: int) -> int:
        """Note a data frame; returns 1 if it ends a message."""
        self._check_size(opcode, length)
        self._size = 0 if final else self._size + length
        self._in_message = not final
        return int(final)

    def _check_size(self, opcode: int, length: int) -> None:
        if (opcode == CONTINUATION) != self._in_message:
            raise BadFrame(1002, "the fragments of a message are out of order")
        if self._size + length > self._most:
            raise BadFrame(1009, f"a message is larger than {self._most} bytes")

    def _add(self, final: bool, opcode: int, payload: bytes) -> Message | None:
        """Take a fragment; returns the message that it ends."""
        if opcode != CONTINUATION:
            self._opcode = opcode
        if final and not self._in_message:
            return Message(opcode, payload)
        self._message += payload
        self._size += len(payload)
        self._in_message = not final
        if not final:
            return None
        whole = bytes(self._message)
        self._message.clear()
        self._size = 0
        return Message(self._opcode, whole)

    def _control(self, opcode: int, payload: bytes, raw: bytes) -> Control:
        control = Control(opcode, payload, raw)
        if opcode == CLOSE:
            code = control.code
            if len(payload) == 1 or (code is not None and code not in _CODES and not 3000 <= code <= 4999):
                raise BadFrame(1002, "a close frame has a code that must not be sent")
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                raise BadFrame(1007, "the reason of a close frame is no text") from None
            self.closed = True
        return control


def _read_head(data: bytes, place: int, masked: bool) -> tuple[bool, int, int, int] | None:
    """Read a frame's head: (final, opcode, the head's length, the payload's); None where it is not whole."""
    if len(data) - place < 2:
        return None
    first, second = data[place], data[place + 1]
    opcode = first & 0x0F
    if first & 0x70 or opcode not in _OPCODES:
        raise BadFrame(1002, "a frame has reserved bits or an unknown opcode")
    if bool(second & 0x80) is not masked:
        raise BadFrame(1002, "a client's frames are masked, a server's are not")
    length, head = second & 0x7F, 2
    if length >= 126:
        more = 2 if length == 126 else 8
        if len(data) - place < 2 + more:
            return None
        length = int.from_bytes(data[place + 2 : place + 2 + more])
        head += more
        if length < (126 if more == 2 else 65536) or length >> 63:
            raise BadFrame(1002, "a frame's length is not as short as it can be")
    if masked:
        head += 4
        if len(data) - place < head:
            return None
    return bool(first & 0x80), opcode, head, length


def mask(payload: bytes, key: bytes) -> bytes:
    """Mask a payload, or undo it (RFC 6455, 5.3)."""
    size = len(payload)
    keys = key * (size // 4 + 1)
    return (int.from_bytes(payload, "little") ^ int.from_bytes(keys[:size], "little")).to_bytes(size, "little")


def frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """Return a whole frame; `masked` as a client's must be."""
    size, bit = len(payload), 0x80 if masked else 0
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, bit | 127, size)
    if not masked:
        return head + payload
    key = os.urandom(4)
    return head + key + mask(payload, key)


def close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """Return a close frame; what is too long of the reason is left out."""
    text = reason.encode()[:_MAX_REASON].decode("utf-8", "ignore").encode()
    return frame(CLOSE, struct.pack("!H", code) + text, masked=masked)
