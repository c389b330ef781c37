"""`sse_newline`: completes the last event of a stream if Azure left out its newline."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gateway import Filter, Next, Request, Response, Stage

LINE_END = re.compile(rb"\r\n|\n|\r")
DONE = (b"data: [DONE]", b"data:[DONE]")
MAX_KEPT = len(DONE[0]) + 1  # bytes of an unfinished line: enough to recognize DONE


@dataclass
class SseNewline(Stage):
    """Complete the last event of every event stream.

    Azure has ended streams with `data: [DONE]` and one newline, or none; readers that follow the standard (WHATWG
    HTML, 9.2.6) then never see that event. The stage completes it as soon as its line is complete, with the stream's
    own line ending, and drops all that follows. It also completes any other event that is open at the end. A correct
    stream passes byte for byte.
    """

    provides = ("events",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream:
            response.pipe(CompleteEvents(partial(request.count, self.id)))
        return response


class CompleteEvents(Filter):
    """Tracks lines just enough to recognize `[DONE]` and an open event; keeps only the start of a line."""

    contains = (b"[DONE]",)

    def __init__(self, count: Callable[[], None] = lambda: None) -> None:
        self._count = count
        self._line = b""  # the start of the current line
        self._ending = b"\n"  # the previous line's ending
        self._ending_known = False  # whether any line has ended yet
        self._open = False  # whether the current event has a field line
        self._has_data = False  # whether it has a data line
        self._cr_line = b""  # the start of the line before that CR
        self._after_cr = False  # whether the previous read ended with a CR, which may be half of a CRLF
        self._done = False
        # The bytes of the blank line after `[DONE]` that were sent to the client and have not arrived from Azure yet.
        self._missing = b""

    def feed(self, data: bytes) -> bytes:
        if self._done:
            self._compare(data)
            return b""
        # Fast path, nearly every read: whole events, none of them the last one.
        if not (self._line or self._after_cr) and b"[DONE]" not in data:
            ending = b"\n" if data.endswith(b"\n\n") else b"\r\n" if data.endswith(b"\r\n\r\n") else None
            if ending is not None:
                self._open = self._has_data = False
                self._ending, self._ending_known = ending, True
                self.between = ending == b"\n"
                return data
        return self._feed_lines(data)

    def _feed_lines(self, data: bytes) -> bytes:
        if not data:
            return data
        self.between = False
        position = 0
        if self._after_cr:
            # Only now it is known whether that CR was half of a CRLF.
            self._after_cr = False
            position = 1 if data.startswith(b"\n") else 0
            self._ending = b"\r\n" if position else b"\r"
            if self._end_line(self._cr_line):
                return data[:position] + self._finish(data[position:])
        while (found := LINE_END.search(data, position)) is not None:
            line = (self._line + data[position : min(found.start(), position + MAX_KEPT)])[:MAX_KEPT]
            self._line = b""
            ending = found.group()
            if ending == b"\r" and found.end() == len(data):
                if line in DONE and not self._has_data and self._ending_known and self._ending != b"\n":
                    # The stream's line ending (CRLF or CR) is known, so the last event need not wait.
                    rest = b"\n" if self._ending == b"\r\n" else b""
                    self._missing = rest
                    return data + rest + self._finish(b"")
                self._cr_line, self._after_cr = line, True
                return data
            position = found.end()
            self._ending, self._ending_known = ending, True
            if self._end_line(line):
                return data[:position] + self._finish(data[position:])
        self._line = (self._line + data[position : position + MAX_KEPT])[:MAX_KEPT]
        return data

    def _end_line(self, line: bytes) -> bool:
        """Process a complete line; return True for the last one."""
        self._ending_known = True
        if not line:
            self._open = self._has_data = False
        elif line in DONE and not self._has_data:
            return True
        elif not line.startswith(b":"):
            self._open = True
            self._has_data = self._has_data or line.startswith(b"data")
        return False

    def _finish(self, rest: bytes) -> bytes:
        """Return the blank line that completes the last event; `rest` is the data after the event's line."""
        self._done = True
        self._missing += self._ending
        self._compare(rest)
        return self._ending

    def _compare(self, data: bytes) -> None:
        """Compare data from Azure with the missing blank line: if it differs, the stage has repaired the end."""
        if self._missing and data:
            size = min(len(data), len(self._missing))
            if data[:size] == self._missing[:size]:
                self._missing = self._missing[size:]
            else:
                self._count_repair()

    def _count_repair(self) -> None:
        self._missing = b""
        self._count()

    def close(self) -> bytes:
        completion = self._completion()
        if completion or self._missing:
            self._count_repair()
        return completion

    def _completion(self) -> bytes:
        """Return the bytes that complete an event that is open at the end."""
        if self._done:
            return b""
        if self._after_cr:
            # The CR ended a line: as a CR if no other ending was seen, else as half of a CRLF.
            line, self._after_cr = self._cr_line, False
            rest = b"\n" if self._ending == b"\r\n" else b""
            if not rest:
                self._ending = b"\r"
            if self._end_line(line) or self._open:
                return rest + self._ending
            return b""
        if self._line and (self._open or not self._line.startswith(b":")):
            return self._ending * 2
        if self._line:
            return b""
        return self._ending if self._open else b""
