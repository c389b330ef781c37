"""The relay of a WebSocket: it forwards the frames of each side to the other, until both have sent a close frame.

Frames are forwarded as they arrive, masks included, unless a filter reads messages. Pings, pongs, and close frames with
their codes are forwarded, too. If a side does not read fast enough, reading from the other pauses. If a side
disconnects or sends an invalid frame, the other gets a close frame. Pings of the gateway's own (`websocket_ping.py`)
find sides that are gone; their pongs are not forwarded.

Rule 1: a turn of the loop handles a bounded number of bytes and frames of a side (`fair_scheduler.py`). Reading pauses
until the rest is handled, and frames that were received are forwarded even if their side disconnects.
Rule 2: memory is bounded. Messages are kept for filters only, up to `MAX_KEPT_MESSAGE`; the exchange holds their bytes
until the last one is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from gateway.errors import ApiError, UpstreamError, UpstreamTimeout
from gateway.exchange import Exchange
from gateway.fair_scheduler import SMALL, STEP, FairScheduler
from gateway.logs import exception_fields, get_logger, redacted
from gateway.protocol.filters import EventFilter, run_filters
from gateway.protocol.sse import Event
from gateway.protocol.websocket_frames import (
    CLOSE,
    PONG,
    TEXT,
    Control,
    FrameError,
    FrameWriter,
    Message,
    PassedFrames,
    encode_close_frame,
    encode_frame,
)
from gateway.transport.client_connection import ClientConnection
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.websocket_messages import MessageEvent, error_event
from gateway.transport.websocket_ping import KeepAlivePings
from gateway.transport.websocket_side import BACKPRESSURE, PENDING_INPUT, PENDING_REPLIES, RelaySide
from gateway.transport.write_timeout import WriteTimeout

__all__ = ("WebSocketRelay",)

# For how long, in seconds, a side may take to answer a close frame.
_CLOSE_TIMEOUT = 10.0


class WebSocketRelay:
    """Both directions of one WebSocket."""

    def __init__(
        self,
        connection: ClientConnection,
        upstream: UpstreamConnection,
        exchange: Exchange,
        request_id: str,
        *,
        up: Sequence[EventFilter],
        down: Sequence[EventFilter],
        max_message: int,
        ping_interval: float,
        client_timeout: float,
        idle_timeout: float,
        secrets: Sequence[str],
        watch: Callable[[bytes], None] | None = None,
    ) -> None:
        """Relay between a client and Azure, with the filters `up` to Azure and `down` to the client.

        `client_timeout` and `idle_timeout` are write timeouts in seconds, for the client and for Azure. The log has no
        `secrets`. `watch` gets the bytes that Azure sends.
        """
        self._connection = connection
        self._upstream = upstream
        self._exchange = exchange
        self._request_id = request_id
        self._client_timeout = client_timeout
        self._idle_timeout = idle_timeout
        self._secrets = list(secrets)
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self.scheduler = FairScheduler.of(self._loop)
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._client = RelaySide(
            self.scheduler, client=True, filters=up, max_message=max_message, write=self._to_client,
            pause=lambda check: connection.pause_input(check_disconnect=check), resume=connection.resume_input,
            handle=self._handle_pending, is_over=self._is_over,
        )  # fmt: skip
        self._azure = RelaySide(
            self.scheduler, client=False, filters=down, max_message=max_message, write=self._to_azure,
            pause=lambda check: upstream.hold_relay(), resume=upstream.release_relay,
            handle=self._handle_pending, is_over=self._is_over,
        )  # fmt: skip
        self._client.other, self._azure.other = self._azure, self._client
        self._sides = (self._client, self._azure)
        self._pings = KeepAlivePings(self._loop, ping_interval, self._sides, self._silent)
        self._close_timer: asyncio.TimerHandle | None = None
        self._when_written: Callable[[], None] | None = None  # ends the relay
        self._client_left = False  # and some of its frames are not handled yet

    @property
    def over(self) -> bool:
        """Whether the relay has ended."""
        return self._over.done()

    def _is_over(self) -> bool:
        return self._over.done()

    @property
    def azure_held(self) -> bool:
        """Whether reading from Azure is paused."""
        return bool(self._azure.pause_reasons)

    async def run(self) -> None:
        """Relay to the end, and close both connections. Raises the error that ended it, if close frames did not."""
        self._pings.start()
        try:
            self._connection.start_relay(self.from_client, self.client_flow)
            self._upstream.start_relay(self)
            await self._over
        except asyncio.CancelledError:
            # The transport is gone only if the client disconnected; else the gateway is stopping.
            left = self._connection.transport is None
            self._client.lost = left
            if left and self._client.has_pending_input and self._over.cancelled():
                await self._drain_client()
            self._send_close_frames(
                1001, "The client disconnected." if left else "The gateway is shutting down. Reconnect."
            )
            raise
        finally:
            self._pings.stop()
            for timer in (self._close_timer, self._client.write_timer, self._azure.write_timer):
                if timer is not None:
                    timer.cancel()
            self._exchange.count("messages_up", self._client.messages)
            self._exchange.count("messages_down", self._azure.messages)
            for side in self._sides:
                self.scheduler.remove(side)
                self._exchange.release_memory(side.held)
                side.held = 0
            self._connection.stop_relay()
            self._upstream.end_relay(_CLOSE_TIMEOUT)
            if not self._over.cancel() and not self._over.cancelled():
                self._over.exception()  # marks it as retrieved: a cancelled `run` does not await it
            self._release_memory()

    def _release_memory(self) -> None:
        """Release messages now: the garbage collector may find the cycles of references much later."""
        self._over = self._loop.create_future()  # the old one may have an exception, whose frames refer to this relay
        self._over.cancel()
        self._when_written = None
        for side in self._sides:
            side.write_timer = None
            side.frames.drop()
            side.unwritten.clear()
            side.replies.clear()

    async def _drain_client(self) -> None:
        """Forward the remaining frames of a client that disconnected, for `_CLOSE_TIMEOUT` seconds at most."""
        self._over = self._loop.create_future()  # the old one was cancelled with the task
        self._client_left = True
        self._write_replies(self._client)
        for side in self._sides:
            if side.may_continue:
                self.scheduler.add(side)
        await asyncio.wait((self._over,), timeout=_CLOSE_TIMEOUT)

    # -- input -----------------------------------------------------------------------------------------

    def from_client(self, data: bytes) -> None:
        """Receive bytes from the client."""
        self._receive(self._client, data)

    def from_azure(self, data: bytes) -> None:
        """Receive bytes from Azure."""
        if self._watch is not None:
            self._watch(data)
        self._receive(self._azure, data)

    def azure_lost(self) -> None:
        """Record that Azure closed the connection. Frames that were received are still forwarded."""
        self._azure.lost = True
        if not self._azure.has_pending_input:
            self._end_without_azure()

    def _end_without_azure(self) -> None:
        if self._azure.frames.closed:
            self._complete()
        elif self._client.frames.closed:
            self._close_unanswered()
        else:
            self._fail(UpstreamError("Azure closed the WebSocket without a close frame. Reconnect."))

    def _receive(self, side: RelaySide, data: bytes) -> None:
        if self._over.done() or side.frames.closed:
            return
        side.active, side.ping_sent = True, False
        if side.pause_reasons:
            side.frames.keep(data)
            side.pause(PENDING_INPUT)
        elif len(data) > SMALL and not self.scheduler.may_handle(len(data)):
            side.frames.keep(data)
            side.pause(PENDING_INPUT)
            self.scheduler.add(side)
        else:
            self._parse(side, data)
            self._after_frames(side)
            if side.may_continue:
                self.scheduler.add(side)

    def _handle_pending(self, side: RelaySide) -> None:
        """Handle a bounded part of a side's received bytes and of its unwritten output, in a turn of its own."""
        if not side.unwritten:
            self._parse(side, b"")
        left = STEP
        while left > 0 and side.unwritten and side.may_continue:
            first = side.unwritten[0]
            piece = first if isinstance(first, bytes) else first.piece(STEP)
            if isinstance(first, bytes) or first.done:
                side.unwritten.popleft()
            left -= len(piece)
            side.other.write(piece)
        self._after_frames(side)

    def _parse(self, side: RelaySide, data: bytes) -> None:
        """Parse and forward the next frames of a side."""
        try:
            for each in side.frames.feed(data):
                if isinstance(each, PassedFrames):
                    side.messages += each.messages
                    self._forward(side, each.data)
                elif isinstance(each, Message):
                    side.messages += 1
                    self._filter(side, each)
                else:
                    self._handle_control(side, each)
        except FrameError as exc:
            self._fail_by_frame(side, exc)
        except ApiError as exc:
            self._fail(exc)
        except Exception as exc:
            get_logger().error(
                "filter_failed", request_id=self._request_id, **redacted(exception_fields(exc), self._secrets)
            )
            self._fail(
                ApiError(
                    500,
                    "The gateway failed on this message. Contact its operator and quote request id "
                    f"{self._request_id}.",
                )
            )

    def _after_frames(self, side: RelaySide) -> None:
        """After a step: update the bytes that the exchange holds, and wait for the next step, or end the relay."""
        if self._over.done() or not self._hold_memory(side):
            return
        self._write_replies(side.other)
        if side.unwritten or side.frames.unread:
            side.pause(PENDING_INPUT)
            return
        side.resume(PENDING_INPUT)
        if (error := side.frames.error) is not None:
            self._fail_by_frame(side, error)
        elif self._when_written is not None:
            self._when_written()
        elif side.client:
            if self._client_left:
                self._complete()
        elif side.lost:
            self._end_without_azure()

    def _hold_memory(self, side: RelaySide) -> bool:
        """Hold the bytes of a side's messages in the exchange; return False, and fail, if it has no room."""
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

    def _handle_control(self, side: RelaySide, control: Control) -> None:
        other = side.other
        if control.opcode != CLOSE:
            side.controls.take(self._loop.time())
            if control.opcode != PONG or control.payload != self._pings.payload:
                self._forward(side, control.raw)
            return
        for index, each in enumerate(side.filters):
            for left in each.close():
                self._forward_events(side, TEXT, run_filters(side.filters, left, index + 1))
        self._write_replies(other, last=True)  # no message may follow a close frame
        if self._exchange.close_code is None:
            self._exchange.close_code = control.code or 1005
        if not other.close_sent:
            other.close_sent = True
            self._forward(side, control.raw)
        if other.frames.closed:
            self._complete()
        elif self._close_timer is None:
            self._close_timer = self._loop.call_later(_CLOSE_TIMEOUT, self._close_unanswered)

    def _filter(self, side: RelaySide, message: Message) -> None:
        event = MessageEvent(message.payload)
        try:
            events = list(run_filters(side.filters, event))
        except ApiError as exc:
            if not side.client:
                raise
            # The client gets an error event, as from the API itself, and may continue.
            side.replies.append(encode_frame(TEXT, error_event(exc, message.payload), masked=False))
            self._write_replies(side)
            return
        self._forward_events(side, message.opcode, events)

    # -- output ----------------------------------------------------------------------------------------

    def _write_replies(self, side: RelaySide, *, last: bool = False) -> None:
        """Write the gateway's own messages to a side, if it is writable and no forwarded message is in progress.

        Until then reading from that side pauses, so that no more of them are needed. `last`: a close frame follows, so
        that this is the last chance to write them.
        """
        if side.lost:
            side.replies.clear()
            side.resume(PENDING_REPLIES)
        if not side.replies or side.close_sent:
            return
        at_boundary = side.other.at_message_boundary
        if (side.writable and at_boundary) or last:
            replies, side.replies = b"".join(side.replies), []
            if at_boundary:
                side.write(replies)
            elif side.other.unwritten:
                side.other.unwritten.append(replies)
            side.resume(PENDING_REPLIES)
        else:
            side.pause(PENDING_REPLIES)

    def _forward_events(self, side: RelaySide, opcode: int, events: Iterable[Event]) -> None:
        """Forward messages from a side to the other; a large one in pieces, in later turns."""
        masked = side.client
        for each in events:
            if len(each.raw) > STEP:
                side.unwritten.append(FrameWriter(opcode, each.raw, masked=masked))
            else:
                self._forward(side, encode_frame(opcode, each.raw, masked=masked))

    def _forward(self, side: RelaySide, data: bytes) -> None:
        """Forward bytes from a side to the other, after the unwritten ones."""
        if side.unwritten:
            side.unwritten.append(data)
        else:
            side.other.write(data)

    def _to_client(self, data: bytes) -> None:
        self._exchange.sent += len(data)
        self._connection.write(data)

    def _to_azure(self, data: bytes) -> None:
        if self._upstream.is_connected():
            self._upstream.transport.write(data)  # type: ignore[union-attr] # it is connected

    # -- backpressure ----------------------------------------------------------------------------------

    def client_flow(self, paused: bool) -> None:
        """Pause or resume reading from Azure, because the client does not read fast enough, or does again."""
        self._flow(self._client, paused)

    def azure_flow(self, paused: bool) -> None:
        """Pause or resume reading from the client, because Azure does not read fast enough, or does again."""
        self._flow(self._azure, paused)

    def _flow(self, side: RelaySide, paused: bool) -> None:
        if side.write_timer is not None:
            side.write_timer.cancel()
            side.write_timer = None
        side.writable = not paused
        if paused:
            side.other.pause(BACKPRESSURE)
            if side.client:
                side.write_timer = WriteTimeout(self._connection, self._client_timeout, self._client_timed_out)
            else:
                side.write_timer = self._loop.call_later(self._idle_timeout, self._azure_timed_out)
        else:
            side.other.resume(BACKPRESSURE)
            self._write_replies(side)

    def _client_timed_out(self) -> None:
        self._exchange.error = "client_not_reading"
        self._client.lost = True
        if self._connection.transport is not None:
            self._connection.transport.abort()

    def _azure_timed_out(self) -> None:
        self._fail(UpstreamTimeout(f"Azure read no bytes of the WebSocket for {self._idle_timeout:g} s. Reconnect."))

    # -- the end ---------------------------------------------------------------------------------------

    def _complete(self) -> None:
        """End without an error, once all is written: both sides have sent a close frame, or had the time to."""
        if self._has_unwritten():
            self._when_written = self._complete
        elif not self._over.done():
            self._over.set_result(None)

    def _close_unanswered(self) -> None:
        """End without an error, although one side has not answered the other's close frame."""
        if self._has_unwritten():
            self._when_written = self._close_unanswered
            return
        code = self._exchange.close_code or 1000
        self._send_close_frames(code if code != 1005 else 1000, "")
        self._complete()

    def _has_unwritten(self) -> bool:
        """Whether there is unwritten output for a side that is connected."""
        return any(side.unwritten and not side.other.lost for side in self._sides)

    def _silent(self, side: RelaySide) -> None:
        """Fail because a side has not answered a ping."""
        seconds = f"{2 * self._pings.interval:g} s"
        if side.client:
            silent = ApiError(408, f"The client sent no bytes for {seconds}, not even a pong.", code="request_timeout")
            self._fail(silent, code=1001)
        else:
            self._fail(UpstreamTimeout(f"Azure sent no bytes for {seconds}, not even a pong. Reconnect."))

    def _fail_by_frame(self, side: RelaySide, error: FrameError) -> None:
        """Fail because of an invalid frame."""
        if side.client:
            code = {1008: "policy_violation", 1009: "message_too_large"}.get(error.code, "malformed_frame")
            self._fail(ApiError(400, error.reason, code=code), code=error.code)
        else:
            self._fail(UpstreamError(f"Azure sent an invalid WebSocket frame: {error.reason}"))

    def _fail(self, error: ApiError, code: int = 1011) -> None:
        """End with an error, which both sides get in a close frame."""
        if not self._over.done():
            self._send_close_frames(code, error.message)
            self._over.set_exception(error)

    def _send_close_frames(self, code: int, reason: str) -> None:
        """Write a close frame to each side, unless it would become a part of a forwarded frame."""
        for side in self._sides:
            if not side.close_sent and not side.lost and side.other.at_frame_boundary:
                side.close_sent = True
                side.write(encode_close_frame(code, reason, masked=not side.client))
        if self._exchange.close_code is None:
            self._exchange.close_code = code
