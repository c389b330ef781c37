"""WebSocket frames: what may come passes, cut anywhere; what must not come is refused before it goes on."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Control,
    Frames,
    Message,
    Passed,
    close_frame,
    mask,
)
from gateway.frames import frame as made

MOST = 1_000_000


def raw(opcode: int, payload: bytes, *, final: bool = True, masked: bool = True, bits: int = 0) -> bytes:
    """Return a frame, worked out byte by byte."""
    size = len(payload)
    first = (0x80 if final else 0) | bits | opcode
    bit = 0x80 if masked else 0
    if size < 126:
        head = bytes([first, bit | size])
    elif size < 65536:
        head = bytes([first, bit | 126]) + size.to_bytes(2)
    else:
        head = bytes([first, bit | 127]) + size.to_bytes(8)
    key = b"\x01\x92\xfe\x00" if masked else b""
    return head + key + bytes(byte ^ key[place % 4] if masked else byte for place, byte in enumerate(payload))


MIX = (
    (TEXT, b'{"type":"session.update"}', True),
    (PING, b"are you there", True),
    (BINARY, b"\x00" * 200, True),
    (TEXT, b"first ", False),
    (PONG, b"", True),
    (0, b"", False),
    (0, b"last" * 40, True),
    (TEXT, b"", True),
    (CLOSE, b"\x03\xe8bye", True),
)


def sent(masked: bool) -> bytes:
    return b"".join(raw(opcode, payload, final=final, masked=masked) for opcode, payload, final in MIX)


@pytest.mark.parametrize("masked", [True, False])
def test_frames_pass_as_they_came_at_every_split(masked: bool) -> None:
    """Byte for byte, mask and all; control frames are told apart, and messages counted."""
    data = sent(masked)
    for cut in range(len(data)):
        frames = Frames(masked=masked, most=MOST)
        found = frames.feed(data[:cut]) + frames.feed(data[cut:])
        passed = b"".join(each.data if isinstance(each, Passed) else each.raw for each in found
                          if not isinstance(each, Message))  # fmt: skip
        assert passed == data, cut
        controls = [(each.opcode, each.payload) for each in found if isinstance(each, Control)]
        assert controls == [(opcode, payload) for opcode, payload, _ in MIX if opcode >= CLOSE]
        assert sum(each.messages for each in found if isinstance(each, Passed)) == 4
        assert frames.closed


@pytest.mark.parametrize("masked", [True, False])
def test_whole_messages_are_joined_and_unmasked_at_every_split(masked: bool) -> None:
    """Fragments become one, whatever control frames come between them."""
    data = sent(masked)
    pieces = [[data[:cut], data[cut:]] for cut in range(len(data))]
    pieces.append([data[place : place + 1] for place in range(len(data))])
    for each in pieces:
        frames = Frames(masked=masked, most=MOST, whole=True)
        found = list(itertools.chain.from_iterable(map(frames.feed, each)))
        assert [one for one in found if isinstance(one, Message)] == [
            Message(TEXT, MIX[0][1]), Message(BINARY, b"\x00" * 200), Message(TEXT, b"first " + b"last" * 40),
            Message(TEXT, b""),
        ]  # fmt: skip
        assert not any(isinstance(one, Passed) for one in found)
        assert [one.opcode for one in found if isinstance(one, Control)] == [PING, PONG, CLOSE]


@given(st.binary(max_size=70_000), st.booleans())
def test_what_is_written_is_read_again(payload: bytes, masked: bool) -> None:
    """Of every length, with a mask and without."""
    written = made(BINARY, payload, masked=masked)
    assert Frames(masked=masked, most=MOST, whole=True).feed(written) == [Message(BINARY, payload)]
    if not masked:
        assert written == raw(BINARY, payload, masked=False)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_masking(payload: bytes, key: bytes) -> None:
    """As RFC 6455 (5.3) has it, and undone by the same."""
    assert mask(payload, key) == bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))
    assert mask(mask(payload, key), key) == payload


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (raw(TEXT, b"a", bits=0x40), 1002),
        (raw(TEXT, b"a", bits=0x10), 1002),
        (raw(3, b"a"), 1002),
        (raw(11, b"a"), 1002),
        (raw(TEXT, b"a", masked=False), 1002),
        (raw(0, b"a"), 1002),
        (raw(TEXT, b"a", final=False) + raw(TEXT, b"a"), 1002),
        (raw(PING, b"a", final=False), 1002),
        (raw(PING, b"a" * 126), 1002),
        (b"\x81\xfe\x00\x05aaaa", 1002),
        (b"\x81\xff" + (500).to_bytes(8) + b"aaaa", 1002),
        (b"\x81\xff\x80" + bytes(7) + b"aaaa", 1002),
        (raw(CLOSE, b"\x03"), 1002),
        (raw(CLOSE, struct.pack("!H", 1005)), 1002),
        (raw(CLOSE, struct.pack("!H", 1006)), 1002),
        (raw(CLOSE, struct.pack("!H", 1015)), 1002),
        (raw(CLOSE, struct.pack("!H", 999)), 1002),
        (raw(CLOSE, struct.pack("!H", 2999)), 1002),
        (raw(CLOSE, struct.pack("!H", 5000)), 1002),
        (raw(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
        (b"\x81\xff" + (MOST + 1).to_bytes(8) + b"aaaa", 1009),
        (raw(TEXT, b"a" * (MOST - 1), final=False) + raw(0, b"aa"), 1009),
    ],
)
def test_what_the_rfc_forbids_is_refused(data: bytes, code: int) -> None:
    """With the close code that says why, whether messages are kept whole or not, and cut anywhere."""
    for whole in (False, True):
        for size in (len(data), 1) if len(data) < 1000 else (len(data),):
            frames = Frames(masked=True, most=MOST, whole=whole)
            pieces = [data[place : place + size] for place in range(0, len(data), size)]
            list(map(frames.feed, pieces))
            assert frames.error is not None
            assert (frames.error.code, frames.closed) == (code, True)


@pytest.mark.parametrize("whole", [False, True])
def test_what_came_before_it_is_not_lost(whole: bool) -> None:
    """However reads end: a whole message, or the rest of a frame that was passed on in part."""
    sound = raw(TEXT, b"last words") + raw(PING, b"p")
    for cut in range(len(sound)):
        frames = Frames(masked=True, most=MOST, whole=whole)
        found = frames.feed(sound[:cut]) + frames.feed(sound[cut:] + b"\xff\xff\xff\xff")
        assert frames.error is not None
        assert frames.between
        assert frames.feed(b"more") == []
        if whole:
            assert found[0] == Message(TEXT, b"last words")
        else:
            assert b"".join(each.data if isinstance(each, Passed) else each.raw for each in found
                            if not isinstance(each, Message)) == sound  # fmt: skip


def test_fragments_are_kept_as_what_they_carry() -> None:
    """Empty ones weigh nothing, however many they are."""
    frames = Frames(masked=True, most=1000, whole=True)
    assert frames.feed(raw(TEXT, b"a", final=False) + raw(0, b"", final=False) * 50_000) == []
    assert len(frames._message) == 1
    assert frames.feed(raw(0, b"b")) == [Message(TEXT, b"ab")]


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1008, 1011, 1013, 3000, 4999])
def test_codes_that_may_be_sent(code: int) -> None:
    """Those of the RFC, the registered ones, and those of libraries and programs."""
    (control,) = Frames(masked=True, most=MOST).feed(close_frame(code, "because", masked=True))
    assert isinstance(control, Control)
    assert (control.code, control.payload[2:]) == (code, b"because")


def test_a_close_may_say_nothing() -> None:
    """Then it has no code."""
    (control,) = Frames(masked=True, most=MOST).feed(raw(CLOSE, b""))
    assert isinstance(control, Control)
    assert control.code is None


def test_a_large_message_in_many_reads_is_linear() -> None:
    """What is kept is joined once, not with each read."""
    frames = Frames(masked=False, most=100_000_000, whole=True)
    data = made(BINARY, bytes(50_000_000), masked=False)
    found = [each for place in range(0, len(data), 1000) for each in frames.feed(data[place : place + 1000])]
    assert [len(each.payload) for each in found if isinstance(each, Message)] == [50_000_000]


def test_nothing_is_read_behind_a_close() -> None:
    """What a side sends after it is nobody's business."""
    frames = Frames(masked=False, most=MOST)
    assert len(frames.feed(raw(CLOSE, b"", masked=False) + b"junk")) == 1
    assert frames.feed(b"more junk") == []


