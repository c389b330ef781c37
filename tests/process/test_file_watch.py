"""The files of a configuration, and when they count as changed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.config import load
from gateway.config.sources import Sources
from gateway.errors import ConfigError
from gateway.process import file_watch as watch
from tests.conftest import until, write_files

YAML = """
teams: [teams/*.yaml, other.yaml]
plugins_path: mine
resources: {a: {endpoint: https://x.openai.azure.com, api_key: "${file:key}"}}
pipeline: [auth_passthrough, model_map, api_version]
"""
FILES = {
    "gateway.yaml": YAML,
    "teams/x.yaml": "match: {path_prefix: /x}\n",
    "other.yaml": "match: {path_prefix: /other}\n",
    "key": "sesame\n",
    "mine/readme": "",
}


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_INTERVAL", 0.02)


def sources_of(path: Path) -> Sources:
    """Read a configuration, valid or not, and return its sources."""
    sources = Sources()
    with contextlib.suppress(ConfigError):
        load(path, {}, sources=sources)
    return sources


async def noticed(sources: Sources, change: Callable[[], object]) -> bool:
    """Return whether a change is noticed within ten polls."""
    looks, look = 0, sources.stats

    def stats() -> Any:
        nonlocal looks
        looks += 1
        return look()

    sources.stats = stats  # type: ignore[method-assign] # it counts
    waiting = asyncio.create_task(watch.wait_for_change(sources))
    await until(lambda: looks >= 3)
    assert not waiting.done()
    change()
    changed_at = looks
    await until(lambda: waiting.done() or looks >= changed_at + 10)
    done = waiting.done()
    waiting.cancel()
    await asyncio.wait((waiting,))
    return done


def renamed_over(folder: Path) -> None:
    (folder / "new").write_text(YAML.replace("a:", "b:"))
    (folder / "new").rename(folder / "gateway.yaml")


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": lambda folder: (folder / "gateway.yaml").write_text(YAML + "# more\n"),
    "an editor's rename": renamed_over,
    "a team's file": lambda folder: (folder / "teams/x.yaml").write_text("match: {path_prefix: /y}\n"),
    "a team more": lambda folder: (folder / "teams/y.yaml").write_text("match: {path_prefix: /y}\n"),
    "a team less": lambda folder: (folder / "teams/x.yaml").unlink(),
    "a file named without a pattern": lambda folder: (folder / "other.yaml").unlink(),
    "a secret of the same length": lambda folder: (folder / "key").write_text("simsim\n"),
    "a stage more": lambda folder: (folder / "mine/new.py").write_text("1\n"),
    "removed": lambda folder: (folder / "gateway.yaml").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_every_file_that_counts_is_watched(change: str, tmp_path: Path) -> None:
    """Existing files, and files that a pattern would match."""
    sources = sources_of(write_files(tmp_path, FILES))
    assert await noticed(sources, lambda: CHANGES[change](tmp_path))


UNCHANGED: dict[str, Callable[[Path], object]] = {
    "touched": lambda folder: os.utime(folder / "gateway.yaml"),
    "written with the same text": lambda folder: (folder / "key").write_text("sesame\n"),
    "another file": lambda folder: (folder / "teams/readme.txt").write_text("hello"),
    "the code of a stage": lambda folder: (folder / "mine/code.py").write_text("2\n"),
}


@pytest.mark.parametrize("change", UNCHANGED)
async def test_the_same_content_is_no_change(change: str, tmp_path: Path) -> None:
    """Not even with new timestamps; a stage's code is not watched, because a reload does not load it again."""
    sources = sources_of(write_files(tmp_path, {**FILES, "mine/code.py": "1\n"}))
    assert not await noticed(sources, lambda: UNCHANGED[change](tmp_path))


async def test_a_config_map_s_swap_is_a_change(tmp_path: Path) -> None:
    """Kubernetes mounts links through `..data`, and points that to another folder: all files change at once."""
    for version, prefix in (("..1", "/x"), ("..2", "/y")):
        write_files(tmp_path / version, {**FILES, "teams/x.yaml": f"match: {{path_prefix: {prefix}}}\n"})
    (tmp_path / "..data").symlink_to("..1")
    for name in ("gateway.yaml", "teams", "other.yaml", "key", "mine"):
        (tmp_path / name).symlink_to(f"..data/{name}")

    def swap() -> None:
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    assert await noticed(sources_of(tmp_path / "gateway.yaml"), swap)


@pytest.mark.parametrize(("missing", "text"), [("key", "sesame\n"), ("gateway.yaml", YAML), ("other.yaml", "a: b\n")])
async def test_what_was_missing_is_watched_for(missing: str, text: str, tmp_path: Path) -> None:
    """A configuration that could not be read is read again when the missing file appears."""
    path = write_files(tmp_path, FILES)
    (tmp_path / missing).unlink()
    assert await noticed(sources_of(path), lambda: (tmp_path / missing).write_text(text))


async def test_a_file_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    """It counts as changed when two polls in a row agree."""
    path = write_files(tmp_path, FILES)
    waiting = asyncio.create_task(watch.wait_for_change(sources_of(path)))
    await asyncio.sleep(0.1)
    for number in range(60):
        path.write_text(YAML + "#" * number)
        await asyncio.sleep(0.005)
        assert not waiting.done()
    async with asyncio.timeout(30):
        await waiting


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    """Several processes compare it to see that they read the same."""
    path = write_files(tmp_path, FILES)
    first, second = sources_of(path), sources_of(path)
    assert first.digest == second.digest
    (tmp_path / "key").write_text("simsim\n")
    assert sources_of(path).digest != first.digest
    assert set(map(os.path.basename, first.files)) == {"gateway.yaml", "x.yaml", "other.yaml", "key"}
    assert load(path, {}).sources == sources_of(path)


async def test_a_pipe_is_not_read_again(tmp_path: Path) -> None:
    """`--config /dev/stdin` has been read to its end; another read would block for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plain").write_text("1")
    sources = Sources({str(tmp_path / "pipe"): "as it was"})
    sources.read(tmp_path / "plain")
    assert not await noticed(sources, lambda: os.utime(tmp_path / "pipe"))
    assert await noticed(sources, lambda: (tmp_path / "plain").write_text("2"))
