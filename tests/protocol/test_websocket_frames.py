"""WebSocket frames: valid frames pass at any cut; invalid ones are refused before they are passed on."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Control,
    FrameParser,
    FrameWriter,
    Message,
    PassedFrames,
    encode_close_frame,
    mask,
)
from gateway.protocol.websocket_frames import encode_frame as made

MOST = 1_000_000


def raw(opcode: int, payload: bytes, *, final: bool = True, masked: bool = True, bits: int = 0) -> bytes:
    """Return a frame, computed byte by byte."""
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


def read(frames: FrameParser, data: bytes) -> list[PassedFrames | Control | Message]:
    """Parse all of it, in as many calls as needed."""
    found = frames.feed(data)
    while frames.unread:
        found += frames.feed()
    return found


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
def test_frames_pass_unchanged_at_every_split(masked: bool) -> None:
    """Byte for byte, mask included; control frames are separate, and messages are counted."""
    data = sent(masked)
    for cut in range(len(data)):
        frames = FrameParser(masked=masked, most=MOST)
        found = frames.feed(data[:cut]) + frames.feed(data[cut:])
        passed = b"".join(each.data if isinstance(each, PassedFrames) else each.raw for each in found
                          if not isinstance(each, Message))  # fmt: skip
        assert passed == data, cut
        controls = [(each.opcode, each.payload) for each in found if isinstance(each, Control)]
        assert controls == [(opcode, payload) for opcode, payload, _ in MIX if opcode >= CLOSE]
        assert sum(each.messages for each in found if isinstance(each, PassedFrames)) == 4
        assert frames.closed


@pytest.mark.parametrize("masked", [True, False])
def test_whole_messages_are_joined_and_unmasked_at_every_split(masked: bool) -> None:
    """Fragments become one message, whatever control frames come between them."""
    data = sent(masked)
    pieces = [[data[:cut], data[cut:]] for cut in range(len(data))]
    pieces.append([data[place : place + 1] for place in range(len(data))])
    for each in pieces:
        frames = FrameParser(masked=masked, most=MOST, whole=True)
        found = list(itertools.chain.from_iterable(map(frames.feed, each)))
        assert [one for one in found if isinstance(one, Message)] == [
            Message(TEXT, MIX[0][1]), Message(BINARY, b"\x00" * 200), Message(TEXT, b"first " + b"last" * 40),
            Message(TEXT, b""),
        ]  # fmt: skip
        assert not any(isinstance(one, PassedFrames) for one in found)
        assert [one.opcode for one in found if isinstance(one, Control)] == [PING, PONG, CLOSE]


@given(st.binary(max_size=70_000), st.booleans())
def test_parsing_reverses_encoding(payload: bytes, masked: bool) -> None:
    """For every length, with a mask and without."""
    written = made(BINARY, payload, masked=masked)
    assert FrameParser(masked=masked, most=MOST, whole=True).feed(written, size=100_000) == [Message(BINARY, payload)]
    if not masked:
        assert written == raw(BINARY, payload, masked=False)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_masking(payload: bytes, key: bytes) -> None:
    """As RFC 6455 (5.3) defines it; masking twice restores the payload."""
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
def test_frames_that_the_rfc_forbids_are_refused(data: bytes, code: int) -> None:
    """With the right close code, at any cut, with and without whole messages."""
    for whole in (False, True):
        for size in (len(data), 1) if len(data) < 1000 else (len(data),):
            frames = FrameParser(masked=True, most=MOST, whole=whole)
            pieces = [data[place : place + size] for place in range(0, len(data), size)]
            for piece in pieces:
                read(frames, piece)
            assert frames.error is not None
            assert (frames.error.code, frames.closed) == (code, True)


@pytest.mark.parametrize("whole", [False, True])
def test_frames_before_an_invalid_one_are_not_lost(whole: bool) -> None:
    """At any cut: a whole message, or the rest of a frame that was passed on in part."""
    sound = raw(TEXT, b"last words") + raw(PING, b"p")
    for cut in range(len(sound)):
        frames = FrameParser(masked=True, most=MOST, whole=whole)
        found = frames.feed(sound[:cut]) + frames.feed(sound[cut:] + b"\xff\xff\xff\xff")
        assert frames.error is not None
        assert frames.between
        assert frames.feed(b"more") == []
        if whole:
            assert found[0] == Message(TEXT, b"last words")
        else:
            assert b"".join(each.data if isinstance(each, PassedFrames) else each.raw for each in found
                            if not isinstance(each, Message)) == sound  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("payload", "most"), [(b"", 682), (b"a", 2048), (b"ab", 50_000)])
def test_a_message_that_is_nearly_all_framing_is_refused(whole: bool, payload: bytes, most: int) -> None:
    """After an allowance per message; a message whose fragments have some payload never is."""
    for first in (raw(TEXT, b"whole"), raw(TEXT, b"", final=False) + raw(0, b"")):
        frames = FrameParser(masked=True, most=MOST, whole=whole)
        read(frames, first)
        begun = raw(TEXT, payload, final=False)
        read(frames, begun + raw(0, payload, final=False) * (most - 1))
        assert (frames.error, frames.kept) == (None, len(payload) * most if whole else 0)
        read(frames, raw(0, payload, final=False))
        refused = "a message is nearly all framing; send it in fewer fragments" if payload != b"ab" else None
        assert (frames.error and (frames.error.code, frames.error.reason)) == (refused and (1008, refused))


FRAMES = {
    "pings": raw(PING, b""),
    "messages of one byte": raw(TEXT, b"a"),
    "empty messages": raw(BINARY, b""),
    "empty continuations": raw(0, b"", final=False),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", FRAMES)
def test_one_call_reads_a_bounded_number_of_frames(kind: str, whole: bool) -> None:
    """Exactly the limit, and the next call continues there; nothing waits for more bytes to arrive."""
    frames = FrameParser(masked=True, most=MOST, whole=whole)
    if kind == "empty continuations":
        frames.feed(raw(TEXT, b"", final=False))
    one, calls, passed = FRAMES[kind], 0, 0
    found = frames.feed(one * 640, 64)
    while True:
        calls += 1
        passed += sum(len(each.data) if isinstance(each, PassedFrames) else len(one) for each in found)
        if kind != "empty continuations" or not whole:
            assert passed == calls * 64 * len(one)
        if not frames.unread:
            break
        found = frames.feed(frames=64)
    assert calls == 10


@pytest.mark.parametrize("whole", [False, True])
def test_one_call_reads_a_bounded_number_of_bytes(whole: bool) -> None:
    """Of a large payload, or of many small frames in one read."""
    frames = FrameParser(masked=True, most=MOST, whole=whole)
    large = made(BINARY, bytes(100_000), masked=True)
    found, handled = frames.feed(large + raw(TEXT, b"next"), 64, 10_000), []
    while True:
        handled.append(
            frames.kept if whole else sum(len(each.data) for each in found if isinstance(each, PassedFrames))
        )
        if not frames.unread:
            break
        found = frames.feed(frames=64, size=10_000)
    if whole:
        steps = [after - before for before, after in itertools.pairwise([0, *handled[:10]])]
        assert steps == [10_000 - (len(large) - 100_000), *[10_000] * 9]
        assert found == [Message(BINARY, bytes(100_000)), Message(TEXT, b"next")]
    else:
        assert handled[:10] == [10_000] * 10


def test_the_length_in_a_head_reserves_no_memory() -> None:
    """Memory grows as the payload arrives, up to the largest message."""
    frames = FrameParser(masked=True, most=60_000_000, whole=True)
    frames.feed(b"\x01\xff" + (60_000_000).to_bytes(8) + b"\x00\x00\x00\x00" + b"a" * 1000)
    assert frames.kept == 1000
    assert frames._message.__sizeof__() < 3000


@given(
    st.lists(st.tuples(st.sampled_from(range(len(MIX))), st.binary(max_size=300)), max_size=12),
    st.lists(st.integers(1, 200), max_size=30),
    st.integers(1, 5),
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
)
def test_limits_of_a_call_do_not_change_the_result(
    frames_sent: list[tuple[int, bytes]], cuts: list[int], most: int, size: int, masked: bool, whole: bool
) -> None:
    """For any input, any cuts and any limits: the same frames in the same order."""
    data = b"".join(
        raw(MIX[kind][0], payload[:125] if MIX[kind][0] == PING else payload, final=MIX[kind][2], masked=masked)
        for kind, payload in frames_sent
        if MIX[kind][0] != CLOSE
    )

    def told(found: list[PassedFrames | Control | Message]) -> list[object]:
        out: list[object] = []
        for each in found:
            if isinstance(each, PassedFrames) and out and isinstance(out[-1], PassedFrames):
                each = PassedFrames(out[-1].data + each.data, out.pop().messages + each.messages)  # type: ignore[attr-defined] # noqa: PLW2901
            out.append(each)
        return out

    at_once, in_steps = (FrameParser(masked=masked, most=MOST, whole=whole) for _ in range(2))
    wanted = told(at_once.feed(data, 1000, 1_000_000))
    found: list[PassedFrames | Control | Message] = []
    place = 0
    for cut in [*cuts, len(data)]:
        piece = data[place : place + cut]
        place += cut
        if len(piece) % 2 and in_steps.unread:
            in_steps.keep(piece)  # more arrives before its turn has come
        else:
            found += in_steps.feed(piece, most, size)
    while in_steps.unread:
        found += in_steps.feed(b"", most, size)
    assert told(found) == wanted
    assert str(in_steps.error) == str(at_once.error)
    assert (in_steps.kept, in_steps.between) == (at_once.kept, at_once.between)


@given(st.binary(max_size=300), st.integers(1, 20), st.booleans())
def test_a_frame_encoded_in_pieces_is_a_frame(payload: bytes, quarter: int, masked: bool) -> None:
    """The mask continues across pieces; each has the requested number of payload bytes."""
    writer = FrameWriter(TEXT, payload, masked=masked)
    pieces = [writer.piece(4 * quarter)]
    while not writer.done:
        pieces.append(writer.piece(4 * quarter))
    assert FrameParser(masked=masked, most=MOST, whole=True).feed(b"".join(pieces)) == [Message(TEXT, payload)]
    assert all(len(piece) <= 4 * quarter for piece in pieces[1:])


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1008, 1011, 1013, 3000, 4999])
def test_close_codes_that_may_be_sent(code: int) -> None:
    """Those of the RFC, the registered ones, and those of libraries and programs."""
    (control,) = FrameParser(masked=True, most=MOST).feed(encode_close_frame(code, "because", masked=True))
    assert isinstance(control, Control)
    assert (control.code, control.payload[2:]) == (code, b"because")


def test_a_close_frame_may_be_empty() -> None:
    """Then it has no code."""
    (control,) = FrameParser(masked=True, most=MOST).feed(raw(CLOSE, b""))
    assert isinstance(control, Control)
    assert control.code is None


def test_a_large_message_in_many_reads_is_linear() -> None:
    """Kept bytes are joined once, not with each read."""
    frames = FrameParser(masked=False, most=100_000_000, whole=True)
    data = made(BINARY, bytes(50_000_000), masked=False)
    found = [each for place in range(0, len(data), 1000) for each in read(frames, data[place : place + 1000])]
    assert [len(each.payload) for each in found if isinstance(each, Message)] == [50_000_000]


def test_nothing_is_parsed_after_a_close() -> None:
    """Bytes after it are ignored."""
    frames = FrameParser(masked=False, most=MOST)
    assert len(frames.feed(raw(CLOSE, b"", masked=False) + b"junk")) == 1
    assert frames.feed(b"more junk") == []


def test_a_long_reason_is_truncated() -> None:
    """Between two characters, so that it stays UTF-8."""
    frames = FrameParser(masked=False, most=MOST)
    (control,) = frames.feed(encode_close_frame(1011, "ä" * 100, masked=False))
    assert isinstance(control, Control)
    assert control.payload[2:].decode() == "ä" * 61


def test_where_another_message_may_be_inserted() -> None:
    """Not between the fragments of one; a control frame may be inserted there."""
    frames = FrameParser(masked=False, most=MOST)
    frames.feed(raw(TEXT, b"a", final=False, masked=False))
    seen = [(frames.between, frames.between_messages)]
    frames.feed(raw(0, b"b", masked=False))
    seen.append((frames.between, frames.between_messages))
    assert seen == [(True, False), (True, True)]


def test_where_another_frame_may_be_inserted() -> None:
    """Not in the middle of one that was passed on in part; a kept head does not matter."""
    frames = FrameParser(masked=False, most=MOST)
    data = raw(BINARY, b"x" * 1000, masked=False)
    seen = [frames.between]
    for piece in (data[:100], data[100:], data[:3]):
        frames.feed(piece)
        seen.append(frames.between)
    assert seen == [True, False, True, True]


@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_any_bytes_are_frames_or_refused(data: bytes, masked: bool, whole: bool) -> None:
    """No other exception is raised, and only received bytes are passed on."""
    frames = FrameParser(masked=masked, most=100_000, whole=whole)
    found = frames.feed(data)
    if not whole:
        assert data.startswith(b"".join(each.data if isinstance(each, PassedFrames) else each.raw for each in found
                                        if not isinstance(each, Message)))  # fmt: skip
