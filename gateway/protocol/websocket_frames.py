"""WebSocket frames as bytes, with no I/O (RFC 6455, 5).

Rule 1: input that the RFC forbids is refused before a byte of it is passed on: reserved bits (no extension is ever
negotiated), unknown opcodes, a missing or an unexpected mask, lengths that are not encoded as short as possible,
fragments out of order, long or fragmented control frames, close codes that must not be sent.
Rule 2: memory is bounded. A data frame that no filter reads passes through, and only an incomplete head is kept. The
payload of one that is kept is unmasked as it arrives, so the length in a head reserves no memory.
Rule 3: one call handles a bounded number of bytes and frames, and the cost of a byte does not depend on the cuts.
Rule 4: a message that is nearly all framing is refused.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from gateway.fair_scheduler import MOST_UNITS, STEP

__all__ = (
    "BINARY",
    "CLOSE",
    "PING",
    "PONG",
    "TEXT",
    "Control",
    "FrameError",
    "FrameParser",
    "FrameWriter",
    "Message",
    "PassedFrames",
    "encode_close_frame",
    "encode_frame",
)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))

# Close codes that a frame may have: those of RFC 6455 (7.4.1) and the registered ones; 3000 to 4999 are allowed, too.
_CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))
# Maximum length of the reason in a close frame, in bytes.
_MAX_REASON = 123
# Limit on the heads of one message's fragments, in bytes: an allowance, and a share for each byte of payload. Empty
# fragments of a client are refused after 682, those of one byte after 2,048, those of two bytes never.
_FRAMING_ALLOWANCE = 4096
_FRAMING_SHARE = 4


class FrameError(Exception):
    """The bytes are not a valid frame. `code` is the close code for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class PassedFrames(NamedTuple):
    """Bytes of data frames, to be passed on unchanged; `messages` is the number of messages that end in them."""

    data: bytes
    messages: int


class Control(NamedTuple):
    """A ping, a pong or a close: its payload, and the whole frame as received."""

    opcode: int
    payload: bytes
    raw: bytes

    @property
    def code(self) -> int | None:
        """The close code; None if the frame has none."""
        return int.from_bytes(self.payload[:2]) if self.opcode == CLOSE and self.payload else None


class Message(NamedTuple):
    """A whole message, its fragments joined, unmasked."""

    opcode: int
    payload: bytes


