"""`auth_keys`: accepts the team's keys and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.auth.credentials import ListedKey, key_digest, new_key
from gateway.auth.oidc import Identity
from gateway.config import load
from gateway.errors import ConfigError
from gateway.services import Services
from gateway.testing import FakeAzure, post
from plugins.auth_keys import AuthKeys
from tests.cli.test_cli import run
from tests.conftest import CHAT, StartGateway, write_files

NOW = 1_800_000_000.0


def listed(key: str, **more: Any) -> ListedKey:
    return ListedKey(key_digest(key), **more)


KEYS = [
    listed("K-good", label="ann"),
    listed("K-second", label="bob", expires=NOW + 1),
    listed("K-nameless"),
    listed("K-expired", label="carl", expires=NOW),
    listed("K-disabled", label="dora", disabled=True),
    listed("K-few", label="eve", models=("gpt-4o*",)),
]


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ({"Authorization": "Bearer K-good"}, "ann"),
        ({"api-key": "K-good"}, "ann"),
        ({"Authorization": "bearer K-second"}, "bob"),
        ({"api-key": "K-nameless"}, key_digest("K-nameless")),
    ],
)
async def test_a_key_of_the_team_is_let_in(headers: dict[str, str], caller: str) -> None:
    """As bearer and as api-key; the caller is its label or else its digest, and Azure does not get it."""
    sent = await post(AuthKeys(), headers=headers, keys=KEYS, now=lambda: NOW)
    assert sent.reached is not None
    assert sent.reached.caller == caller
    assert sent.reached.target.credential is None
    assert sent.reached.allowed_models is None


async def test_a_key_may_have_models_of_its_own() -> None:
    """The stages below get them."""
    sent = await post(AuthKeys(), headers={"api-key": "K-few"}, keys=KEYS, now=lambda: NOW)
    assert sent.reached is not None
    assert sent.reached.allowed_models == ("gpt-4o*",)


async def test_every_wrong_key_is_the_same_401() -> None:
    """Unknown, expired, disabled: the client cannot tell them apart."""
    answers = [
        await post(AuthKeys(), headers={"api-key": key}, keys=KEYS, now=lambda: NOW)
        for key in ("K-unknown", "K-expired", "K-disabled")
    ]
    assert {(each.status, each.body, str(sorted(each.headers))) for each in answers} == {
        (401, answers[0].body, str(sorted(answers[0].headers)))
    }
    assert json.loads(answers[0].body)["error"]["code"] == "invalid_api_key"
    assert all(each.reached is None for each in answers)


ANN = Identity({"roles": ["research"], "tid": "t"}, "oid-ann")


@pytest.mark.parametrize("keys", [[], KEYS])
async def test_a_token_with_the_team_s_claims_is_let_in(keys: list[ListedKey]) -> None:
    """With or without keys; the token names the caller, who may use all of the team's models."""
    sent = await post(
        AuthKeys(),
        headers={"Authorization": "Bearer eyJh.eyJh.x"},
        keys=keys,
        claims={"roles": ("x", "research")},
        identity=ANN,
    )
    assert sent.reached is not None
    assert sent.reached.caller == "oid-ann"
    assert sent.reached.allowed_models is None
    assert sent.reached.target.credential is None


async def test_every_other_token_is_the_same_401_as_a_wrong_key() -> None:
    """Of no team, of another team, of a team with keys alone, and an invalid token."""
    answers = [
        await post(AuthKeys(), headers={"Authorization": f"Bearer {key}"}, keys=KEYS, claims=claims, identity=identity)
        for key, claims, identity in (
            ("K-unknown", None, None),
            ("eyJh.eyJh.x", {"roles": ("sales",)}, ANN),
            ("eyJh.eyJh.x", {"roles": ("research",), "tid": ("another",)}, ANN),
            ("eyJh.eyJh.x", None, ANN),
            ("eyJh.eyJh.x", {"roles": ("research",)}, "expired token"),
        )
    ]
    assert {(each.status, each.body, str(sorted(each.headers))) for each in answers} == {
        (401, answers[0].body, str(sorted(answers[0].headers)))
    }
    assert all(each.reached is None for each in answers)


YAML = f"""
resources: {{azure: {{endpoint: "${{ENDPOINT}}", api_key: stored-key}}}}
match:
  keys:
    - {{digest: "{key_digest("K-ann")}", label: ann, created: 2026-01-01}}
    - {{digest: "{key_digest("K-bob")}", label: bob, expires: 2026-01-01}}
    - {{digest: "{key_digest("K-carl")}", label: carl, disabled: true}}
    - "{key_digest("K-plain")}"
pipeline: [access_log, auth_keys, model_map, api_version, sse_newline]
"""


