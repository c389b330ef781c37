"""Limits of a WebSocket: the size of messages, and the number of pings and pongs."""

from __future__ import annotations

from gateway.protocol.websocket_frames import FrameError

__all__ = ("MAX_DECODED_MESSAGE", "MAX_KEPT_MESSAGE", "ControlFrameLimit")

MAX_KEPT_MESSAGE = 21 * 1024 * 1024
"""The largest message that is kept in memory for filters, in bytes.

An event of the Realtime API may have 15 MiB of audio (OpenAI's reference, `input_audio_buffer.append`), which is 20 MiB
in base64.
"""
MAX_DECODED_MESSAGE = 4 * 1024 * 1024
"""The largest message that filters may decode into objects, in bytes: objects can take 50 times its memory."""
# The token bucket for pings and pongs: its capacity, and its refill per second. Clients and servers send one every 10
# or 20 seconds; after a pause in reading, several arrive together.
_CONTROL_FRAMES = 100
_CONTROL_FRAMES_PER_SECOND = 20


class ControlFrameLimit:
    """A token bucket for the pings and pongs of one side."""

    __slots__ = ("_left", "_refilled_at")

    def __init__(self) -> None:
        self._left = float(_CONTROL_FRAMES)
        self._refilled_at = 0.0

    def take(self, now: float) -> None:
        """Count a frame at a time in seconds. Raises FrameError if there are too many."""
        refill = (now - self._refilled_at) * _CONTROL_FRAMES_PER_SECOND
        self._left = min(_CONTROL_FRAMES, self._left + refill) - 1
        self._refilled_at = now
        if self._left < 0:
            raise FrameError(
                1008,
                f"too many pings and pongs; the limit is {_CONTROL_FRAMES} at once and {_CONTROL_FRAMES_PER_SECOND} "
                "per second",
            )
