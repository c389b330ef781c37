"""The configuration: golden cases (files in; the resolved pipeline or the mistakes out), and what they do not show.

A case in `cases/` is a text: lines `=== NAME` begin a file, `=== env` holds variables, and `----------`
is followed by what `gateway check` prints. To write a new one, leave that part empty and run
`python -m tests.config.test_config`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml as pyyaml

from gateway.config import load
from gateway.config.schema import schema
from gateway.config.show import show
from gateway.errors import ConfigError
from gateway.registry import Registry
from tests.conftest import write_files

CASES = Path(__file__).parent / "cases"
RULE = "----------\n"


def parts(case: str) -> tuple[dict[str, str], dict[str, str], str]:
    """Return a case's files, its environment and what is expected."""
    given, _, expected = case.partition(RULE)
    files: dict[str, str] = {}
    for block in given.split("=== ")[1:]:
        name, _, text = block.partition("\n")
        files[name.strip()] = text
    env = dict(line.split("=", 1) for line in files.pop("env", "").splitlines() if line)
    return files, env, expected


def outcome(files: dict[str, str], env: dict[str, str], folder: Path) -> str:
    """Return what `gateway check` prints."""
    path = write_files(folder, files)
    try:
        text = show(load(path, env))
    except ConfigError as exc:
        text = "".join(f"{mistake}\n" for mistake in exc.mistakes)
    return text.replace(f"{folder}/", "")


@pytest.mark.parametrize("path", sorted(CASES.glob("*.txt")), ids=lambda path: path.stem)
def test_golden_case(path: Path, tmp_path: Path) -> None:
    """A configuration resolves to this pipeline, or has exactly these mistakes."""
    files, env, expected = parts(path.read_text())
    assert expected, "an empty expectation is no test; see the head of this file"
    assert expected == outcome(files, env, tmp_path)


def test_secrets_are_masked_everywhere(tmp_path: Path) -> None:
    """Neither a mistake nor the resolved text shows a stored key, wherever it came from."""
    for api_key in ("sk-literal-1", "${SECRET}", "${file:secret.txt}"):
        for more in ("", "    api_kye: sk-literal-1\n", "pipelin: x\n"):
            yaml = f"""
resources:
  azure:
    endpoint: https://x.openai.azure.com
    api_key: {api_key}
{more}
pipeline: [auth_passthrough, model_map, api_version]
"""
            files = {"gateway.yaml": yaml, "secret.txt": "sk-from-file\n"}
            text = outcome(files, {"SECRET": "sk-from-env"}, tmp_path)
            for secret in ("sk-literal-1", "sk-from-env", "sk-from-file"):
                assert secret not in text


def test_a_stored_key_from_a_file_is_used(tmp_path: Path) -> None:
    """`${file:...}` is read from the configuration's folder, without the final newline."""
    yaml = """
resources: {azure: {endpoint: "https://x.openai.azure.com", api_key: "${file:secret.txt}"}}
auth: none
pipeline: [model_map, api_version]
"""
    loaded = load(write_files(tmp_path, {"gateway.yaml": yaml, "secret.txt": "sk-from-file\n"}), {})
    credential = loaded.resources["azure"].credential
    assert credential is not None
    assert credential.value == "sk-from-file"
    assert "sk-from-file" not in repr(loaded)


def test_yaml_without_end_is_refused(tmp_path: Path) -> None:
    """Aliases that contain themselves, deep nesting and other tags are mistakes; they do not hang."""
    laughs = "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 40))
    tag = "listen: !!python/object/apply:os.system [ls]\n"
    for yaml in ("pipeline: &p [*p]\n", "x: " + "[" * 2000, laughs, tag, "\x00", "[]", ""):
        text = outcome({"gateway.yaml": yaml}, {}, tmp_path)
        assert text.startswith("gateway.yaml:")


def base_load(path: Path) -> Any:
    """Return a file as YAML's simplest reader reads it: all scalars are text."""
    return pyyaml.load(path.read_text(), pyyaml.BaseLoader)  # noqa: S506 -- it makes nothing but text


def validate(content: Any, *, team: bool = False) -> list[str]:
    made = schema(Registry(), team=team)
    jsonschema.Draft202012Validator.check_schema(made)
    return [error.message for error in jsonschema.Draft202012Validator(made).iter_errors(content)]