class FrameParser:
    """Parses the frames of one side. A client's frames are `masked`, a server's are not.

    With `whole`, messages are kept until they are complete; without it, data frames pass as they arrive, and only
    control frames are kept. `most` is the maximum size of a message, in bytes.
    """

    __slots__ = (
        "_data",
        "_final",
        "_framing_left",
        "_in_message",
        "_key",
        "_left",
        "_masked",
        "_message",
        "_most",
        "_opcode",
        "_position",
        "_size",
        "_whole",
        "closed",
        "error",
        "unread",
    )

    def __init__(self, *, masked: bool, most: int, whole: bool = False) -> None:
        self._masked = masked
        self._most = most
        self._whole = whole
        self._data = b""  # unparsed bytes, from `_position` on
        self._position = 0
        self._left = 0  # bytes of the current data frame's payload still to come
        self._key = b""  # its mask, rotated to the next byte; only with `whole`
        self._final = False  # it is the last fragment of its message; only with `whole`
        self._in_message = False  # the last fragment of the current message has not begun
        self._opcode = TEXT  # of the current message
        self._message = bytearray()  # the received payload of it; only with `whole`
        self._size = 0  # of the current message, by its heads
        self._framing_left = 0  # bytes that the heads of its fragments may still have
        self.closed = False
        """Whether the side has sent a close frame, or bytes that are not a frame."""
        self.error: FrameError | None = None
        """Why the last bytes were refused; the frames before them have been returned."""
        self.unread = False
        """Whether the last call left bytes that can be parsed."""

    @property
    def between(self) -> bool:
        """Whether the passed bytes end with a frame: a control frame may be inserted here."""
        return self._whole or not self._left

    @property
    def between_messages(self) -> bool:
        """Whether the passed bytes end with a message: a message may be inserted here."""
        return self._whole or not (self._left or self._in_message)

    @property
    def kept(self) -> int:
        """Number of bytes kept of an incomplete message."""
        return len(self._message)

    def keep(self, data: bytes) -> None:
        """Keep bytes for a later call."""
        if not self.closed:
            self._data = self._data[self._position :] + data
            self._position = 0
            self.unread = True

    def drop(self) -> None:
        """Discard everything, and take nothing more."""
        self._data, self._position, self._message = b"", 0, bytearray()
        self.unread, self.closed = False, True

    def feed(
        self, data: bytes = b"", frames: int = MOST_UNITS, size: int = STEP
    ) -> list[PassedFrames | Control | Message]:
        """Take bytes; return the next frames in order: at most `frames` frames, from at most `size` bytes.

        If bytes are not a frame, `error` is set. If `unread` is set, another call returns more.
        """
        out: list[PassedFrames | Control | Message] = []
        position = 0
        if self._data:
            if data:
                self.keep(data)
            data, position = self._data, self._position
            self._data, self._position = b"", 0
        start, messages = position, 0  # `start`: of the bytes that are passed on together
        available = len(data)
        end = min(available, position + size)
        whole = self._whole
        while position < end and not self.closed:
            if self._left:
                step = min(self._left, end - position)
                if whole:
                    self._append(data[position : position + step])
                self._left -= step
                position += step
                if whole:
                    start = position
                    if self._final and not self._left:
                        out.append(self._take_message())
                continue
            if not frames:
                break
            try:
                found = _parse_head(data, position, self._masked)
                if found is None:
                    end = 0  # the head is incomplete
                    break
                final, opcode, head, length = found
                after = position + head + length
                if opcode < CLOSE:
                    frames -= 1
                    self._begin(final, opcode, head, length)
                    position += head
                    if not whole:
                        messages += final
                        self._left = length
                        continue
                    key = data[position - 4 : position] if self._masked else b""
                    if opcode == CONTINUATION or not final or after > available or length > size:
                        self._key, self._left, self._final = key, length, final
                        if final and not length:
                            out.append(self._take_message())
                    else:
                        payload = data[position:after]
                        out.append(Message(opcode, mask(payload, key) if key else payload))
                        position = after
                    start = position
                    continue
                if not final or length > 125:
                    raise FrameError(1002, "a control frame is fragmented or too long")
                if after > available:
                    end = 0
                    break
                frames -= 1
                if position > start:
                    out.append(PassedFrames(data[start:position], messages))
                    messages = 0
                start = position
                payload = data[after - length : after]
                if self._masked:
                    payload = mask(payload, data[after - length - 4 : after - length])
                out.append(self._control(opcode, payload, data[position:after]))
                position = start = after
            except FrameError as exc:
                self.error, self.closed = exc, True
        if position > start:
            out.append(PassedFrames(data[start:position], messages))
        self.unread = False
        if position < available and not self.closed:
            self.unread = end > 0
            self._data, self._position = data, position
        return out

    def _begin(self, final: bool, opcode: int, head: int, length: int) -> None:
        """Note the head of a data frame. Raises FrameError."""
        if (opcode == CONTINUATION) != self._in_message:
            raise FrameError(1002, "the fragments of a message are out of order")
        if self._size + length > self._most:
            raise FrameError(1009, f"a message is larger than {self._most} bytes")
        if opcode:
            self._opcode, self._framing_left = opcode, _FRAMING_ALLOWANCE
        if not (final and opcode):
            self._framing_left += _FRAMING_SHARE * length - head
            if self._framing_left < 0:
                raise FrameError(1008, "a message is nearly all framing; send it in fewer fragments")
        self._size = 0 if final else self._size + length
        self._in_message = not final

    def _append(self, piece: bytes) -> None:
        """Keep a piece of payload, unmasked."""
        if key := self._key:
            piece = mask(piece, key)
            if shift := len(piece) % 4:
                self._key = key[shift:] + key[:shift]
        self._message += piece

    def _take_message(self) -> Message:
        """Return the complete message."""
        message, self._message = self._message, bytearray()
        self._final = False
        return Message(self._opcode, bytes(message))

    def _control(self, opcode: int, payload: bytes, raw: bytes) -> Control:
        control = Control(opcode, payload, raw)
        if opcode == CLOSE:
            code = control.code
            if len(payload) == 1 or (code is not None and code not in _CLOSE_CODES and not 3000 <= code <= 4999):
                raise FrameError(1002, "a close frame has an invalid close code")
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                raise FrameError(1007, "the reason of a close frame is not UTF-8 text") from None
            self.closed = True
        return control


