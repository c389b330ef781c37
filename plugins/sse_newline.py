"""`sse_newline`: an event stream ends as its readers expect, also where Azure left the last newline out."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gateway import Filter, Next, Request, Response, Stage

LINE = re.compile(rb"\r\n|\n|\r")
DONE = (b"data: [DONE]", b"data:[DONE]")
KEPT = len(DONE[0]) + 1  # of an unfinished line: enough to tell whether it is one of DONE


@dataclass
class SseNewline(Stage):
    """Complete the last event of every event stream.

    Azure has ended streams with `data: [DONE]` and one newline, or none; readers that go by the standard
    (WHATWG HTML, 9.2.6) then never see it. The event is completed the moment its line is there, in the
    stream's own line ending, and what follows it is dropped. Any other event still open at the end is
    completed too. A stream that ends rightly passes unchanged to the byte.
    """

    provides = ("events",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream:
            response.pipe(CompleteEvents(partial(request.count, self.id)))
        return response


class CompleteEvents(Filter):
    """Follows lines just closely enough to know `[DONE]` and an open event; keeps no more than a line's start."""

    contains = (b"[DONE]",)

    def __init__(self, count: Callable[[], None] = lambda: None) -> None:
        self._count = count
        self._line = b""  # the start of the line that has not ended yet
        self._ending = b"\n"  # how the last line ended
        self._styled = False  # whether a line has ended yet
        self._open = False  # whether the event in progress has a field line
        self._data = False  # whether it has a data line
        self._half = b""  # a CR at the end of a read, which may be half a CRLF: b"" or the line before it
        self._waits = False
        self._over = False
        self._owed = b""  # of the blank line behind `[DONE]`, which was sent: what Azure has not sent of it yet

    def feed(self, data: bytes) -> bytes:
        if self._over:
            self._check(data)
            return b""
        # Nearly every read of nearly every stream: whole events, none of them the last.
        if not (self._line or self._waits) and b"[DONE]" not in data:
            ending = b"\n" if data.endswith(b"\n\n") else b"\r\n" if data.endswith(b"\r\n\r\n") else None
            if ending is not None:
                self._open = self._data = False
                self._ending, self._styled = ending, True
                self.between = ending == b"\n"
                return data
        return self._follow(data)

    def _follow(self, data: bytes) -> bytes:
        if not data:
            return data
        self.between = False
        place = 0
        if self._waits:
            # The last read ended with a CR; only now is it known what it was.
            self._waits = False
            place = 1 if data.startswith(b"\n") else 0
            self._ending = b"\r\n" if place else b"\r"
            if self._end_line(self._half):
                return data[:place] + self._finish(data[place:])
        while (found := LINE.search(data, place)) is not None:
            line = (self._line + data[place : min(found.start(), place + KEPT)])[:KEPT]
            self._line = b""
            ending = found.group()
            if ending == b"\r" and found.end() == len(data):
                if line in DONE and not self._data and self._styled and self._ending != b"\n":
                    # In a stream of CRLF or of CR it is clear what this CR is: the last event need not wait.
                    rest = b"\n" if self._ending == b"\r\n" else b""
                    self._owed = rest
                    return data + rest + self._finish(b"")
                self._half, self._waits = line, True
                return data
            place = found.end()
            self._ending, self._styled = ending, True
            if self._end_line(line):
                return data[:place] + self._finish(data[place:])
        self._line = (self._line + data[place : place + KEPT])[:KEPT]
        return data

    def _end_line(self, line: bytes) -> bool:
        """Note a line that has ended; True if it is the last one."""
        self._styled = True
        if not line:
            self._open = self._data = False
        elif line in DONE and not self._data:
            return True
        elif not line.startswith(b":"):
            self._open = True
            self._data = self._data or line.startswith(b"data")
        return False

    def _finish(self, behind: bytes) -> bytes:
        """Return the blank line that completes the last event; `behind` is what came behind it."""
        self._over = True
        self._owed += self._ending
        self._check(behind)
        return self._ending

    def _check(self, data: bytes) -> None:
        """See whether Azure sends that blank line, too: if it does not, the end was mended."""
        if self._owed and data:
            size = min(len(data), len(self._owed))
            if data[:size] == self._owed[:size]:
                self._owed = self._owed[size:]
            else:
                self._mended()

    def _mended(self) -> None:
        self._owed = b""
        self._count()

    def close(self) -> bytes:
        left = self._left()
        if left or self._owed:
            self._mended()
        return left

    def _left(self) -> bytes:
        """Return what completes the event that is open at the end."""
        if self._over:
            return b""
        if self._waits:
            # It was the end of a line: of CR where the stream has shown no other, else half of a CRLF.
            line, self._waits = self._half, False
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
