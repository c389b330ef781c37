"""`proxy:` of a resource: valid URLs, and that nothing prints a password."""

from __future__ import annotations

import dataclasses
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from gateway.config import load
from gateway.errors import ConfigError
from gateway.protocol.proxy_url import Proxy
from tests.conftest import write_files

SHIPPED = Path(__file__).parents[2] / "config" / "gateway.yaml"
YAML = """
resources: {azure: {endpoint: "https://x.openai.azure.com", proxy: "PROXY"}}
pipeline: [auth_passthrough, model_map, api_version]
"""


@pytest.mark.parametrize(
    ("text", "host", "port", "socks", "user", "password"),
    [
        ("http://proxy.example:3128", "proxy.example", 3128, False, None, ""),
        ("http://u:p@[::1]:1", "::1", 1, False, "u", "p"),
        ("http://u@proxy", "proxy", 80, False, "u", ""),
        ("http://us%3Aer:p%40ss%3A%2F@proxy:8/", "proxy", 8, False, None, None),
        ("http://user:p%40ss%3A%2F@proxy:8/", "proxy", 8, False, "user", "p@ss:/"),
        ("socks5://u:p@127.0.0.1", "127.0.0.1", 1080, True, "u", "p"),
        ("socks5h://proxy:9", "proxy", 9, True, None, ""),
    ],
)
def test_urls_that_name_a_proxy(
    text: str, host: str, port: int, socks: bool, user: str | None, password: str | None
) -> None:
    """Both schemes, percent escapes in user names and passwords, default ports; Basic has no `:` in a user name."""
    if password is None:
        with pytest.raises(ValueError, match="cannot be sent"):
            Proxy.parse(text)
        return
    proxy = Proxy.parse(text)
    assert dataclasses.astuple(proxy) == (host, port, socks, user, password)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sesame", "must be a URL"),
        ("sesame:8080", "must be a URL"),
        ("https://u:sesame@proxy:1", "must be a URL"),
        ("socks4://u:sesame@proxy:1", "must be a URL"),
        ("http://u:sesame@:1", "must be a URL"),
        ("http://u:sesame@proxy:no", "must be a URL"),
        ("http://u:sesame@proxy:0", "must be a URL"),
        ("http://u:sesame@a b", "must be a URL"),
        ("http://u:sesame@proxy:1/path", "must end after its port"),
        ("http://u:ses#ame@proxy:1", "must be a URL"),
        ("http://u:p@proxy:1#sesame", "must end after its port"),
        ("http://:sesame@proxy:1", "without a user name"),
        ("http://u:sesame%0d%0ax@proxy:1", "cannot be sent"),
        ("socks5://sesame@proxy:1", "1 to 255 ASCII"),
        ("socks5://u:sesam%C3%A9sesame@proxy:1", "1 to 255 ASCII"),
        ("socks5://u:sesame" + "x" * 255 + "@proxy:1", "1 to 255 ASCII"),
    ],
)
def test_the_error_for_an_invalid_url_does_not_quote_it(text: str, words: str, tmp_path: Path) -> None:
    """It may hold a password: literally, in a variable, or next to a variable."""
    for yaml, env in (
        (YAML.replace("PROXY", text), {}),
        (YAML.replace("PROXY", "${WAY}"), {"WAY": text}),
        (YAML.replace("PROXY", text + "${NOTHING:-}"), {}),
        (YAML.replace("PROXY", "${WAY:-" + text + "}"), {}),
    ):
        with pytest.raises(ConfigError) as caught:
            load(write_files(tmp_path, {"gateway.yaml": yaml}), env)
        (mistake,) = caught.value.mistakes
        assert (mistake.line, mistake.column) == (2, 68)
        assert words in mistake.message
        assert "sesame" not in mistake.message


def test_socks_without_its_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the package to install; HTTP proxies need none."""

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
            return None

    monkeypatch.setattr(sys, "meta_path", [Without])
    monkeypatch.delitem(sys.modules, "python_socks", raising=False)
    with pytest.raises(ValueError, match=r"azure-openai-gateway\[socks\]"):
        Proxy.parse("socks5://127.0.0.1:1080")
    assert not Proxy.parse("http://127.0.0.1:1080").socks


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"AZURE_OPENAI_SOCKS_PROXY": "", "AZURE_OPENAI_HTTP_PROXY": ""}, None),
        ({"AZURE_OPENAI_HTTP_PROXY": "http://u:sesame@web:3128"}, "http://***@web:3128"),
        ({"AZURE_OPENAI_SOCKS_PROXY": "socks5://u:sesame@socks"}, "socks5://***@socks:1080"),
        (
            {"AZURE_OPENAI_SOCKS_PROXY": "socks5://[::1]:9", "AZURE_OPENAI_HTTP_PROXY": "http://web"},
            "socks5://[::1]:9",
        ),
    ],
)
def test_the_shipped_configuration_takes_the_go_proxy_s_variables(env: dict[str, str], expected: str | None) -> None:
    """SOCKS wins, an empty variable counts as unset, and the shown URL has no password."""
    from gateway.config.show import show

    loaded = load(SHIPPED, {"AZURE_OPENAI_ENDPOINT": "https://x.openai.azure.com", **env})
    proxy = loaded.resources["azure"].proxy
    assert (None if proxy is None else str(proxy)) == expected
    shown = show(loaded)
    assert "sesame" not in shown + repr(loaded) + repr(proxy)
    assert ("through the proxy" in shown) == (expected is not None)


def test_the_value_of_a_variable_is_not_expanded_again(tmp_path: Path) -> None:
    """`${A:-${B}}` is B if A is not set; a value that looks like a variable stays unchanged."""
    yaml = YAML.replace('"PROXY"', '"${A:-${B:-http://${C}}}"')
    assert "a `${` has no closing `}`" in _mistake(yaml, {}, tmp_path)
    yaml = YAML.replace("PROXY", "http://${A:-${B}}:1")
    proxy = load(write_files(tmp_path, {"gateway.yaml": yaml}), {"B": "b.example"}).resources["azure"].proxy
    assert str(proxy) == "http://b.example:1"
    assert "must be a URL" in _mistake(yaml, {"B": "${C}", "C": "c.example"}, tmp_path)
    assert "the environment variable B is not set" in _mistake(yaml, {}, tmp_path)


def _mistake(yaml: str, env: dict[str, str], folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write_files(folder, {"gateway.yaml": yaml}), env)
    return str(caught.value)
