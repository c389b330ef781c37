"""Python's requests before 2.29, which sends chunks of a generator's body in packets that cut their framing."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from gateway.testing import FakeAzure
from tests.conftest import KEY, StartGateway
from tests.test_docs import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [auth_passthrough, {model_map: {unmapped: own_name}}, api_version: 2025-04-01-preview]
"""
UPLOADS = """
import json, sys, time, requests
url, key = sys.argv[1:]
assert requests.__version__ == "2.28.2"
before = b'--XB\\r\\nContent-Disposition: form-data; name="model"\\r\\n\\r\\ngpt-4o\\r\\n--XB\\r\\n'
before += b'Content-Disposition: form-data; name="file"; filename="a.wav"\\r\\n\\r\\n'
def parts(number):
    yield before
    for _ in range(30):
        time.sleep(0.001)
        yield bytes([number]) * 65536
    yield b"\\r\\n--XB--\\r\\n"
headers = {"Authorization": f"Bearer {key}", "Content-Type": "multipart/form-data; boundary=XB"}
session = requests.Session()
made = [session.post(url, data=parts(number), headers=headers).status_code for number in range(20)]
print(json.dumps([made, len(before)]))
"""


async def test_requests_2_28_uploads_a_generator_s_body(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Twenty uploads on one connection: each arrives complete at Azure."""
    gateway = await start_gateway(azure.endpoint, YAML)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", UPLOADS, f"{gateway.url}/v1/audio/transcriptions", KEY),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".venv" / "clients")},
    )
    out, err = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, err.decode()
    statuses, before = json.loads(out)
    assert statuses == [200] * 20
    for number, seen in enumerate(azure.requests):
        assert len(seen.body) == before + 30 * 65536 + len(b"\r\n--XB--\r\n")
        assert seen.body[before:-10] == bytes([number]) * (30 * 65536)
