"""A WebSocket through the gateway: what either side sends goes to the other, until both have said goodbye.

Frames go on as they come, mask and all, unless a filter reads messages. Pings, pongs, and close frames with their
codes go through. A side that does not read makes the other wait. Where one side is lost, or sends what is no frame,
the other is told by a close frame. A side that has been silent for a while is asked by a ping of the gateway's own
whether it is there; the answer goes no further.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import ApiError, UpstreamError, UpstreamTimeout
from gateway.exchange import failure
from gateway.frames import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Control,
    Frames,
    Message,
    Passed,
    close_frame,
    frame,
)
from gateway.jsonbody import decoded_json, encoded_json, raw_fields
from gateway.logs import get_logger, masked
from gateway.patience import Patience
from gateway.stream import Event, EventFilter, through

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.exchange import Exchange
    from gateway.wire import Wire

__all__ = ("MessageEvent", "Relay", "error_event")

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

    def set_json(self, content: object) -> None:
        """Replace the message."""
        self.raw = encoded_json(content)
        self._json = content
        self._parsed = True


class _Side:
    """One of the two ends: how it is read, written to, and made to wait."""

    def __init__(
        self,
        *,
        client: bool,
        filters: Sequence[EventFilter],
        most: int,
        write: Callable[[bytes], None],
        hold: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self.client = client
        self.filters = filters  # on what it sends
        self.frames = Frames(masked=client, most=most, whole=bool(filters))
        self.write = write
        self._hold = hold
        self._release = release
        self.holders: set[str] = set()  # why nothing is taken from it for now
        self.taking = True  # what is written to it
        self.answers: list[bytes] = []  # messages of the gateway's own for it, until they may be put
        self.heard = True
        self.pinged = False
        self.lost = False
        self.told = False  # it was sent a close frame
        self.messages = 0  # that it has sent
        self.timer: asyncio.TimerHandle | Patience | None = None  # while it takes nothing

    def hold(self, why: str) -> None:
        """Take nothing more from it, until `release` for the same reason."""
        if not self.holders:
            self._hold()
        self.holders.add(why)

    def release(self, why: str) -> None:
        """Go on taking, unless there is another reason not to."""
        if why in self.holders:
            self.holders.remove(why)
            if not self.holders:
                self.heard = True
                self._release()


class Relay:
    """The two directions of one WebSocket."""

    def __init__(
        self,
        connection: Connection,
        wire: Wire,
        exchange: Exchange,
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
        self._ping = ping
        self._patience = patience  # with a client, and with Azure, that takes nothing
        self._hidden = list(hidden)
        self._watch = watch  # sees what Azure sends
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._client = _Side(
            client=True, filters=up, most=most,
            write=self._to_client, hold=connection.hold, release=connection.release,
        )  # fmt: skip
        self._azure = _Side(
            client=False, filters=down, most=most,
            write=self._to_azure, hold=wire.hold_relay, release=wire.release_relay,
        )  # fmt: skip
        # The payload of the gateway's own pings: no other's, be it a gateway behind this one.
        self._ours = os.urandom(8).hex().encode()
        self._asker: asyncio.TimerHandle | None = None
        self._closer: asyncio.TimerHandle | None = None

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
            self._say_goodbye(1001, "the client left" if left else "the gateway is stopping")
            raise
        finally:
            for timer in (self._asker, self._closer, self._client.timer, self._azure.timer):
                if timer is not None:
                    timer.cancel()
            self._exchange.count("messages_up", self._client.messages)
            self._exchange.count("messages_down", self._azure.messages)
            self._connection.stop_relay()
            self._wire.end_relay(_CLOSING)
            if self._over.done() and not self._over.cancelled():
                self._over.exception()  # whoever was cancelled meanwhile does not ask for it

    # -- what comes ------------------------------------------------------------------------------------

    def from_client(self, data: bytes) -> None:
        """Take what the client sent."""
        self._take(self._client, self._azure, data)

    def from_azure(self, data: bytes) -> None:
        """Take what Azure sent."""
        if self._watch is not None:
            self._watch(data)
        self._take(self._azure, self._client, data)

    def azure_lost(self) -> None:
        """Note that Azure has closed the connection."""
        self._azure.lost = True
        if self._azure.frames.closed:
            self._end()
        elif self._client.frames.closed:
            self._answer_goodbye()
        else:
            self._fail(UpstreamError("Azure's WebSocket broke off"))

    def _take(self, side: _Side, other: _Side, data: bytes) -> None:
        if self._over.done():
            return
        side.heard, side.pinged = True, False
        try:
            for each in side.frames.feed(data):
                if isinstance(each, Passed):
                    side.messages += each.messages
                    other.write(each.data)
                elif isinstance(each, Message):
                    side.messages += 1
                    self._filter(side, other, each)
                else:
                    self._control(side, other, each)
        except ApiError as exc:
            self._fail(exc)
        except Exception as exc:
            get_logger().error("a filter failed", **masked(failure(exc), self._hidden))
            self._fail(ApiError(500, "the gateway failed on this message"))
        self._tell(other, side)
        if (wrong := side.frames.error) is not None:
            if side.client:
                self._fail(ApiError(400, wrong.reason, code="malformed_frame"), code=wrong.code)
            else:
                self._fail(UpstreamError(f"what Azure sent is no WebSocket frame: {wrong.reason}"))

    def _control(self, side: _Side, other: _Side, control: Control) -> None:
        if control.opcode == PONG and control.payload == self._ours:
            return
        if control.opcode != CLOSE:
            other.write(control.raw)
            return
        for place, each in enumerate(side.filters):
            for left in each.close():
                self._send(other, TEXT, through(side.filters, left, place + 1))
        self._tell(other, side)  # nothing of a message may follow a close frame
        if self._exchange.close_code is None:
            self._exchange.close_code = control.code or 1005
        if not other.told:
            other.told = True
            other.write(control.raw)
        if other.frames.closed:
            self._end()
        elif self._closer is None:
            self._closer = self._loop.call_later(_CLOSING, self._answer_goodbye)

    def _answer_goodbye(self) -> None:
        """End well in the place of a side that does not answer the other's goodbye."""
        code = self._exchange.close_code or 1000
        self._say_goodbye(code if code != 1005 else 1000, "")
        self._end()

    def _filter(self, side: _Side, other: _Side, message: Message) -> None:
        event = MessageEvent(message.payload)
        try:
            events = list(through(side.filters, event))
        except ApiError as exc:
            if not side.client:
                raise
            # The client is told, as the API tells it of what it cannot do, and may go on.
            side.answers.append(frame(TEXT, error_event(exc, message.payload), masked=False))
            self._tell(side, other)
            return
        self._send(other, message.opcode, events)

    def _tell(self, side: _Side, other: _Side) -> None:
        """Write what the gateway itself has to say to a side, as soon as it takes it and no message is in the way.

        Until then nothing more is taken from that side, so that no more is to be said.
        """
        if side.answers and not side.told:
            if side.taking and other.frames.between_messages:
                answers, side.answers = side.answers, []
                side.write(b"".join(answers))
                side.release("answers")
            else:
                side.hold("answers")

    def _send(self, side: _Side, opcode: int, events: Iterable[Event]) -> None:
        for each in events:
            side.write(frame(opcode, each.raw, masked=not side.client))

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
            other.hold("flow")
            if side.client:
                side.timer = Patience(self._connection, self._patience[0], self._client_takes_nothing)
            else:
                side.timer = self._loop.call_later(self._patience[1], self._azure_takes_nothing)
        else:
            other.release("flow")
            self._tell(side, other)

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
            elif other.frames.between:
                side.pinged = True
                side.write(frame(PING, self._ours, masked=not side.client))

    def _silent(self, side: _Side) -> None:
        if side.client:
            silent = ApiError(408, f"the client was silent for {2 * self._ping:g} s", code="request_timeout")
            self._fail(silent, code=1001)
        else:
            self._fail(UpstreamTimeout(f"Azure was silent for {2 * self._ping:g} s"))

    # -- the end ---------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End well: both have said goodbye, or have had the time to."""
        if not self._over.done():
            self._over.set_result(None)

    def _fail(self, error: ApiError, code: int = 1011) -> None:
        """End by an error, which both sides are told."""
        if not self._over.done():
            self._say_goodbye(code, error.message)
            self._over.set_exception(error)

    def _say_goodbye(self, code: int, reason: str) -> None:
        """Send a close frame to each side that can take one: in the middle of a frame it would be part of it."""
        for side, other in ((self._client, self._azure), (self._azure, self._client)):
            if not side.told and not side.lost and other.frames.between:
                side.told = True
                side.write(close_frame(code, reason, masked=not side.client))
        if self._exchange.close_code is None:
            self._exchange.close_code = code


def error_event(error: ApiError, message: bytes) -> bytes:
    """Return the event that tells a client what is wrong with its message, in the shape of OpenAI's."""
    told: dict[str, Any] = {"type": error.type, "code": error.code, "message": error.message, "param": error.param}
    with contextlib.suppress(ApiError):
        # The rest of a message, which may be long, is not decoded.
        sent = raw_fields(message, ("event_id",)).get("event_id", b"")
        if sent.startswith(b'"') and len(sent) <= _MOST_EVENT_ID:
            told["event_id"] = decoded_json(sent, msgspec.json.decode)
    return msgspec.json.encode({"type": "error", "status": error.status, "error": told})
