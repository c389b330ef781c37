"""The deployment's name in place of the model, in forms, JSON, paths and queries; all other bytes stay."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from typing import Any

import pytest

from gateway.testing import FakeAzure
from tests.conftest import KEY, RawUpstream, StartGateway, raw_request, until

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
limits: {body: 1000000000, form: 1000000000}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {models: {gpt-4o: prod-4o, whisper-1: hear, gpt-image-2: paint, sora-2: film}, unmapped: refuse}
  - api_version: VERSION
"""
CLASSIC, V1 = YAML.replace("VERSION", "2025-04-01-preview"), YAML.replace("VERSION", "v1")
BOUNDARY = "----formdata-undici-029384"
AUDIO = bytes(range(256)) * 40 + b"\r\n------formdata\r\n--\r\n"


def form(**fields: str | bytes) -> bytes:
    """Return a form in the order of its fields; bytes are a file."""
    parts = []
    for name, value in fields.items():
        file = isinstance(value, bytes)
        head = f'Content-Disposition: form-data; name="{name}"' + ('; filename="a.wav"' if file else "")
        data = value if isinstance(value, bytes) else value.encode()
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def azure() -> FakeAzure:
    return FakeAzure(deployments=("prod-4o", "hear", "paint", "film"))


HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
ORDERS = [("model", "file", "language"), ("language", "model", "file"), ("file", "language", "model")]


@pytest.mark.parametrize("order", ORDERS, ids=["first", "in the middle", "last"])
async def test_a_form_goes_byte_for_byte_to_the_deployment_in_the_path(
    order: tuple[str, ...], start_gateway: StartGateway
) -> None:
    """On a dated api-version, wherever the field `model` is."""
    fields: dict[str, str | bytes] = {"model": "whisper-1", "file": AUDIO, "language": "en"}
    body = form(**{name: fields[name] for name in order})
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, CLASSIC)
        async with gateway.post("/v1/audio/transcriptions", None, data=body, headers=HEADERS) as answer:
            assert (answer.status, await answer.json()) == (200, {"text": "Hello there!"})
        [seen] = fake.requests
        assert seen.path == "/openai/deployments/hear/audio/transcriptions"
        assert seen.body == body
        assert seen.headers.get("content-type") == HEADERS["Content-Type"]
        assert gateway.exchanges()[0]["model"] == "whisper-1"