def _parse_head(data: bytes, position: int, masked: bool) -> tuple[bool, int, int, int] | None:
    """Parse a frame's head: (final, opcode, head length, payload length); None if it is incomplete."""
    if len(data) - position < 2:
        return None
    first, second = data[position], data[position + 1]
    opcode = first & 0x0F
    if first & 0x70 or opcode not in _OPCODES:
        raise FrameError(1002, "a frame has reserved bits or an unknown opcode")
    if bool(second & 0x80) is not masked:
        raise FrameError(1002, "a client's frames must be masked, a server's must not")
    length, head = second & 0x7F, 2
    if length >= 126:
        more = 2 if length == 126 else 8
        if len(data) - position < 2 + more:
            return None
        length = int.from_bytes(data[position + 2 : position + 2 + more])
        head += more
        if length < (126 if more == 2 else 65536) or length >> 63:
            raise FrameError(1002, "the length of a frame is not encoded as short as possible")
    if masked:
        head += 4
        if len(data) - position < head:
            return None
    return bool(first & 0x80), opcode, head, length


def mask(payload: bytes, key: bytes) -> bytes:
    """Mask or unmask a payload (RFC 6455, 5.3)."""
    size = len(payload)
    keys = key * (size // 4 + 1)
    return (int.from_bytes(payload, "little") ^ int.from_bytes(keys[:size], "little")).to_bytes(size, "little")


def encode_frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """Return a whole frame; a client's must be `masked`."""
    if not masked:
        return _encode_head(opcode, len(payload), 0) + payload
    key = os.urandom(4)
    return _encode_head(opcode, len(payload), 0x80) + key + mask(payload, key)


def _encode_head(opcode: int, size: int, bit: int) -> bytes:
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, bit | size)
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, bit | 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, bit | 127, size)


class FrameWriter:
    """Encodes a frame in pieces, so that a large payload is neither masked nor written at once."""

    __slots__ = ("_head", "_key", "_payload", "_position")

    def __init__(self, opcode: int, payload: bytes, *, masked: bool) -> None:
        self._payload = payload
        self._position = 0
        self._key = os.urandom(4) if masked else b""
        self._head = _encode_head(opcode, len(payload), 0x80 if masked else 0) + self._key

    @property
    def size(self) -> int:
        """Size of the payload in bytes: it is kept until the last piece."""
        return len(self._payload)

    @property
    def done(self) -> bool:
        """Whether the last piece has been returned."""
        return self._position >= len(self._payload)

    def piece(self, size: int) -> bytes:
        """Return the next piece, with up to `size` bytes of payload. `size` must be a multiple of four."""
        head, self._head = self._head, b""
        piece = self._payload[self._position : self._position + size]
        self._position += size
        return head + (mask(piece, self._key) if self._key else piece)


def encode_close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """Return a close frame; a long reason is truncated."""
    text = reason.encode()[:_MAX_REASON].decode("utf-8", "ignore").encode()
    return encode_frame(CLOSE, struct.pack("!H", code) + text, masked=masked)
