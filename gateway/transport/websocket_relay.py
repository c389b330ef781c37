"""A WebSocket through the gateway: what either side sends goes to the other, until both have said goodbye.

Frames go on as they come, mask and all, unless a filter reads messages. Pings, pongs, and close frames with their
codes go through. A side that does not read makes the other wait. Where one side is lost, or sends what is no frame,
the other is told by a close frame. A side that has been silent for a while is asked by a ping of the gateway's own
whether it is there; the answer goes no further.

Rule 1: one turn of the loop handles a bounded number of bytes and frames of a side (`fair_scheduler.py`). Reading
pauses until the rest is handled, and no frame that has arrived is lost because its side is.
Rule 2: memory is bounded. Messages are kept for filters alone, up to `MOST_KEPT`; the exchange holds their bytes until
the last one is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from gateway.errors import ApiError, UpstreamError, UpstreamTimeout
from gateway.exchange import Exchange
from gateway.fair_scheduler import SMALL, STEP, FairScheduler
from gateway.logs import exception_fields, get_logger, redacted
from gateway.protocol.json_fields import decode_json, encode_json, raw_fields
from gateway.protocol.sse import Event, EventFilter, run_filters
from gateway.protocol.websocket_frames import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Control,
    FrameError,
    FrameParser,
    FrameWriter,
    Message,
    PassedFrames,
    encode_close_frame,
    encode_frame,
)
from gateway.transport.client_connection import ClientConnection
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.write_timeout import WriteTimeout

__all__ = ("MOST_KEPT", "ControlFrameLimit", "MessageEvent", "WebSocketRelay", "error_event")

MOST_KEPT = 21 * 1024 * 1024
"""The largest message that is kept for filters, in bytes.