@pytest.mark.parametrize("order", ORDERS, ids=["first", "in the middle", "last"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_form_names_the_deployment_on_v1(
    order: tuple[str, ...], chunked: bool, start_gateway: StartGateway
) -> None:
    """In its field; no other byte changes, and Content-Length, if there is one, is correct."""
    fields: dict[str, str | bytes] = {"model": "whisper-1", "file": AUDIO * 20, "language": "en"}
    body = form(**{name: fields[name] for name in order})
    fields["model"] = "hear"
    expected = form(**{name: fields[name] for name in order})

    async def pieces() -> Any:
        for place in range(0, len(body), 10_000):
            yield body[place : place + 10_000]

    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        data = pieces() if chunked else body
        async with gateway.post("/v1/audio/transcriptions", None, data=data, headers=HEADERS) as answer:
            assert answer.status == 200
        [seen] = fake.requests
        assert seen.path == "/openai/v1/audio/transcriptions"
        assert seen.body == expected
        assert seen.headers.get("content-length") in (None, str(len(expected)))


async def test_images_have_no_model_in_the_body_if_the_path_has_the_deployment(start_gateway: StartGateway) -> None:
    """gpt-image-2 rejects it there, in a form and in JSON; on v1 it is the deployment's name."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, CLASSIC)
        body = form(prompt="a cat", model="gpt-image-2", image=AUDIO)
        async with gateway.post("/v1/images/edits", None, data=body, headers=HEADERS) as answer:
            assert answer.status == 200, await answer.text()
        async with gateway.post("/v1/images/generations", {"prompt": "a cat", "model": "gpt-image-2"}) as answer:
            assert answer.status == 200, await answer.text()
        edits, generations = fake.requests
        assert edits.path == "/openai/deployments/paint/images/edits"
        assert edits.body == form(prompt="a cat", image=AUDIO)
        assert generations.json() == {"prompt": "a cat"}
        gateway = await start_gateway(fake.endpoint, V1)
        async with gateway.post("/v1/images/generations", {"prompt": "a cat", "model": "gpt-image-2"}) as answer:
            assert answer.status == 200
        assert fake.requests[2].json() == {"prompt": "a cat", "model": "paint"}


async def test_an_optional_model_may_be_missing(start_gateway: StartGateway) -> None:
    """The request then goes to the team's resource unchanged; a missing required model is a 400."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        body = form(prompt="waves")
        async with gateway.post("/v1/videos", None, data=body, headers=HEADERS) as answer:
            assert answer.status == 404  # the fake knows no default model
        assert fake.requests[0].body == body
        async with gateway.post("/v1/videos", None, data=form(prompt="w", model="sora-2"), headers=HEADERS) as answer:
            assert answer.status == 200
        assert fake.requests[1].body == form(prompt="w", model="film")
        for missing in (gateway.post("/v1/audio/transcriptions", None, data=form(file=AUDIO), headers=HEADERS),
                        gateway.post("/v1/images/generations", {"prompt": "x"})):  # fmt: skip
            async with missing as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["param"] == "model"
        assert len(fake.requests) == 2


async def test_paths_that_name_the_deployment(start_gateway: StartGateway) -> None:
    """Azure clients, and old LangChain: the name in the path is the model, whatever the body has."""
    async with azure() as fake:
        classic = await start_gateway(fake.endpoint, CLASSIC)
        for path in (
            "/openai/deployments/gpt-4o/chat/completions?api-version=2023-05-15",
            "/v1/engines/gpt-4o/embeddings",
        ):
            async with classic.post(path, {"messages": [], "input": "x"}, headers={"api-key": KEY}, key=None) as answer:
                assert answer.status == 200, await answer.text()
        assert [seen.path for seen in fake.requests] == [
            "/openai/deployments/prod-4o/chat/completions",
            "/openai/deployments/prod-4o/embeddings",
        ]
        assert ("api-version", "2025-04-01-preview") in fake.requests[0].query
        fake.requests.clear()
        v1 = await start_gateway(fake.endpoint, V1)
        async with v1.post("/openai/deployments/gpt-4o/chat/completions", {"messages": []}) as answer:
            assert answer.status == 200
        async with v1.post(
            "/openai/deployments/whisper-1/audio/transcriptions", None, data=form(file=AUDIO), headers=HEADERS
        ) as answer:
            assert answer.status == 200, await answer.text()
        chat, audio = fake.requests
        assert chat.json() == {"messages": [], "model": "prod-4o"}
        assert b'name="model"\r\n\r\nhear\r\n' in audio.body
        assert audio.body.endswith(form(file=AUDIO))


async def test_models_inside_a_session(start_gateway: StartGateway) -> None:
    """`session.model` of a client secret, the form's session of a call, or the query of a plain SDP offer."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        session = {"type": "realtime", "model": "gpt-4o", "audio": {"output": {"voice": "x"}}}
        async with gateway.post(
            "/v1/realtime/client_secrets", {"expires_after": {"seconds": 9}, "session": session}
        ) as a:
            assert a.status == 200
        assert fake.requests[0].json() == {"expires_after": {"seconds": 9}, "session": {**session, "model": "prod-4o"}}
        body = form(sdp="v=0", session=json.dumps(session))
        async with gateway.post("/v1/realtime/calls", None, data=body, headers=HEADERS) as a:
            assert a.status == 200
        assert b'"model":"prod-4o"' in fake.requests[1].body
        fields: dict[str, str | bytes] = {"sdp": "v=0", "session[type]": "realtime", "session[model]": "gpt-4o"}
        async with gateway.post("/v1/realtime/calls", None, data=form(**fields), headers=HEADERS) as a:
            assert a.status == 200
        assert fake.requests.pop().body == form(**{**fields, "session[model]": "prod-4o"})
        async with gateway.post(
            "/v1/realtime/calls?a=b&model=gpt-4o", None, data=b"v=0", headers={"Content-Type": "application/sdp"}
        ) as a:
            assert a.status == 200
        assert (fake.requests[2].query, fake.requests[2].body) == ([("a", "b"), ("model", "prod-4o")], b"v=0")


@pytest.mark.parametrize("size", [100, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("keep", [False, True], ids=["streamed", "kept"])
async def test_a_form_that_is_sent_again_is_whole(
    size: int, chunked: bool, keep: bool, start_gateway: StartGateway
) -> None:
    """If the first resource cannot be reached, the second gets every byte, and the deployment once."""
    stage = f"""
from gateway import Stage

class Fallback(Stage):
    "Ask a resource that is not there, then the right one."
    needs = ("deployment",)

    async def start(self, services):
        self.gone = services.resources["gone"]

    async def __call__(self, request, call_next):
        await call_next(request.copy(target=request.target.replace(resource=self.gone)))
        if {keep}:
            await request.buffer(100_000_000)
        return await call_next(request.copy())
"""
    yaml = "plugins_path: mine\nresource: azure\n" + V1.replace("whisper-1: hear", "whisper-1: hear-long-name")
    yaml = yaml.replace('"}}', '"}, gone: {endpoint: "http://127.0.0.1:9"}}')
    yaml = yaml.replace("  - api_version", "  - fallback\n  - api_version")
    body = form(model="whisper-1", file=os.urandom(size), language="en")

    async def pieces() -> Any:
        for place in range(0, len(body), 50_000):
            yield body[place : place + 50_000]

    async with FakeAzure(deployments=("hear-long-name",)) as fake:
        gateway = await start_gateway(fake.endpoint, yaml, {"mine/fallback.py": stage})
        data = pieces() if chunked else io.BytesIO(body)
        async with gateway.post("/v1/audio/transcriptions", None, data=data, headers=HEADERS) as answer:
            assert answer.status == 200, await answer.text()
        assert fake.requests[-1].body == body.replace(b"whisper-1", b"hear-long-name", 1)


async def test_a_second_model_in_a_form_ends_the_upload(start_gateway: StartGateway) -> None:
    """Even long after the first, while the file streams: the model must never be ambiguous."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        body = form(model="whisper-1", file=os.urandom(3_000_000))
        second = form(model="secret-deployment")
        body = body[: -len(f"--{BOUNDARY}--\r\n")] + second
        async with gateway.post("/v1/audio/transcriptions", None, data=io.BytesIO(body), headers=HEADERS) as answer:
            assert answer.status == 400
            assert "two fields 'model'" in (await answer.json())["error"]["message"]
        assert not [seen for seen in fake.requests if seen.body == body]


async def test_a_form_must_have_its_model_within_the_limit(start_gateway: StartGateway) -> None:
    """Within `limits.form`: a model after a file that is too large is a 413 that says what to do."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1, limits={"form": 100_000})
        body = form(file=os.urandom(2_000_000), model="whisper-1")
        async with gateway.post("/v1/audio/transcriptions", None, data=io.BytesIO(body), headers=HEADERS) as answer:
            assert answer.status == 413
            assert "send the field `model` before the file" in (await answer.json())["error"]["message"]
        body = form(model="whisper-1", file=os.urandom(2_000_000))
        async with gateway.post("/v1/audio/transcriptions", None, data=io.BytesIO(body), headers=HEADERS) as answer:
            assert answer.status == 200
        assert len(fake.requests) == 1


async def test_a_client_that_disconnects_inside_a_form_leaves_no_file(start_gateway: StartGateway) -> None:
    """There is no exchange, and no open file."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        body = form(file=os.urandom(3_000_000), model="whisper-1")
        before = len(os.listdir("/proc/self/fd"))
        head = (
            f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: {HEADERS['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        await raw_request(gateway.port, head + body[:2_500_000], timeout=0.5)
        await gateway.idle()
        assert not fake.requests
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first", "middle", "last"])
async def test_200_mb_keep_memory_flat(place: str, tmp_path: Any) -> None:
    """A form of 200 MB costs the gateway's process less than 16 MB, wherever its `model` is; every byte arrives."""
    import asyncio

    from tests.cli.test_cli import serving

    half = os.urandom(1_000_000) * 100
    parts: dict[str, dict[str, str | bytes]] = {
        "first": {"model": "whisper-1", "file": half + half},
        "middle": {"image": half, "model": "whisper-1", "file": half},
        "last": {"file": half + half, "model": "whisper-1"},
    }
    body = form(**parts[place])
    digest = hashlib.sha256()
    heads: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        length = re.search(rb"content-length: (\d+)", head)
        left = int(length[1]) if length else 0
        while left:
            piece = await reader.read(min(left, 1 << 20))
            left -= len(piece)
            digest.update(piece)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    async with RawUpstream(script) as upstream:
        (tmp_path / "gateway.yaml").write_text("listen: 127.0.0.1:0\n" + V1)
        config = str(tmp_path / "gateway.yaml")
        async with serving("--config", config, ENDPOINT=upstream.endpoint) as (process, listening):
            port = int(listening["address"].rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def post(data: bytes) -> bytes:
                writer.write(
                    f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                    f"Content-Type: {HEADERS['Content-Type']}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                )
                for start in range(0, len(data), 1 << 20):
                    writer.write(data[start : start + (1 << 20)])
                    await writer.drain()
                answer = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                return answer

            assert b" 200 " in await post(form(model="whisper-1", file=half[:100_000]))
            digest = hashlib.sha256()
            before = peak(process.pid)
            assert b" 200 " in await post(body)
            grown = peak(process.pid) - before
            writer.close()
    assert digest.digest() == hashlib.sha256(form(**{**parts[place], "model": "hear"})).digest()
    assert grown < 16_000_000, f"{grown} bytes"


def peak(pid: int) -> int:
    """Return the most memory a process has had, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert found is not None
    return int(found[1]) * 1024