def test_json_schema_takes_what_the_gateway_takes() -> None:
    """The shipped configuration and team are valid by the schema for editors."""
    root = Path(__file__).parents[2] / "config"
    assert validate(base_load(root / "gateway.yaml")) == []
    team = base_load(root / "teams" / "research.yaml.example")
    team["pipeline"][1]["rate_limit"] = {"requests_per_minute": 60, "burst": 10}  # BaseLoader makes all of it text
    assert validate(team, team=True) == []
    main = base_load(root / "gateway.yaml")
    issuer = {"issuer": "https://login.example.com", "audience": ["api://gateway"], "leeway": 5}
    for identity in (
        issuer,
        [issuer, {**issuer, "audience": "a", "jwks": "https://keys.example.com", "caller": "sub"}],
    ):
        assert validate({**main, "identity": identity, "match": {"claims": {"roles": "research"}}}) == []
        assert validate({"match": {"claims": {"roles": ["research", "sales"], "tid": "t"}}}, team=True) == []
    assert validate({**main, "identity": {"issuer": "https://login.example.com"}})


@pytest.mark.parametrize(
    "content",
    [
        {"resources": {"a": {"endpoint": "https://x"}}, "pipeline": [{"rate_limit": {"request_per_minute": 1}}]},
        {"resources": {"a": {"endpoint": "https://x"}}, "pipeline": [{"rate_limit": {"requests_per_minute": 0}}]},
        {"resources": {"a": {}}, "pipeline": []},
        {"resources": {"a": {"endpoint": "https://x"}}, "pipeline": ["nothing_such"]},
        {"resources": {"a": {"endpoint": "https://x"}}, "pipeline": [], "listn": "x"},
        {"pipeline": []},
    ],
)
def test_json_schema_refuses_what_the_gateway_refuses(content: Any) -> None:
    """Unknown settings and stages, values out of bounds, missing settings."""
    assert validate(content)
    assert json.dumps(schema(Registry()))


GOOD = "resources: {a: https://x.openai.azure.com}\n"


@pytest.mark.parametrize(
    "yaml",
    [
        "x: " + "[" * 200_000,
        "limits: {body: " + "9" * 5000 + "}",
        "teams: /no/such/folder/*.yaml",
        'teams: "a**b.yaml"',
        "teams: " + "a" * 300,
        "plugins_path: " + "a" * 300,
        'plugins_path: "\\0"',
        'listen: "${file:\\0}"',
        "pipeline: [" + "a" * 300 + "]",
        "timeouts:\nlimits: []\nlog: x\nteams:\nplugins_path: null\nresources:\n",
        "resources: []\npipeline: {a: b}\n",
        "\tlisten: x",
        "? [a]\n: b\n",
        "a: &a {<<: *a}\n",
    ],
)
def test_no_yaml_ends_in_a_traceback(yaml: str, tmp_path: Path) -> None:
    """For any content, each mistake has a position."""
    text = outcome({"gateway.yaml": yaml}, {}, tmp_path)
    assert text
    for line in text.splitlines():
        assert line.startswith("gateway.yaml:"), line


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("1 +", "invalid syntax"),
        ("raise SystemExit(3)", "SystemExit"),
        ("class S(Stage):\n    def __post_init__(self): raise KeyError('x')\n    limit: int = 1", "put @dataclass"),
        ("@dataclass\nclass S(Stage):\n    a: int = 1\n    def __post_init__(self): raise KeyError('x')", "KeyError"),
        ("@dataclass\nclass S(Stage):\n    a: int = 1\n    def __post_init__(self): raise ValueError('bad')", "bad"),
        ("@dataclass\nclass S(Stage):\n    a: 'Nowhere' = 1", "types of its settings cannot be read"),
        ("@dataclass\nclass S(Stage):\n    a: Any = 1", "has an unsupported type"),
        ("@dataclass\nclass S(Stage):\n    a: tuple[int, str] = (1, 'a')", "has an unsupported type"),
        ("@dataclass\nclass S(Stage):\n    id: str = 'x'", "would hide"),
        ("class S(Stage):\n    def __init__(self, x): pass", "TypeError"),
        ("class S(Stage):\n    def check(self, services): raise KeyError('x')", "raised an exception in `check`"),
        ("class S(Stage):\n    def check(self, services): return None", "raised an exception in `check`"),
        ("class S(Stage):\n    def check(self, services): yield 1", "raised an exception in `check`"),
        ("class S(Stage):\n    needs = None", "has an invalid `needs`"),
        ("class S(Stage):\n    needs = 'caller'", "needs 'caller'"),
        ("class S(Stage):\n    provides = None", "has an invalid `provides`"),
        ("class S(Stage):\n    must_precede = None", "has an invalid `must_precede`"),
        ("class S(Stage):\n    targets = None", "has invalid `targets`"),
        ("class S(Stage):\n    targets = ('east',)", "TypeError: str is not a Target"),
    ],
)
def test_a_stranger_s_stage_cannot_break_the_check(stage: str, words: str, tmp_path: Path) -> None:
    """Its mistake is reported where it is listed."""
    head = "from dataclasses import dataclass\nfrom typing import Any\nfrom gateway import Stage\n"
    yaml = GOOD + "plugins_path: p\npipeline: [odd, auth_passthrough, model_map, api_version]\n"
    text = outcome({"gateway.yaml": yaml, "p/odd.py": head + stage + "\n"}, {}, tmp_path)
    assert "gateway.yaml:3:12: " in text
    assert words in text


