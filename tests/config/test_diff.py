"""Comparison of the old and the new configuration: one line per change, without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.auth.credentials import key_digest
from gateway.config import Loaded, load
from gateway.config.diff import diff
from tests.conftest import write_files

YAML = """
listen: 127.0.0.1:8080
plugins_path: mine
resources:
  east: {endpoint: https://east.openai.azure.com, api_key: "${file:key}"}
  west: {endpoint: https://west.openai.azure.com, api_key: k, proxy: "http://me:hush@proxy:3128"}
resource: east
pipeline:
  - auth_passthrough
  - rate_limit: {requests_per_minute: 600}
  - model_map: {models: {gpt-4o: one, gpt-4: two}}
  - api_version: 2024-10-21
  - hidden: {word: abracadabra, words: {a: hocus}}
teams: teams/*.yaml
"""
FILES = {
    "key": "sesame",
    "teams/research.yaml": "match: {path_prefix: /research}\nchange: {rate_limit: {requests_per_minute: 60}}\n",
    "teams/sales.yaml": f"match: {{keys: ['{key_digest('a')}']}}\n",
    "mine/hidden.py": """
from dataclasses import dataclass, field
from typing import Annotated
from gateway import Meta, Stage

@dataclass
class Hidden(Stage):
    "Keep a secret."
    word: Annotated[str | None, Meta(extra={"secret": True})] = None
    words: dict[str, Annotated[str, Meta(extra={"secret": True})]] = field(default_factory=dict)
    loud: bool = False
""",
}


def loaded(folder: Path, yaml: str = YAML, **files: str) -> Loaded:
    """Load the configuration above, with other text in some files."""
    return load(write_files(folder, {**FILES, "gateway.yaml": yaml, **files}), {})


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("", "", []),
        ("\nlisten", "\n# more\nlisten", []),
        ("8080", "9090", ["listen: 127.0.0.1:8080 -> 127.0.0.1:9090"]),
        ("listen:", "store: redis://:hush@one\nlisten:", ["store: Redis at one:6379 added"]),
        ("listen:", "timeouts: {grace: 5}\nlisten:", ["timeouts.grace: 30.0 -> 5.0"]),
        ("listen:", "log: {level: debug}\nwatch: false\nlisten:", ["log.level: info -> debug", "watch: true -> false"]),
        ("listen:", "trusted_proxies: [10.0.0.0/8]\nlisten:", ["trusted_proxies: [] -> [10.0.0.0/8]"]),
        ("https://west", "https://far", [
            "resource west: endpoint: https://west.openai.azure.com -> https://far.openai.azure.com"]),
        ("api_key: k", "api_key: sesame-2", ["resource west: api_key: *** -> *** (changed)"]),
        (", api_key: k", "", ["resource west: api_key: *** removed"]),
        ("hush", "silence", ["resource west: proxy: http://***@proxy:3128 -> http://***@proxy:3128 (changed)"]),
        ("  west:", "  north: https://n.openai.azure.com\n  west:", ["resource north: added"]),
        ("resource: east", "resource: west", ["teams default, research, sales: resource: east -> west"]),
        ("minute: 600", "minute: 6", ["teams default, sales: rate_limit.requests_per_minute: 600 -> 6"]),
        ("minute: 600", "minute: 600, per: team", ["teams default, research, sales: rate_limit.per: key -> team"]),
        ("two}", "drei, x: y}", [
            "teams default, research, sales: model_map.models.gpt-4: two -> drei",
            "teams default, research, sales: model_map.models.x: y added"]),
        ("abracadabra", "simsalabim", ["teams default, research, sales: hidden.word: *** -> *** (changed)"]),
        ("word: abracadabra, ", "", ["teams default, research, sales: hidden.word: *** removed"]),
        ("hocus", "pocus", ["teams default, research, sales: hidden.words.a: *** -> *** (changed)"]),
        ("word: abracadabra", "loud: true, word: abracadabra", [
            "teams default, research, sales: hidden.loud: false -> true"]),
        ("  - hidden: {word: abracadabra, words: {a: hocus}}\n", "", [
            "teams default, research, sales: hidden: stage removed"]),
        ("  - hidden", "  - sse_newline\n  - hidden as other: {word: abracadabra, loud: true}\n  - hidden", [
            "teams default, research, sales: sse_newline: stage added",
            "teams default, research, sales: other: stage added",
            "teams default, research, sales: other.word: *** added",
            "teams default, research, sales: other.loud: true added"]),
        ("- hidden: {word: abracadabra, words: {a: hocus}}", "- sse_newline as hidden", [
            "teams default, research, sales: hidden: Hidden -> SseNewline, another stage"]),
    ],
)  # fmt: skip
def test_each_change_is_a_line(old: str, new: str, lines: list[str], tmp_path: Path) -> None:
    """With the old and the new value; an inherited change is one line, and a secret is never shown."""
    before = loaded(tmp_path)
    assert old in YAML
    assert diff(before, loaded(tmp_path, YAML.replace(old, new, 1))) == lines


def test_a_secret_s_file_is_a_change_of_its_setting(tmp_path: Path) -> None:
    """Shown like any secret."""
    before = loaded(tmp_path)
    after = loaded(tmp_path, key="simsim")
    assert diff(before, after) == ["resource east: api_key: *** -> *** (changed)"]


def test_teams_come_and_go_and_are_found_otherwise(tmp_path: Path) -> None:
    """By name; keys by their labels and the start of their digests."""
    before = loaded(tmp_path)
    keys = f"[{{digest: '{key_digest('b')}', label: ann}}, {{digest: '{key_digest('c')}', disabled: true}}]"
    after = loaded(
        tmp_path, **{"teams/sales.yaml": f"match: {{host: x.test, keys: {keys}}}\n", "teams/new.yaml": "match: /n\n"}
    )
    assert diff(before, after) == [
        "team new: added",
        f"team sales: match.keys {key_digest('a')[:15]}: good removed",
        "team sales: match.host: [x.test] added",
        f"team sales: match.keys ann ({key_digest('b')[:15]}): good added",
        f"team sales: match.keys {key_digest('c')[:15]}: disabled added",
    ]
    assert diff(after, before)[0] == "team new: removed"


def test_the_order_of_a_pipeline_is_a_change(tmp_path: Path) -> None:
    """For the stages that both have."""
    yaml = (
        "resources: {a: https://a.openai.azure.com}\npipeline: [access_log, auth_passthrough, model_map, api_version]\n"
    )
    before = loaded(tmp_path, yaml)
    after = loaded(tmp_path, yaml.replace("model_map, api_version", "api_version, model_map"))
    (line,) = diff(before, after)
    assert line == (
        "team default: order of the pipeline: [access_log, auth_passthrough, model_map, api_version] -> "
        "[access_log, auth_passthrough, api_version, model_map]"
    )


def test_long_values_and_many_changes_are_bounded(tmp_path: Path) -> None:
    """A long value is cut to the part that differs; the number of further changes is shown."""
    names = [f"10.0.{number}.0/24" for number in range(200)]
    yaml = YAML + "trusted_proxies: [" + ", ".join(names) + "]\n"
    (line,) = diff(loaded(tmp_path, yaml), loaded(tmp_path, yaml.replace("10.0.150.0", "10.9.150.0")))
    assert "10.9.150.0/24" in line
    assert len(line) < 500
    models = ", ".join(f"m{number}: a" for number in range(70))
    lines = diff(loaded(tmp_path), loaded(tmp_path, YAML.replace("gpt-4: two", models)))
    assert len(lines) == 51
    assert lines[-1] == "and 21 more"


def test_another_store_is_a_change(tmp_path: Path) -> None:
    """Without its user and password."""
    texts = ["redis://:hush@one", "redis://:sesame@one", "rediss://:sesame@two"]
    made = [loaded(tmp_path, YAML.replace("listen:", f"store: {text}\nlisten:")) for text in texts]
    assert diff(made[0], made[1]) == ["store: Redis at one:6379 -> Redis at one:6379 (changed)"]
    assert diff(made[1], made[2]) == ["store: Redis at one:6379 -> Redis over TLS at two:6379"]


def test_prices_and_issuers_are_compared(tmp_path: Path) -> None:
    """Each of them."""
    yaml = YAML + "prices: {gpt-4o: {input: 2.5, output: 10}}\nidentity: {issuer: https://login.test/t, audience: a}\n"
    other = yaml.replace("2.5", "2").replace("audience: a", "audience: [a, b]")
    assert diff(loaded(tmp_path, yaml), loaded(tmp_path, other)) == [
        "prices.gpt-4o.input: 2.5 -> 2.0",
        "identity https://login.test/t: [a] -> [a, b]",
    ]
