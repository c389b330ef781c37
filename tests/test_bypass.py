# ruff: noqa: E501 -- the cases read best one a line
"""With `unmapped: refuse`, no request reaches a deployment that is not in the map, by any location or trick.

Each case names the deployment `secret` where some parser of HTTP, forms or JSON might find it. The request is refused, or
it is sent without that name: the fake Azure must not see it.
"""

from __future__ import annotations

import json

import pytest

from gateway.testing import FakeAzure
from tests.azure.test_deployment_field import BOUNDARY, HEADERS
from tests.conftest import KEY, StartGateway, raw_request

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {models: {gpt-4o: gpt-4o, whisper-1: whisper-1}, unmapped: refuse}
  - api_version: v1
"""
FORM = HEADERS["Content-Type"]
JSON = "application/json"
END = f"--{BOUNDARY}--\r\n"


def part(name: str, value: str) -> str:
    return part_with(f'Content-Disposition: form-data; name="{name}"', value)


def part_with(head: str, value: str = "secret") -> str:
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n{value}\r\n"


NAMED = part("model", "whisper-1")
FILE = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
LINE = '{"custom_id":"1","method":"POST","url":"/v1/chat/completions","body":{"model":"secret"}}'
BATCH = part("purpose", "batch") + FILE
SESSION = '{"type":"realtime","model":"gpt-4o"}'
AUDIO, CALLS, FILES = "/v1/audio/transcriptions", "/v1/realtime/calls", "/v1/files"
HIDDEN = 'Content-Disposition: form-data; name="model"'

CASES: dict[str, tuple[str, str, str]] = {
    "JSON: two models": ("/v1/chat/completions", JSON, '{"model":"secret","model":"gpt-4o"}'),
    "JSON: an escaped key": ("/v1/chat/completions", JSON, r'{"model":"gpt-4o","mod\u0065l":"secret"}'),
    "JSON: an escaped key before": ("/v1/chat/completions", JSON, r'{"mod\u0065l":"secret","model":"gpt-4o"}'),
    "JSON: an escaped key alone": ("/v1/responses", JSON, r'{"mod\u0065l":"secret"}'),
    "JSON: null behind": ("/v1/responses", JSON, '{"model":"secret","model":null}'),
    "session: null behind": ("/v1/realtime/client_secrets", JSON, '{"session":{"model":"secret","model":null}}'),
    "session: two": ("/v1/realtime/client_secrets", JSON, '{"session":{"model":"secret"},"session":{"model":"gpt-4o"}}'),
    "session: none behind": ("/v1/realtime/client_secrets", JSON, '{"session":{"model":"secret"},"session":null}'),
    "evals: two": ("/v1/evals/e/runs", JSON, '{"data_source":{"model":"secret","model":"gpt-4o"}}'),
    "evals: null behind": ("/v1/evals/e/runs", JSON, '{"data_source":{"model":"secret","model":null}}'),
    "evals: one grader": ("/v1/evals", JSON, '{"testing_criteria":[{"type":"multi","graders":{"type":"s","model":"secret"}}]}'),
    "evals: a list": ("/v1/evals", JSON, '{"testing_criteria":[{"type":"multi","graders":[{"type":"s","model":"secret"}]}]}'),
    "evals: a mapping": ("/v1/evals", JSON, '{"testing_criteria":[{"type":"m","graders":{"a":{"type":"s","model":"secret"}}}]}'),
    "call: half a surrogate": (CALLS, FORM, part("session", r'{"model":"secret","instructions":"\ud83d"}') + END),
    "call: query beside a form": (f"{CALLS}?model=secret", FORM, part("session", '{"type":"realtime"}') + END),
    "call: an encoded query name": (f"{CALLS}?model=gpt-4o&mod%65l=secret", "application/sdp", "v=0"),
    "call: encoded first": (f"{CALLS}?mod%65l=gpt-4o&model=secret", "application/sdp", "v=0"),
    "call: null behind": (CALLS, FORM, part("session", '{"model":"secret","model":null}') + END),
    "call: two in the query": (f"{CALLS}?model=gpt-4o&model=secret", "application/sdp", "v=0"),
    "call: JSON": (CALLS, JSON, '{"session":{"model":"secret"}}'),
    "call: a web form": (CALLS, "application/x-www-form-urlencoded", "session[model]=secret"),
    "call: two sessions": (CALLS, FORM, part("session", SESSION) + part("session[model]", "secret") + END),
    "call: two far apart": (CALLS, FORM, part("session", SESSION) + part("x", "x" * 600_000) + part("session[model]", "secret") + END),
    "call: a list": (CALLS, FORM, part("session", '[{"model":"secret"}]') + END),
    "call: two models": (CALLS, FORM, part("session", '{"model":"secret","model":"gpt-4o"}') + END),
    "form: spaces around =": (AUDIO, FORM, NAMED + part_with('Content-Disposition: form-data; name = "model"') + END),
    "form: name*": (AUDIO, FORM, NAMED + part_with("Content-Disposition: form-data; name*=UTF-8''model") + END),
    "form: folded": (AUDIO, FORM, NAMED + part_with('Content-Disposition: form-data;\r\n name="model"') + END),
    "form: attachment": (AUDIO, FORM, NAMED + part_with('Content-Disposition: attachment; name="model"') + END),
    "form: two dispositions": (AUDIO, FORM, NAMED + part_with(f'Content-Disposition: form-data; name="x"\r\n{HIDDEN}') + END),
    "form: a space before :": (AUDIO, FORM, NAMED + part_with('Content-Disposition : form-data; name="model"') + END),
    "form: a backslash": (AUDIO, FORM, NAMED + part_with(r'Content-Disposition: form-data; filename="a\"; name="model"') + END),
    "form: two names": (AUDIO, FORM, NAMED + part_with('Content-Disposition: form-data; name="x"; name="model"') + END),
    "form: another case": (AUDIO, FORM, NAMED + part("Model", "secret") + END),
    "form: an end in a value": (AUDIO, FORM, NAMED + part("x", f"a\r\n--{BOUNDARY}--X") + part("model", "secret") + END),
    "form: line feeds": (AUDIO, FORM, NAMED + f"--{BOUNDARY}\n{HIDDEN}\n\nsecret\n{END}"),
    "form: line feeds, far": (AUDIO, FORM, NAMED + part("x", "x" * 600_000) + f"--{BOUNDARY}\n{HIDDEN}\n\nsecret\n{END}"),
    "form: behind the end": (AUDIO, FORM, NAMED + END + part("model", "secret") + END),
    "video: line feeds": ("/v1/videos", FORM, (part("model", "secret") + END).replace("\r\n", "\n")),
    "video: no end": ("/v1/videos", FORM, part("prompt", "x") + f"--{BOUNDARY}\r\n{HIDDEN}\r\n\r\nsecret"),
    "boundary: in quotes": (AUDIO, f'multipart/form-data; x="; boundary=AAA ;"; boundary={BOUNDARY}', part("model", "secret") + END),
    "boundary: two": (AUDIO, f"multipart/form-data; boundary=AAA; boundary={BOUNDARY}", part("model", "secret") + END),
    "boundary: a space": (AUDIO, f"multipart/form-data; boundary ={BOUNDARY}; boundary=AAA", part("model", "secret") + END),
    "batch: no end": (FILES, FORM, f"{BATCH}{LINE}\r\n"),
    "batch: a capital": (FILES, FORM, part("purpose", "Batch") + f"{FILE}{LINE}\r\n{END}"),
    "batch: spaces": (FILES, FORM, part("purpose", " batch ") + f"{FILE}{LINE}\r\n{END}"),
    "batch: folded": (FILES, FORM, part_with('Content-Disposition: form-data;\r\n name="purpose"', "batch") + f"{FILE}{LINE}\r\n{END}"),
    "batch: two types": (FILES, f"text/plain\r\nContent-Type: {FORM}", f"{BATCH}{LINE}\r\n{END}"),
    "batch: mixed": (FILES, FORM.replace("form-data", "mixed"), f"{BATCH}{LINE}\r\n{END}"),
    "batch: a byte order mark": (FILES, FORM, part("purpose", "\ufeffbatch") + f"{FILE}{LINE}\r\n{END}"),
    "batch: base64": (FILES, FORM, part_with('Content-Disposition: form-data; name="purpose"\r\nContent-Transfer-Encoding: base64', "YmF0Y2g=") + f"{FILE}{LINE}\r\n{END}"),
    "batch: an encoded name": (FILES, FORM, part("=?utf-8?B?cHVycG9zZQ==?=", "batch") + f"{FILE}{LINE}\r\n{END}"),
    "batch: an encoded file": (FILES, FORM, BATCH.replace('name="file"', 'name="=?utf-8?B?ZmlsZQ==?="') + f"{LINE}\r\n{END}"),
    "batch: no file": (FILES, FORM, part("purpose", "batch") + part("files", LINE) + END),
    "batch: two models": (FILES, FORM, BATCH + LINE.replace('{"model":"secret"', '{"model":"secret","model":"gpt-4o"') + f"\r\n{END}"),
    "batch: two bodies": (FILES, FORM, BATCH + LINE[:-1] + ',"body":{"model":"gpt-4o"}}' + f"\r\n{END}"),
    "batch: spaces around =": (FILES, FORM, BATCH.replace('name="file"', 'name = "file"') + f"{LINE}\r\n{END}"),
    "a path": ("/openai/deployments/secret/chat/completions", JSON, '{"messages":[]}'),
    "a path of engines": ("/v1/engines/secret/embeddings", JSON, '{"input":"x"}'),
    "a path beside a model": ("/openai/deployments/gpt-4o/chat/completions", JSON, '{"model":"secret"}'),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_an_unmapped_deployment_is_not_reached(case: str, start_gateway: StartGateway) -> None:
    """The request does not cause a 5xx either."""
    path, content_type, body = CASES[case]
    async with FakeAzure(deployments=("secret", "gpt-4o", "whisper-1")) as azure:
        gateway = await start_gateway(azure.endpoint, YAML)
        data = body.encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: {content_type}\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        answer = await raw_request(gateway.port, head.encode() + data)
        assert answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer[:200]
        for seen in azure.requests:
            assert seen.left or b"secret" not in seen.body, answer[:200]
            assert "secret" not in f"{seen.path} {seen.query}".replace("client_secrets", "")


async def test_the_image_tool_s_deployment_is_mapped(start_gateway: StartGateway) -> None:
    """Azure's Responses API reads it from a header."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(
            azure.endpoint, YAML.replace("{gpt-4o: gpt-4o,", "{gpt-4o: gpt-4o, paint: my-paint,")
        )
        name = "x-ms-oai-image-generation-deployment"
        body = {"model": "gpt-4o", "input": "x", "tools": [{"type": "image_generation"}]}
        async with gateway.post("/v1/responses", body, headers={name: "secret"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
        assert not azure.requests
        async with gateway.post("/v1/responses", body, headers={name: "paint"}) as answer:
            assert answer.status == 200
        assert azure.requests[0].headers.getall(name) == ["my-paint"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/openai/deployments/gpt-4o/chat/completions", rb'["\ud83d"]'),
        ("/openai/deployments/gpt-4o/chat/completions", rb'"\ud83d"'),
        ("/v1/realtime/client_secrets", rb'{"session":{"type":"realtime","model":"gpt-4o","instructions":"\ud83d"}}'),
        ("/v1/realtime/client_secrets", b'{"session":[1]}'),
        ("/v1/realtime/client_secrets", b'["model"]'),
        ("/v1/realtime/client_secrets", b'{"session":{"model":4}}'),
        ("/v1/responses", b'["model"]'),
        ("/v1/responses", b"model"),
        ("/v1/evals", rb'["\ud83d"]'),
        ("/v1/evals", b'{"testing_criteria":[' + b'{"type":"m","graders":[' * 600 + b"]}" * 600 + b"]}"),
        ("/v1/chat/completions", rb'{"model":"gpt-4o","x":"\ud83d","n":NaN}'),
        ("/v1/chat/completions", rb'{"model":"gpt-4o","x":"\ud83d","n":' + b"[" * 900 + b"]" * 900 + b"}"),
        ("/v1/responses", b'{"model":"gpt-4o","\xff":1}'),
        ("/v1/embeddings", b'\xef\xbb\xbf{"model":"gpt-4o","input":"a"}'),
    ],
)
async def test_odd_json_is_no_5xx(path: str, body: bytes, start_gateway: StartGateway) -> None:
    """It is sent to Azure, or refused."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, YAML)
        async with gateway.post(path, None, data=body, headers={"Content-Type": JSON}) as answer:
            assert answer.status < 500, await answer.text()
            json.loads(await answer.read())
