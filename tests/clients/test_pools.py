"""openai-python without retries, in front of a pool whose regions fail one after another."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.cluster import Fault, cluster, pool_yaml
from tests.conftest import CHAT, StartGateway

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]

FAULTS: list[Fault] = ["limited", "error", "broken", "mute", "stalled", "error_in_stream", "no_deployment"]


async def test_the_client_notices_nothing(start_gateway: StartGateway) -> None:
    """Each call succeeds, plain and streaming, whatever the fault of one region."""
    async with cluster("east", "west", "north") as regions:
        yaml = pool_yaml(regions, top="health: {rest: 0.2, most_rest: 1}")
        yaml = yaml.replace("api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 0.3}}")
        gateway = await start_gateway(
            "", yaml.replace("  - openai_errors", "  - prompt_filter_chunk\n  - openai_errors")
        )
        messages: Any = CHAT["messages"]
        async with openai.AsyncOpenAI(api_key="x", base_url=f"{gateway.url}/v1", max_retries=0) as client:

            async def plain() -> str | None:
                answer = await client.chat.completions.create(model="gpt-4o", messages=messages)
                return answer.choices[0].message.content

            async def streamed() -> str:
                stream = await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            for place, fault in enumerate(FAULTS):
                region = list(regions.values())[place % 3]
                region.fault = fault
                answers = await asyncio.gather(*(each() for each in (plain, streamed) * 6))
                assert set(answers) == {"Hello there!"}, fault
                region.fault = None


async def test_when_all_say_no_it_raises_what_tells_most(start_gateway: StartGateway) -> None:
    """A RateLimitError with the time of the next try."""
    async with cluster("east", "west") as regions:
        regions["east"].fault, regions["west"].fault, regions["west"].rest = "error", "limited", 17
        gateway = await start_gateway("", pool_yaml(regions, settings="{wait: 0}"))
        messages: Any = CHAT["messages"]
        async with openai.AsyncOpenAI(api_key="x", base_url=f"{gateway.url}/v1", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="gpt-4o", messages=messages)
            assert caught.value.response.headers["retry-after"] == "17"