async def test_the_log_has_the_reason(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Each rejection has its own reason in the log event, which has the key's label or digest and never the key."""
    azure.api_key = "stored-key"
    gateway = await start_gateway(azure.endpoint, YAML)
    for key, status in (("K-ann", 200), ("K-plain", 200), ("K-bob", 401), ("K-carl", 401), ("K-nobody", 401)):
        async with gateway.post(key=key) as answer:
            assert answer.status == status, await answer.text()
    async with gateway.post(key=None) as answer:
        assert answer.status == 401
    await gateway.idle()
    events = gateway.exchanges()
    assert [(each["caller"], each.get("auth")) for each in events] == [
        ("ann", None),
        (key_digest("K-plain"), None),
        ("bob", "expired key"),
        ("carl", "disabled key"),
        (None, "unknown key"),
        (None, "no key"),
    ]
    assert events[4]["key"] == key_digest("K-nobody")
    assert "K-ann" not in str(gateway.events)
    assert len(azure.requests) == 2
    assert {each.headers.get("api-key") for each in azure.requests} == {"stored-key"}
    assert not any("K-" in value for each in azure.requests for _, value in each.headers)


def test_a_team_without_keys_and_claims_is_a_mistake() -> None:
    """No client could use it; but the default team may only handle requests that match no team."""
    for services, wrong in (
        (Services(team="research", stage="auth_keys", team_count=3), True),
        (Services(team="default", stage="auth_keys"), True),
        (Services(team="default", stage="auth_keys", team_count=2), False),
        (Services(team="research", stage="auth_keys", claims={"roles": ("research",)}), False),
        (Services(team="research", stage="auth_keys", keys={each.digest: each for each in KEYS}), False),
    ):
        assert bool(list(AuthKeys().check(services))) == wrong


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sk-plain", "4:11: write a key as its digest"),
        ("{digest: sk-plain}", "4:20: write a key as its digest"),
        ("{label: ann}", "needs the setting 'digest'"),
        (f'{{digest: "{key_digest("K")}", expires: tomorrow}}', "expires must be a day (2027-01-31)"),
        (f'{{digest: "{key_digest("K")}", expires: 99999-01-01}}', "expires must be a day (2027-01-31)"),
        (f'{{digest: "{key_digest("K")}", created: 2026-13-01}}', "created must be a day"),
        (f'{{digest: "{key_digest("K")}", lable: ann}}', "did you mean 'label'?"),
    ],
)
def test_what_is_no_key_is_a_mistake_with_its_place(entry: str, message: str, tmp_path: Path) -> None:
    """With its location; text that may be the key itself is not repeated."""
    yaml = (
        "resources: {azure: {endpoint: https://x.openai.azure.com, api_key: k}}\n"
        f"pipeline: [auth_keys, model_map, api_version]\nmatch:\n  keys: [ {entry} ]\n"
    )
    with pytest.raises(ConfigError) as raised:
        load(write_files(tmp_path, {"gateway.yaml": yaml}))
    assert message in str(raised.value)
    assert "sk-plain" not in str(raised.value)


def test_days_are_whole_and_moments_exact(tmp_path: Path) -> None:
    """A key is valid until the end of its last day, in UTC."""
    for text, expires in (("2027-01-31", 1801440000.0), ("2027-01-31T01:00:00+01:00", 1801353600.0)):
        yaml = YAML.replace("expires: 2026-01-01", f'expires: "{text}"')
        loaded = load(write_files(tmp_path, {"gateway.yaml": yaml}), {"ENDPOINT": "https://x.openai.azure.com"})
        assert [key.expires for key in loaded.teams.default.match.keys] == [None, expires, None, None]


@pytest.mark.slow
def test_the_command_line_makes_a_key(tmp_path: Path) -> None:
    """`gateway keys new` prints the key once, with YAML for the team that works as it is."""
    done = run("keys", "new", "--team", "research", "--label", 'ann\'s "own"', "--expires", "90")
    key, _, rest = done.stdout.partition("\n")
    assert key.startswith("sk-gw-")
    assert done.stdout.count(key) == 1
    pasted = rest[rest.index("match:") :]
    files = {
        "gateway.yaml": "resources: {azure: {endpoint: https://x.openai.azure.com, api_key: k}}\nteams: research.yaml\n"
        "pipeline: [auth_keys, model_map, api_version]\n",
        "research.yaml": pasted,
    }
    (_, research) = load(write_files(tmp_path, files)).teams.all
    (found,) = research.match.keys
    assert (found.digest, found.label) == (key_digest(key), 'ann\'s "own"')
    assert found.expires is not None
    assert run("keys", "new", "--team", "x", "--expires", "2020-01-01").returncode == 1
    assert "must be a number of days, or a day" in run("keys", "new", "--team", "x", "--expires", "soon").stderr


def test_keys_are_long_and_differ() -> None:
    """256 random bits, in characters that a bearer token may have."""
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-gw-[A-Za-z0-9_-]{43}", key) for key in keys)


async def test_two_keys_live_side_by_side(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """So that a new key can be distributed before the old one is removed: keys of one label are one caller."""
    azure.api_key = "stored-key"
    yaml = YAML.replace(", expires: 2026-01-01", "").replace("label: bob", "label: ann")
    gateway = await start_gateway(azure.endpoint, yaml)
    for key in ("K-ann", "K-bob"):
        async with gateway.post(json=CHAT, key=key) as answer:
            assert answer.status == 200
    await gateway.idle()
    assert [each["caller"] for each in gateway.exchanges()] == ["ann", "ann"]


async def test_another_team_s_key_is_as_wrong_as_any(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The response does not reveal that the key belongs to another team."""
    yaml = YAML.replace("pipeline:", "teams: teams/*.yaml\npipeline:")
    files = {
        f"teams/{name}.yaml": f"match: {{path_prefix: /{name}, keys: ['{key_digest('K-' + name)}']}}\n" for name in "xy"
    }
    gateway = await start_gateway(azure.endpoint, yaml, files)
    answers = []
    for key in ("K-y", "K-nobody"):
        async with gateway.post("/x/v1/chat/completions", key=key) as answer:
            answers.append((answer.status, await answer.text(), answer.headers.get("www-authenticate")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 401