def test_a_reason_is_cut_where_it_is_too_long() -> None:
    """Between two characters, so that it stays text."""
    frames = Frames(masked=False, most=MOST)
    (control,) = frames.feed(close_frame(1011, "ä" * 100, masked=False))
    assert isinstance(control, Control)
    assert control.payload[2:].decode() == "ä" * 61


def test_where_another_message_may_be_put() -> None:
    """Not between the fragments of one, where a control frame may stand."""
    frames = Frames(masked=False, most=MOST)
    frames.feed(raw(TEXT, b"a", final=False, masked=False))
    seen = [(frames.between, frames.between_messages)]
    frames.feed(raw(0, b"b", masked=False))
    seen.append((frames.between, frames.between_messages))
    assert seen == [(True, False), (True, True)]


def test_where_another_frame_may_be_put() -> None:
    """Not in the middle of one that was passed on in part; the head of one that is kept is no matter."""
    frames = Frames(masked=False, most=MOST)
    data = raw(BINARY, b"x" * 1000, masked=False)
    seen = [frames.between]
    for piece in (data[:100], data[100:], data[:3]):
        frames.feed(piece)
        seen.append(frames.between)
    assert seen == [True, False, True, True]


@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_any_bytes_are_frames_or_refused(data: bytes, masked: bool, whole: bool) -> None:
    """Nothing else is ever raised, and no byte that was passed on was not there."""
    frames = Frames(masked=masked, most=100_000, whole=whole)
    found = frames.feed(data)
    if not whole:
        assert data.startswith(b"".join(each.data if isinstance(each, Passed) else each.raw for each in found
                                        if not isinstance(each, Message)))  # fmt: skip
