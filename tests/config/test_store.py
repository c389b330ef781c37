"""`store:` of a configuration: the counters of limits, and no output with a password."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import trustme

from gateway.config import load
from gateway.config.show import show
from gateway.errors import ConfigError
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.redis_counters import RedisCounters
from gateway.limits.redis_url import RedisUrl
from gateway.limits.wait_queue import WaitQueue
from gateway.services import Shared
from tests.conftest import write_files

YAML = """
store: STORE
resources: {azure: {endpoint: "https://x.openai.azure.com"}}
pipeline: [auth_passthrough, model_map, api_version]
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://redis.example", {"host": "redis.example"}),
        ("redis://:p%40ss%2F@redis:6380/3", {"host": "redis", "port": 6380, "database": 3, "password": "p@ss/"}),
        ("rediss://user:pass@[::1]:1/", {"host": "::1", "port": 1, "tls": True, "user": "user", "password": "pass"}),
        ("unix:///run/redis/redis.sock", {"unix": "/run/redis/redis.sock"}),
        ("unix://u:p%3Fq@/run/r.sock", {"unix": "/run/r.sock", "user": "u", "password": "p?q"}),
    ],
)
def test_urls_that_name_a_redis(text: str, expected: dict[str, object]) -> None:
    """Each kind, with percent escapes in the password; neither is shown."""
    url = RedisUrl.parse(text)
    assert url == RedisUrl(**expected)  # type: ignore[arg-type] # of several types
    assert str(url).startswith("Redis over TLS at " if url.tls else "Redis at ")
    assert not {url.user, url.password} & set(re.split("[ @:]", str(url)))
    assert not url.password or url.password not in repr(url)


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("sesame", {}, "must be a URL"),
        ("", {}, "must be a URL"),
        ("http://u:sesame@redis:1", {}, "must be a URL"),
        ("redis://u:sesame@", {}, "must be a URL"),
        ("redis://u:sesame@redis:no", {}, "must be a URL"),
        ("redis://u:ses#ame@redis:1", {}, "must be a URL"),
        ("redis://u:sesame@redis:1?db=sesame", {}, "must be a URL"),
        ("redis://u:sesame@redis:1/sesame", {}, "the number of a database"),
        ("unix:sesame", {}, "must be a URL"),
        ("unix://u:sesame@/run/r.sock?db=1", {}, "must be a URL"),
        ("unix:///run/sesame", {"cluster": True}, "neither a unix socket"),
        ("redis://u:sesame@redis:1/1", {"cluster": True}, "neither a unix socket nor databases"),
        ("redis://u:sesame@redis:1", {"ca": Path("ca.pem")}, "`ca` is for TLS"),
    ],
)
def test_what_is_no_redis_is_a_mistake_that_does_not_repeat_it(text: str, more: dict[str, object], words: str) -> None:
    """It may contain a password."""
    with pytest.raises(ValueError, match=words) as caught:
        RedisUrl.parse(text, **more)  # type: ignore[arg-type] # of several types
    assert "sesame" not in str(caught.value)


def test_redis_without_its_library_is_a_clear_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its position in the file, before the first request."""
    find = PathFinder.find_spec

    def hidden(name: str, path: object = None, target: object = None) -> object:
        return None if name == "redis" else find(name, path, target)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(PathFinder, "find_spec", hidden)
    monkeypatch.delitem(sys.modules, "redis", raising=False)
    with pytest.raises(ConfigError) as caught:
        load(write_files(tmp_path, {"gateway.yaml": YAML.replace("STORE", '{redis: "redis://u:sesame@redis"}')}))
    (mistake,) = caught.value.mistakes
    assert (mistake.line, mistake.column) == (2, 16)
    assert "azure-openai-gateway[redis]" in mistake.message
    assert "sesame" not in mistake.message


def test_what_a_configuration_says_of_it(tmp_path: Path) -> None:
    """All its settings, or the URL alone; `gateway check` shows the store without its URL."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    more = "{redis: '${URL}', ca: ca.pem, cluster: true, timeout: 0.5, prefix: house}"
    loaded = load(
        write_files(tmp_path, {"gateway.yaml": YAML.replace("STORE", more)}), {"URL": "rediss://u:sesame@redis.example"}
    )
    assert loaded.store is not None
    assert dataclasses.astuple(loaded.store) == (
        "redis.example", 6379, None, 0, "u", "sesame", True, tmp_path / "ca.pem", True, 0.5, "house",
    )  # fmt: skip
    assert "limits counted in a Redis cluster over TLS at redis.example:6379\n" in show(loaded)
    assert "sesame" not in show(loaded)
    assert "u:" not in show(loaded)
    loaded = load(write_files(tmp_path, {"gateway.yaml": YAML.replace("STORE", "redis://redis")}))
    assert loaded.store == RedisUrl("redis")
    loaded = load(write_files(tmp_path, {"gateway.yaml": YAML.replace("store: STORE", "")}))
    assert loaded.store is None


async def test_counters_outlive_a_reload(tmp_path: Path) -> None:
    """Each store is kept, and each configuration counts in its own."""

    def read(store: str) -> WaitQueue:
        loaded = load(write_files(tmp_path, {"gateway.yaml": YAML.replace("store: STORE", store)}), shared=shared)
        return next(iter(loaded.teams.default.services.values())).counters

    shared = Shared()
    first = read("")
    assert isinstance(first.store, MemoryCounters)
    second = read("store: redis://one")
    assert isinstance(second.store, RedisCounters)
    assert second.store.url.host == "one"
    assert read("store: redis://one:6379/0") is second
    with pytest.raises(ConfigError):
        read("store: redis://two\nunknown: 1")
    assert read("store: {redis: 'redis://one', timeout: 1}") is not second
    assert read("store: redis://one") is second
    assert read("") is first is shared.counters
    await shared.close()
