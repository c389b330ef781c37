"""WebSocket frames as bytes, with no I/O (RFC 6455, 5).

Rule 1: what the RFC forbids is refused before a byte of it goes on: reserved bits (no extension is ever agreed on),
unknown opcodes, a mask where there must be none or none where there must be one, lengths that are not as short as they
can be, fragments out of order, long or fragmented control frames, close codes that must not be sent.
Rule 2: memory is bounded. A data frame that no filter reads passes through, and only an incomplete head is kept. The
payload of one that is kept is unmasked as it arrives, so a length that a head announces reserves nothing.
Rule 3: one call handles a bounded number of bytes and frames, and the cost of a byte is the same however it is cut.
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

# Codes that may stand in a frame: those of RFC 6455 (7.4.1), the registered ones, and those for libraries and programs.
_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))
_MAX_REASON = 123
# Limits on the heads of one message's fragments, in bytes: an allowance, and a share for each byte of payload. Empty
# fragments of a client are refused after 682, those of one byte after 2,048, those of two bytes never.
_FRAMING = 4096
_SHARE = 4


class FrameError(Exception):
    """What came is no frame that may come here. `code` is the close code that says so."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class PassedFrames(NamedTuple):
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


class FrameParser:
    """Reads the frames of one side. `masked` says that it is the client, whose frames are masked.

    With `whole`, messages are kept until they are whole; else data frames pass as they arrive, and only control frames
    are kept. `most` is the largest message in bytes.
    """

    __slots__ = (
        "_data",
        "_final",
        "_framing",
        "_in_message",
        "_key",
        "_left",
        "_masked",
        "_message",
        "_most",
        "_opcode",
        "_place",
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
        self._data = b""  # bytes that are not parsed yet, from `_place` on
        self._place = 0
        self._left = 0  # bytes to come of the current data frame's payload
        self._key = b""  # its mask, turned to the next byte; where messages are kept
        self._final = False  # it is the last fragment of its message; where messages are kept
        self._in_message = False  # the last fragment of the current message is still to come
        self._opcode = TEXT  # of the current message
        self._message = bytearray()  # the payload of it that has arrived, where messages are kept
        self._size = 0  # of the current message, as announced
        self._framing = 0  # bytes that heads of its fragments may still take
        self.closed = False
        """It has said goodbye, or sent bytes that are no frame."""
        self.error: FrameError | None = None
        """Why the last bytes were refused; the frames before them were returned."""
        self.unread = False
        """Whether there are bytes to be parsed that the last call did not get to."""

    @property
    def between(self) -> bool:
        """Whether no frame was passed on in part: a control frame may be put here."""
        return self._whole or not self._left

    @property
    def between_messages(self) -> bool:
        """Whether a message may be put here, too: none was passed on without its last fragment."""
        return self._whole or not (self._left or self._in_message)

    @property
    def kept(self) -> int:
        """How many bytes are kept of a message that is not whole."""
        return len(self._message)

    def keep(self, data: bytes) -> None:
        """Take bytes for a later call."""
        if not self.closed:
            self._data = self._data[self._place :] + data
            self._place = 0
            self.unread = True

    def drop(self) -> None:
        """Keep nothing, and take nothing more."""
        self._data, self._place, self._message = b"", 0, bytearray()
        self.unread, self.closed = False, True

    def feed(
        self, data: bytes = b"", frames: int = MOST_UNITS, size: int = STEP
    ) -> list[PassedFrames | Control | Message]:
        """Take bytes; return the next frames in order: at most so many frames, and bytes.

        Where bytes are no frame, `error` says so from then on. `unread` says that another call has more to return.
        """
        out: list[PassedFrames | Control | Message] = []
        place = 0
        if self._data:
            if data:
                self.keep(data)
            data, place = self._data, self._place
            self._data, self._place = b"", 0
        start, messages = place, 0  # `start`: where the bytes begin that are passed on together
        there = len(data)
        end = min(there, place + size)
        whole = self._whole
        while place < end and not self.closed:
            if self._left:
                step = min(self._left, end - place)
                if whole:
                    self._append(data[place : place + step])
                self._left -= step
                place += step
                if whole:
                    start = place
                    if self._final and not self._left:
                        out.append(self._joined())
                continue
            if not frames:
                break
            try:
                found = _read_head(data, place, self._masked)
                if found is None:
                    end = 0  # the head is incomplete
                    break
                final, opcode, head, length = found
                after = place + head + length
                if opcode < CLOSE:
                    frames -= 1
                    self._begin(final, opcode, head, length)
                    place += head
                    if not whole:
                        messages += final
                        self._left = length
                        continue
                    key = data[place - 4 : place] if self._masked else b""
                    if opcode == CONTINUATION or not final or after > there or length > size:
                        self._key, self._left, self._final = key, length, final
                        if final and not length:
                            out.append(self._joined())
                    else:
                        payload = data[place:after]
                        out.append(Message(opcode, mask(payload, key) if key else payload))
                        place = after
                    start = place
                    continue
                if not final or length > 125:
                    raise FrameError(1002, "a control frame is fragmented or too long")
                if after > there:
                    end = 0
                    break
                frames -= 1
                if place > start:
                    out.append(PassedFrames(data[start:place], messages))
                    messages = 0
                start = place
                payload = data[after - length : after]
                if self._masked:
                    payload = mask(payload, data[after - length - 4 : after - length])
                out.append(self._control(opcode, payload, data[place:after]))
                place = start = after
            except FrameError as exc:
                self.error, self.closed = exc, True
        if place > start:
            out.append(PassedFrames(data[start:place], messages))
        self.unread = False
        if place < there and not self.closed:
            self.unread = end > 0
            self._data, self._place = data, place
        return out

    def _begin(self, final: bool, opcode: int, head: int, length: int) -> None:
        """Note the head of a data frame. Raises BadFrame."""
        if (opcode == CONTINUATION) != self._in_message:
            raise FrameError(1002, "the fragments of a message are out of order")
        if self._size + length > self._most:
            raise FrameError(1009, f"a message is larger than {self._most} bytes")
        if opcode:
            self._opcode, self._framing = opcode, _FRAMING
        if not (final and opcode):
            self._framing += _SHARE * length - head
            if self._framing < 0:
                raise FrameError(1008, "a message is nearly all framing; send it in fewer fragments")
        self._size = 0 if final else self._size + length
        self._in_message = not final

    def _append(self, piece: bytes) -> None:
        """Keep a piece of payload, unmasked."""
        if key := self._key:
            piece = mask(piece, key)
            if turn := len(piece) % 4:
                self._key = key[turn:] + key[:turn]
        self._message += piece

    def _joined(self) -> Message:
        """Return the message whose last byte has arrived."""
        message, self._message = self._message, bytearray()
        self._final = False
        return Message(self._opcode, bytes(message))

    def _control(self, opcode: int, payload: bytes, raw: bytes) -> Control:
        control = Control(opcode, payload, raw)
        if opcode == CLOSE:
            code = control.code
            if len(payload) == 1 or (code is not None and code not in _CODES and not 3000 <= code <= 4999):
                raise FrameError(1002, "a close frame has a code that must not be sent")
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                raise FrameError(1007, "the reason of a close frame is no text") from None
            self.closed = True
        return control


def _read_head(data: bytes, place: int, masked: bool) -> tuple[bool, int, int, int] | None:
    """Read a frame's head: (final, opcode, the head's length, the payload's); None where it is not whole."""
    if len(data) - place < 2:
        return None
    first, second = data[place], data[place + 1]
    opcode = first & 0x0F
    if first & 0x70 or opcode not in _OPCODES:
        raise FrameError(1002, "a frame has reserved bits or an unknown opcode")
    if bool(second & 0x80) is not masked:
        raise FrameError(1002, "a client's frames are masked, a server's are not")
    length, head = second & 0x7F, 2
    if length >= 126:
        more = 2 if length == 126 else 8
        if len(data) - place < 2 + more:
            return None
        length = int.from_bytes(data[place + 2 : place + 2 + more])
        head += more
        if length < (126 if more == 2 else 65536) or length >> 63:
            raise FrameError(1002, "a frame's length is not as short as it can be")
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


def encode_frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """Return a whole frame; `masked` as a client's must be."""
    if not masked:
        return _head(opcode, len(payload), 0) + payload
    key = os.urandom(4)
    return _head(opcode, len(payload), 0x80) + key + mask(payload, key)


def _head(opcode: int, size: int, bit: int) -> bytes:
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, bit | size)
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, bit | 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, bit | 127, size)


class FrameWriter:
    """A frame that is made in pieces, so that a large payload is neither masked nor written at once."""

    __slots__ = ("_head", "_key", "_payload", "_place")

    def __init__(self, opcode: int, payload: bytes, *, masked: bool) -> None:
        self._payload = payload
        self._place = 0
        self._key = os.urandom(4) if masked else b""
        self._head = _head(opcode, len(payload), 0x80 if masked else 0) + self._key

    @property
    def size(self) -> int:
        """The bytes of its payload: they are kept until the last piece is made."""
        return len(self._payload)

    @property
    def done(self) -> bool:
        """Whether its last piece was made."""
        return self._place >= len(self._payload)

    def piece(self, size: int) -> bytes:
        """Return the next piece, with `size` bytes of payload or the rest of it. `size` is a multiple of four."""
        head, self._head = self._head, b""
        piece = self._payload[self._place : self._place + size]
        self._place += size
        return head + (mask(piece, self._key) if self._key else piece)


def encode_close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """Return a close frame; what is too long of the reason is left out."""
    text = reason.encode()[:_MAX_REASON].decode("utf-8", "ignore").encode()
    return encode_frame(CLOSE, struct.pack("!H", code) + text, masked=masked)
