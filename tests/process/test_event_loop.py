"""The event loop, with and without the optional libraries."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import aiofastnet
import pytest
import uvloop

from gateway.process.event_loop import run

MISSING = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
import asyncio
from gateway.process.event_loop import loop_factory
loop = loop_factory()()
print([cls.__module__.partition(".")[0] for cls in type(loop).__mro__[:2]])
loop.close()
"""


@pytest.mark.parametrize(
    ("missing", "made_of"),
    [
        ([], ["gateway", "uvloop"]),
        (["aiofastnet"], ["uvloop", "uvloop"]),
        (["uvloop"], ["gateway", "asyncio"]),
        (["uvloop", "aiofastnet"], ["asyncio", "asyncio"]),
    ],
)
def test_what_is_installed_is_used(missing: list[str], made_of: list[str]) -> None:
    """Uvloop is the loop if it is installed, aiofastnet its TLS; neither is required."""
    program = MISSING.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(made_of)


def test_tls_alone_is_aiofastnet_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain connection uses the loop."""
    used: list[object] = []

    async def create_connection(loop: object, *args: object, **kwargs: object) -> None:
        used.append(kwargs["ssl"])
        raise ConnectionRefusedError

    monkeypatch.setattr(aiofastnet, "create_connection", create_connection)

    async def main() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port)
        transport.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", port, ssl=True)
        server.close()

    run(main)
    assert used == [True]
