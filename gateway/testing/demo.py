"""`gateway demo`: the shipped configuration in front of a fake Azure."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.process.server_process import serve
from gateway.server import Server
from gateway.settings import Listen
from gateway.testing.azure import FakeAzure

__all__ = ("demonstrate",)

_SPEECH = (
    "Hello! This is a fake Azure OpenAI on your own machine; nothing left it. With AZURE_OPENAI_ENDPOINT set to "
    "your resource, the same gateway talks to the real one."
)
# The models of the demo; each deployment has another name.
MODELS = (
    "gpt-4o", "gpt-3.5-turbo-instruct", "text-embedding-3-small", "gpt-4o-mini-tts", "whisper-1", "gpt-image-1",
    "gpt-4o-batch", "sora-2", "gpt-realtime",
)  # fmt: skip


async def demonstrate(listen: Listen, default: Path) -> None:
    """Run the shipped configuration in front of a fake Azure, until SIGTERM."""
    from gateway.config import load  # noqa: PLC0415 -- the configuration imports stages, which tests may replace

    words = re.findall(r"\s*\S+", _SPEECH)
    async with FakeAzure(
        api_key="demo-key", deployments=[f"my-{name}" for name in MODELS], words=words, delay=0.05
    ) as azure:
        loaded = load(
            default,
            {
                "AZURE_OPENAI_ENDPOINT": azure.endpoint,
                "AZURE_OPENAI_MODEL_MAPPER": ",".join(f"{name}=my-{name}" for name in MODELS),
                "GATEWAY_LISTEN": str(listen),
            },
        )
        server = Server(loaded.teams, loaded.settings)

        def print_help() -> None:
            print(
                "AZURE_OPENAI_ENDPOINT is not set, so this gateway uses a FAKE Azure OpenAI: no model answers, and\n"
                "nothing leaves this machine. Stream a response from another terminal:\n\n"
                f"  curl -N http://{listen}/v1/chat/completions -H 'Authorization: Bearer demo-key' \\\n"
                "    -H 'Content-Type: application/json' \\\n"
                '    -d \'{"model": "gpt-4o", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}\'\n',
                flush=True,
            )

        await serve(server, print_help)