An event of the Realtime API may carry 15 MiB of sound (OpenAI's reference, `input_audio_buffer.append`), which are
20 MiB in base64.
"""
# The largest message that filters may decode into objects, in bytes: those can take fifty times its memory.
_MOST_DECODED = 4 * 1024 * 1024
# A token bucket for the pings and pongs of one side: so many at once, and so many a second. Clients and servers send
# one in 10 or 20 seconds; after a pause in reading, those of the meantime arrive together.
_CONTROLS = 100
_CONTROLS_PER_SECOND = 20
# Why a side is not read from: the bytes that have arrived are handled in later turns; the other side takes no more; the
# gateway's own answers to it are not written yet.
_TURN, _FLOW, _ANSWERS = "turn", "flow", "answers"

# How long, in seconds, a side may take to answer a close frame.
_CLOSING = 10.0
# The longest id of a message that an error repeats, in bytes of JSON.
_MOST_EVENT_ID = 2048


class MessageEvent(Event):
    """A message, as filters see it: its raw bytes are its data."""

    __slots__ = ()

    @property
    def data(self) -> bytes:
        """The message."""
        return self.raw

    def json(self) -> Any:
        """Return the message as JSON, decoded once; None if it is not JSON. Raises ApiError 413 for large ones."""
        if not self._parsed and len(self.raw) > _MOST_DECODED:
            raise ApiError(
                413,
                f"a message of {len(self.raw)} bytes is larger than the {_MOST_DECODED} that a stage reads; send less",
                code="message_too_large",
            )
        return super().json()

    def set_json(self, content: object) -> None:
        """Replace the message."""
        self.raw = encode_json(content)
        self._json = content
        self._parsed = True


class ControlFrameLimit:
    """A token bucket for the pings and pongs of one side."""

    __slots__ = ("_left", "_refilled")

    def __init__(self) -> None:
        self._left = float(_CONTROLS)
        self._refilled = 0.0

    def take(self, now: float) -> None:
        """Count one, at a time in seconds. Raises BadFrame if there are too many."""
        self._left = min(_CONTROLS, self._left + (now - self._refilled) * _CONTROLS_PER_SECOND) - 1
        self._refilled = now
        if self._left < 0:
            raise FrameError(1008, f"more pings and pongs than {_CONTROLS} at once and {_CONTROLS_PER_SECOND} a second")


class _Side:
    """One of the two ends: how it is read, written to, and made to wait."""

    other: _Side

    def __init__(
        self,
        relay: WebSocketRelay,
        *,
        client: bool,
        filters: Sequence[EventFilter],
        most: int,
        write: Callable[[bytes], None],
        hold: Callable[[bool], None],
        release: Callable[[], None],
    ) -> None:
        self._relay = relay
        self.client = client
        self.filters = filters  # on what it sends
        self.frames = FrameParser(masked=client, most=min(most, MOST_KEPT) if filters else most, whole=bool(filters))
        self.write = write
        self._hold = hold
        self._release = release
        self.holders: set[str] = set()  # why it is not read from
        self.taking = True  # what is written to it
        self.unwritten: deque[bytes | FrameWriter] = deque()  # of what it sent, from a large message on
        self.held = 0  # bytes of its messages that the exchange holds
        self.answers: list[bytes] = []  # messages of the gateway's own for it, until they may be put
        self.heard = True
        self.pinged = False
        self.lost = False
        self.told = False  # it was sent a close frame
        self.messages = 0  # that it has sent
        self.timer: asyncio.TimerHandle | WriteTimeout | None = None  # while it takes nothing
        self.controls = ControlFrameLimit()

    def hold(self, why: str) -> None:
        """Stop reading from it, until `release` for the same reason."""
        if why not in self.holders:
            if self.holders <= {_TURN}:
                # If it leaves meanwhile, bytes that only wait for their turn go on.
                self._hold(why != _TURN)
            self.holders.add(why)

    def release(self, why: str) -> None:
        """Go on reading, unless there is another reason not to."""
        if why in self.holders:
            self.holders.remove(why)
            if not self.holders:
                self.heard = True
                self._release()
            elif self.may_go_on:
                self._hold(False)
                self._relay.scheduler.add(self)

    @property
    def waiting(self) -> bool:
        """Whether bytes that have arrived are not handled yet."""
        return _TURN in self.holders

    @property
    def may_go_on(self) -> bool:
        """Whether such bytes may be handled now."""
        return len(self.holders) == 1 and _TURN in self.holders

    def step(self) -> bool:
        """Handle a bounded part of the bytes that have arrived; return whether there are more to handle now."""
        if self.may_go_on and not self._relay.over:
            self._relay.go_on(self)
        return self.may_go_on and not self._relay.over

    @property
    def between(self) -> bool:
        """Whether no frame of it was passed on in part: a control frame may be put here."""
        return self.frames.between and not self.unwritten

    @property
    def between_messages(self) -> bool:
        """Whether a message may be put here, too."""
        return self.frames.between_messages and not self.unwritten


class WebSocketRelay:
    """The two directions of one WebSocket."""

    def __init__(
        self,
        connection: ClientConnection,
        wire: UpstreamConnection,
        exchange: Exchange,
        request_id: str,
        *,
        up: Sequence[EventFilter],
        down: Sequence[EventFilter],
        most: int,
        ping: float,
        patience: tuple[float, float],
        hidden: Sequence[str],
        watch: Callable[[bytes], None] | None = None,
    ) -> None:
        self._connection = connection
        self._wire = wire
        self._exchange = exchange
        self._request_id = request_id
        self._ping = ping
        self._patience = patience  # with a client, and with Azure, that takes nothing
        self._hidden = list(hidden)
        self._watch = watch  # sees what Azure sends
        self._loop = asyncio.get_running_loop()
        self.scheduler = FairScheduler.of(self._loop)
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._client = _Side(
            self, client=True, filters=up, most=most,
            write=self._to_client, hold=lambda check: connection.hold(check_left=check), release=connection.release,
        )  # fmt: skip
        self._azure = _Side(
            self, client=False, filters=down, most=most,
            write=self._to_azure, hold=lambda check: wire.hold_relay(), release=wire.release_relay,
        )  # fmt: skip
        self._client.other, self._azure.other = self._azure, self._client
        # The payload of the gateway's own pings: no other's, be it a gateway behind this one.
        self._ours = os.urandom(8).hex().encode()
        self._asker: asyncio.TimerHandle | None = None
        self._closer: asyncio.TimerHandle | None = None
        self._ending: Callable[[], None] | None = None  # what ends it, once all is written
        self._client_left = False  # and frames of it are still to be handled

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.done()

    @property
    def azure_held(self) -> bool:
        """Whether Azure is not read from for now."""
        return bool(self._azure.holders)

    async def run(self) -> None:
        """Relay until it is over. Raises what ended it otherwise than by goodbyes; both connections are closed then."""
        self._asker = self._loop.call_later(self._ping, self._ask)
        try:
            self._connection.start_relay(self.from_client, self.client_flow)
            self._wire.start_relay(self)
            await self._over
        except asyncio.CancelledError:
            # Only the client's own end takes its transport away; else the gateway stops.
            left = self._connection.transport is None
            self._client.lost = left
            if left and self._client.waiting and self._over.cancelled():
                await self._finish_client()
            self._say_goodbye(1001, "the client left" if left else "the gateway is stopping")
            raise
        finally:
            for timer in (self._asker, self._closer, self._client.timer, self._azure.timer):
                if timer is not None:
                    timer.cancel()
            self._exchange.count("messages_up", self._client.messages)
            self._exchange.count("messages_down", self._azure.messages)
            for side in (self._client, self._azure):
                self.scheduler.remove(side)
                self._exchange.release_memory(side.held)
                side.held = 0
            self._connection.stop_relay()
            self._wire.end_relay(_CLOSING)
            if not self._over.cancel() and not self._over.cancelled():
                self._over.exception()  # whoever was cancelled meanwhile does not ask for it
            self._forget()

    def _forget(self) -> None:
        """Cut the cycles of references, which would keep messages until the collector finds them."""
        self._over = self._loop.create_future()  # the other one may have an exception, whose frames hold this relay
        self._over.cancel()
        self._ending = None
        for side in (self._client, self._azure):
            side.timer = None
            side.frames.drop()
            side.unwritten.clear()
            side.answers.clear()

    async def _finish_client(self) -> None:
        """Hand on the frames of a client that has left, unless Azure takes too long to read them."""
        self._over = self._loop.create_future()  # the other one is cancelled with the task
        self._client_left = True
        self._tell(self._client)
        for side in (self._client, self._azure):
            if side.may_go_on:
                self.scheduler.add(side)
        await asyncio.wait((self._over,), timeout=_CLOSING)

    # -- what comes ------------------------------------------------------------------------------------

    def from_client(self, data: bytes) -> None:
        """Take what the client sent."""
        self._take(self._client, data)

    def from_azure(self, data: bytes) -> None:
        """Take what Azure sent."""
        if self._watch is not None:
            self._watch(data)
        self._take(self._azure, data)

    def azure_lost(self) -> None:
        """Note that Azure has closed the connection. Frames of it that have arrived still go on."""
        self._azure.lost = True
        if not self._azure.waiting:
            self._end_without_azure()

    def _end_without_azure(self) -> None:
        if self._azure.frames.closed:
            self._end()
        elif self._client.frames.closed:
            self._answer_goodbye()
        else:
            self._fail(UpstreamError("Azure's WebSocket broke off"))

    def _take(self, side: _Side, data: bytes) -> None:
        if self._over.done() or side.frames.closed:
            return
        side.heard, side.pinged = True, False
        if side.holders:
            side.frames.keep(data)
            side.hold(_TURN)
        elif len(data) > SMALL and not self.scheduler.may_handle(len(data)):
            side.frames.keep(data)
            side.hold(_TURN)
            self.scheduler.add(side)
        else:
            self._read(side, data)
            self._settle(side)
            if side.may_go_on:
                self.scheduler.add(side)

    def go_on(self, side: _Side) -> None:
        """Handle a bounded part of a side's bytes, in a turn of its own."""
        if not side.unwritten:
            self._read(side, b"")
        left = STEP
        while left > 0 and side.unwritten and side.may_go_on:
            first = side.unwritten[0]
            piece = first if isinstance(first, bytes) else first.piece(STEP)
            if isinstance(first, bytes) or first.done:
                side.unwritten.popleft()
            left -= len(piece)
            side.other.write(piece)
        self._settle(side)

    def _read(self, side: _Side, data: bytes) -> None:
        """Handle the next frames of a side."""
        try:
            for each in side.frames.feed(data):
                if isinstance(each, PassedFrames):
                    side.messages += each.messages
                    self._put(side, each.data)
                elif isinstance(each, Message):
                    side.messages += 1
                    self._filter(side, each)
                else:
                    self._control(side, each)
        except FrameError as exc:
            self._refuse(side, exc)
        except ApiError as exc:
            self._fail(exc)
        except Exception as exc:
            get_logger().error(
                "a filter failed", request_id=self._request_id, **redacted(exception_fields(exc), self._hidden)
            )
            self._fail(
                ApiError(
                    500,
                    f"the gateway failed on this message. Contact its operator and quote request id {self._request_id}",
                )
            )

    def _settle(self, side: _Side) -> None:
        """After some frames of a side: count the bytes that are held, and wait for another turn, or end."""
        if self._over.done() or not self._count(side):
            return
        self._tell(side.other)
        if side.unwritten or side.frames.unread:
            side.hold(_TURN)
            return
        side.release(_TURN)
        if (wrong := side.frames.error) is not None:
            self._refuse(side, wrong)
        elif self._ending is not None:
            self._ending()
        elif side.client:
            if self._client_left:
                self._end()
        elif side.lost:
            self._end_without_azure()

    def _count(self, side: _Side) -> bool:
        """Hold the bytes of a side's messages; returns False if that is refused, and the WebSocket ends."""
        size = side.frames.kept
        if side.unwritten:
            size += sum(each.size for each in side.unwritten if isinstance(each, FrameWriter))
        more = size - side.held
        if more > 0:
            try:
                self._exchange.reserve_memory(more)
            except ApiError as exc:
                self._fail(exc, code=1013)
                return False
        elif more < 0:
            self._exchange.release_memory(-more)
        side.held = size
        return True

    def _refuse(self, side: _Side, wrong: FrameError) -> None:
        """End it because of a frame that may not be sent."""
        if side.client:
            code = {1008: "policy_violation", 1009: "message_too_large"}.get(wrong.code, "malformed_frame")
            self._fail(ApiError(400, wrong.reason, code=code), code=wrong.code)
        else:
            self._fail(UpstreamError(f"Azure sent a WebSocket frame that is refused: {wrong.reason}"))

    def _control(self, side: _Side, control: Control) -> None:
        other = side.other
        if control.opcode != CLOSE:
            side.controls.take(self._loop.time())
            if control.opcode != PONG or control.payload != self._ours:
                self._put(side, control.raw)
            return
        for place, each in enumerate(side.filters):
            for left in each.close():
                self._send(side, TEXT, run_filters(side.filters, left, place + 1))
        self._tell(other, last=True)  # nothing of a message may follow a close frame
        if self._exchange.close_code is None:
            self._exchange.close_code = control.code or 1005
        if not other.told:
            other.told = True
            self._put(side, control.raw)
        if other.frames.closed:
            self._end()
        elif self._closer is None:
            self._closer = self._loop.call_later(_CLOSING, self._answer_goodbye)

    def _answer_goodbye(self) -> None:
        """End well in the place of a side that does not answer the other's goodbye."""
        if self._unwritten():
            self._ending = self._answer_goodbye
            return
        code = self._exchange.close_code or 1000
        self._say_goodbye(code if code != 1005 else 1000, "")
        self._end()

    def _filter(self, side: _Side, message: Message) -> None:
        event = MessageEvent(message.payload)
        try:
            events = list(run_filters(side.filters, event))
        except ApiError as exc:
            if not side.client:
                raise
            # The client is told, as the API tells it of what it cannot do, and may go on.
            side.answers.append(encode_frame(TEXT, error_event(exc, message.payload), masked=False))
            self._tell(side)
            return
        self._send(side, message.opcode, events)

    def _tell(self, side: _Side, *, last: bool = False) -> None:
        """Write what the gateway itself has to say to a side, as soon as it takes it and no message is in the way.

        Until then nothing more is taken from that side, so that no more is to be said. `last` says that the other side
        says goodbye: what cannot be written before its close frame never can.
        """
        if side.lost:
            side.answers.clear()
            side.release(_ANSWERS)
        if not side.answers or side.told:
            return
        between = side.other.between_messages
        if (side.taking and between) or last:
            answers, side.answers = b"".join(side.answers), []
            if between:
                side.write(answers)
            elif side.other.unwritten:
                side.other.unwritten.append(answers)
            side.release(_ANSWERS)
        else:
            side.hold(_ANSWERS)

    def _send(self, side: _Side, opcode: int, events: Iterable[Event]) -> None:
        """Send messages on, from a side to the other; a large one in pieces, in later turns."""
        redacted = side.client
        for each in events:
            if len(each.raw) > STEP:
                side.unwritten.append(FrameWriter(opcode, each.raw, masked=redacted))
            else:
                self._put(side, encode_frame(opcode, each.raw, masked=redacted))

    def _put(self, side: _Side, data: bytes) -> None:
        """Send bytes on, from a side to the other, after those that are still to be written."""
        if side.unwritten:
            side.unwritten.append(data)
        else:
            side.other.write(data)

    # -- what leaves -----------------------------------------------------------------------------------

    def _to_client(self, data: bytes) -> None:
        self._exchange.sent += len(data)
        self._connection.write(data)

    def _to_azure(self, data: bytes) -> None:
        if self._wire.is_connected():
            self._wire.transport.write(data)  # type: ignore[union-attr] # it is connected

    # -- flow ------------------------------------------------------------------------------------------

    def client_flow(self, paused: bool) -> None:
        """Let Azure wait for a client that does not read."""
        self._flow(self._client, self._azure, paused)

    def azure_flow(self, paused: bool) -> None:
        """Let the client wait for Azure."""
        self._flow(self._azure, self._client, paused)

    def _flow(self, side: _Side, other: _Side, paused: bool) -> None:
        if side.timer is not None:
            side.timer.cancel()
            side.timer = None
        side.taking = not paused
        if paused:
            other.hold(_FLOW)
            if side.client:
                side.timer = WriteTimeout(self._connection, self._patience[0], self._client_takes_nothing)
            else:
                side.timer = self._loop.call_later(self._patience[1], self._azure_takes_nothing)
        else:
            other.release(_FLOW)
            self._tell(side)

    def _client_takes_nothing(self) -> None:
        self._exchange.error = "client_not_reading"
        self._client.lost = True
        if self._connection.transport is not None:
            self._connection.transport.abort()

    def _azure_takes_nothing(self) -> None:
        self._fail(UpstreamTimeout(f"Azure took nothing for {self._patience[1]:g} s"))

    # -- whether they are there ------------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask a side that has been silent; one that was asked and stayed silent is gone."""
        self._asker = self._loop.call_later(self._ping, self._ask)
        for side, other in ((self._client, self._azure), (self._azure, self._client)):
            if side.frames.closed or side.told:
                continue  # it has said goodbye, or is to answer one
            if side.heard or side.holders:
                side.heard = False
            elif side.pinged:
                self._silent(side)
                return
            elif other.between:
                side.pinged = True
                side.write(encode_frame(PING, self._ours, masked=not side.client))

    def _silent(self, side: _Side) -> None:
        if side.client:
            silent = ApiError(408, f"the client was silent for {2 * self._ping:g} s", code="request_timeout")
            self._fail(silent, code=1001)
        else:
            self._fail(UpstreamTimeout(f"Azure was silent for {2 * self._ping:g} s"))

    # -- the end ---------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End well: both have said goodbye, or have had the time to."""
        if self._unwritten():
            self._ending = self._end
        elif not self._over.done():
            self._over.set_result(None)

    def _unwritten(self) -> bool:
        """Whether something is still to be written to a side that is there."""
        return any(side.unwritten and not side.other.lost for side in (self._client, self._azure))

    def _fail(self, error: ApiError, code: int = 1011) -> None:
        """End by an error, which both sides are told."""
        if not self._over.done():
            self._say_goodbye(code, error.message)
            self._over.set_exception(error)

    def _say_goodbye(self, code: int, reason: str) -> None:
        """Send a close frame to each side that can take one: in the middle of a frame it would be part of it."""
        for side, other in ((self._client, self._azure), (self._azure, self._client)):
            if not side.told and not side.lost and other.between:
                side.told = True
                side.write(encode_close_frame(code, reason, masked=not side.client))
        if self._exchange.close_code is None:
            self._exchange.close_code = code


def error_event(error: ApiError, message: bytes) -> bytes:
    """Return the event that tells a client what is wrong with its message, in the shape of OpenAI's."""
    told: dict[str, Any] = {"type": error.type, "code": error.code, "message": error.message, "param": error.param}
    with contextlib.suppress(ApiError):
        # The rest of a message, which may be long, is not decoded.
        sent = raw_fields(message, ("event_id",)).get("event_id", b"")
        if sent.startswith(b'"') and len(sent) <= _MOST_EVENT_ID:
            told["event_id"] = decode_json(sent, msgspec.json.decode)
    return msgspec.json.encode({"type": "error", "status": error.status, "error": told})