def test_types_of_settings(tmp_path: Path) -> None:
    """Unions take the first kind that fits, choices may be numbers, frozen and nested classes work."""
    stage = """
from dataclasses import dataclass, field
from typing import Annotated, Literal
from gateway import Meta, Stage

@dataclass(frozen=True)
class Inner:
    a: int = 1
    token: Annotated[str, Meta(extra={"secret": True})] = ""

@dataclass(frozen=True)
class Odd(Stage):
    one: int | str = 0
    two: int | str = 0
    three: Literal[1, 2, "auto"] = 1
    four: list[Inner] = field(default_factory=list)
    five: Annotated[str, Meta(extra={"secret": True})] | None = None
    six: dict[str, float] = field(default_factory=dict)
    seven: bool | Literal["maybe"] = False
    nine: Annotated[Annotated[str, Meta(min_length=3)], Meta(extra={"secret": True})] = "four"
    eight: list[Annotated[str, Meta(extra={"secret": True})]] = field(default_factory=list)
"""
    settings = "{one: 5, two: five, three: 2, four: [{a: 3, token: TOPSECRET}, 4], five: TOPSECRET, six: {x: 0.5}, "
    settings += "seven: maybe, eight: [TOPSECRET]}"
    yaml = GOOD + f"plugins_path: p\npipeline: [odd: {settings}, auth_passthrough, model_map, api_version]\n"
    text = outcome({"gateway.yaml": yaml, "p/odd.py": stage}, {}, tmp_path)
    resolved = "odd: one=5 two=five three=2 four=[{a: 3, token: ***}, {a: 4, token: ***}] five=*** six={x: 0.5} "
    assert resolved + "seven=maybe eight=[***]" in text
    assert "TOPSECRET" not in text
    wrong = settings.replace("three: 2", "three: 3").replace("five: TOPSECRET", "five: [TOPSECRET]")
    text = outcome({"gateway.yaml": yaml.replace(settings, wrong), "p/odd.py": stage}, {}, tmp_path)
    assert "three must be one of 1, 2, auto, not '3'" in text
    short = settings.replace("three: 2", "nine: TO")
    text = outcome({"gateway.yaml": yaml.replace(settings, short), "p/odd.py": stage}, {}, tmp_path)
    assert "nine must be at least 3 characters long, not ***" in text
    assert "TOPSECRET" not in text


@pytest.mark.parametrize("key", ["abc\\r\\nX-Evil: 1", " a b ", "k\u00e9y", ""])
def test_a_stored_key_must_be_able_to_be_one(key: str, tmp_path: Path) -> None:
    """It becomes a header: a line break would start another one."""
    yaml = f'resources: {{a: {{endpoint: "https://x.openai.azure.com", api_key: "{key}"}}}}\nauth: none\n'
    text = outcome({"gateway.yaml": yaml + "pipeline: [model_map, api_version]\n"}, {}, tmp_path)
    assert "api_key is empty, or has characters that no key has" in text
    assert "Evil" not in text


@pytest.mark.parametrize(
    "endpoint",
    ["https://a b", "https://*", "https://%00", "https://.", "http://a:0", "https://x.openai.azure.com/openai", "x"],
)
def test_endpoints_that_cannot_work_are_refused(endpoint: str, tmp_path: Path) -> None:
    """And not repeated: the value may be a key in the wrong variable."""
    yaml = f'resources: {{a: {{endpoint: "{endpoint}"}}}}\npipeline: [auth_passthrough, model_map, api_version]\n'
    text = outcome({"gateway.yaml": yaml}, {}, tmp_path)
    assert text.startswith("gateway.yaml:1:27: resource 'a': endpoint must")


def main() -> None:
    for path in sorted(CASES.glob("*.txt")):
        files, env, expected = parts(path.read_text())
        if not expected:
            with tempfile.TemporaryDirectory() as folder:
                given = path.read_text().partition(RULE)[0]
                path.write_text(given + RULE + outcome(files, env, Path(folder)))


if __name__ == "__main__":
    main()
