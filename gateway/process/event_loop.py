"""The event loop: the fastest one that is installed (the extra `speed` installs all of them)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ("loop_factory", "run")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a factory of loops: uvloop's if it is installed, with aiofastnet's TLS if that is.

    aiofastnet replaces only TLS connections, those to Azure: an event of a stream costs less than half with it.
    For plain connections it gains nothing over uvloop (docs/performance.md).
    """
    base: Any = asyncio.SelectorEventLoop
    try:
        import uvloop  # noqa: PLC0415 -- optional
    except ImportError:
        pass
    else:
        base = uvloop.Loop
    try:
        import aiofastnet  # noqa: PLC0415 -- optional
    except ImportError:
        return base  # type: ignore[no-any-return]

    class FastTls(base):  # type: ignore[misc] # one of two, chosen above
        """A loop that uses aiofastnet for TLS connections."""

        async def create_connection(self, protocol_factory: Any, *args: Any, ssl: Any = None, **kwargs: Any) -> Any:
            if ssl is None:
                return await super().create_connection(protocol_factory, *args, **kwargs)
            return await aiofastnet.create_connection(self, protocol_factory, *args, ssl=ssl, **kwargs)

    return FastTls


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine on such a loop, until it returns."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())
