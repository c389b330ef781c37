"""The rules of the house, as far as a test can hold them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gateway
from gateway.fields import settings_of, unwrap
from gateway.registry import BUILT_IN, Registry

ROOT = Path(__file__).parents[1]
CORE = sorted(path for path in (ROOT / "gateway").rglob("*.py"))
STAGES = sorted(path.stem for path in BUILT_IN.glob("[a-z]*.py"))
DOCS = (ROOT / "docs" / "stages.md").read_text()

# Core files that are specified by another's test file, and why.
TESTED_ELSEWHERE = {
    "config/identity": "a part of test_oidc",
    "testing/azure": "a part of test_testing",
    "azure/request_view": "types only",
    "transport/response_head": "a part of test_server",
    "limits/counters": "types only",
    "__init__": "the public API, pinned here",
    "__main__": "one line, run by test_cli",
    "version": "one line, read by test_cli",
    "usage/response_text": "a part of test_usage",
    "limits/memory_counters": "a part of test_counters",
    "limits/token_bucket": "a part of test_counters",
    "limits/shared_counters": "a part of test_counters",
    "limits/shared_memory": "a part of test_counters and test_connection_count",
    "limits/wait_queue": "a part of test_counters",
    "errors": "raised and seen everywhere; shapes in test_stage and test_server",
    "fields": "a part of test_config",
    "exchange": "its life is the contract of test_stage",
    "protocol/header_policy": "a table, read by test_server and test_upstream",
    "transport/deadline": "a part of test_server and test_upstream",
    "transport/write_buffer": "counted in test_costs",
    "transport/connection_pool": "a part of test_upstream",
    "admin/diagnosis": "a part of test_doctor",
    "azure/resources": "a part of test_model_field and of balance's tests",
    "balancing/retries": "a part of balance's tests",
    "balancing/retry_policy": "a part of balance's tests",
    "config/credentials": "a part of test_config",
    "config/pools": "a part of test_config",
    "transport/client_connection": "one side of test_server and test_hostile",
    "services": "used by stages in test_stage",
    "transport/write_timeout": "slow and stopped clients of test_server and test_relay",
    "testing/serving": "a part of test_testing and test_docs",
    "settings": "read by test_config, used by test_server",
    "response_writer": "one side of test_server and test_stage",
    "body/request_body": "a part of test_request",
    "auth/client_address": "a part of test_server and test_hostile",
    "auth/credentials": "a part of test_request and of auth_passthrough's tests",
    "process/worker": "one side of test_workers",
    "process/generations": "a part of test_reload",
    "testing/surface": "what the fake Azure has, a part of test_operations",
    "testing/stages": "a part of test_testing and of every stage's tests",
    "testing/demo": "run by test_cli",
    "limits/redis_messages": "both ends are in test_redis",
    "limits/redis_url": "a part of test_store",
    "limits/redis_script": "a part of test_redis",
    "limits/late_timer": "a part of test_redis",
    "config/load": "a part of test_config",
    "config/resources": "a part of test_config",
    "config/convert": "a part of test_config",
    "config/files": "a part of test_config",
    "config/nodes": "a part of test_config",
    "config/sources": "a part of test_watch",
    "config/pipeline": "a part of test_config",
    "config/schema": "a part of test_config",
    "config/show": "a part of test_config",
    "config/write": "a part of test_go_proxy",
}


def test_the_public_api_is_these_names() -> None:
    """What a plugin author may import; a change here is a change for strangers."""
    assert set(gateway.__all__) == {
        "ApiError", "Charge", "CountersUnavailable", "Credential", "Decision", "Event", "EventFilter", "Filter",
        "Headers", "Limit", "Meta", "Next", "Outcome", "Price", "Request", "Response", "Retrier", "RetryBudget",
        "RetryLimits", "Services", "Stage", "StreamError", "Target", "UpstreamError", "Usage",
    }  # fmt: skip
    for name in gateway.__all__:
        assert getattr(gateway, name).__doc__ or name in ("Next", "Meta")


@pytest.mark.parametrize("stage", STAGES)
def test_built_in_stages_import_only_public_names(stage: str) -> None:
    """As a stranger's would; `tests/test_imports.py` sees that they import from no other module."""
    tree = ast.parse((BUILT_IN / f"{stage}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "gateway":
            assert {alias.name for alias in node.names} <= set(gateway.__all__)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_and_setting_is_documented_and_tested(stage: str) -> None:
    """In its own words, in docs/stages.md, and in a test file of its own name that mentions every setting."""
    cls = Registry().find(stage)
    assert cls.__doc__
    section = re.search(rf"^## `{stage}`\n(.*?)(?=^## |\Z)", DOCS, re.DOTALL | re.MULTILINE)
    assert section, f"docs/stages.md has no section on {stage}"
    tests = (ROOT / "tests" / "plugins" / f"test_{stage}.py").read_text()
    for name, (kind, _) in settings_of(cls).items():
        _, meta = unwrap(kind)
        assert meta is not None, f"{stage}.{name} has no description"
        assert meta.description
        assert f"`{name}`" in section.group(1), f"docs/stages.md does not mention {stage}.{name}"
        assert name in tests or name == next(iter(settings_of(cls)))


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT / "gateway")))
def test_each_core_file_has_its_tests(path: Path) -> None:
    """At the same place below `tests/`, or elsewhere for a reason; test_cli runs every command."""
    place = path.relative_to(ROOT / "gateway").with_suffix("")
    tests = ROOT / "tests" / place.parent / f"test_{place.name}.py"
    assert tests.is_file() or str(place) in TESTED_ELSEWHERE or place.name == "__init__" or place.parts[0] == "cli"


def test_tests_state_the_behaviour() -> None:
    """Every test has a docstring."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


# How a test reads a clock that runs by itself, and two ways to ask for one that is kept.
CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "thread_time", "time", "now"}


def reads_a_clock(node: ast.AST) -> bool:
    """Whether an expression calls `time.monotonic()`, `loop.time()`, `asyncio.get_running_loop().time()` or the like.

    A test's own clock, which stands still, is called `clock`, and may be read.
    """
    for each in ast.walk(node):
        if not isinstance(each, ast.Call):
            continue
        name = each.func
        if isinstance(name, ast.Name) and name.id in CLOCKS - {"time", "now"}:
            return True
        if isinstance(name, ast.Attribute) and name.attr in CLOCKS and "clock" not in ast.unparse(name.value).lower():
            return True
    return False


def measured(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[int]:
    """Return the lines on which a function compares times that have passed: differences of a clock's readings."""
    readings = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and reads_a_clock(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def passed(node: ast.AST) -> bool:
        return any(
            isinstance(each, ast.BinOp)
            and isinstance(each.op, ast.Sub)
            and not isinstance(each.right, ast.Constant)  # a moment before another
            and any(
                reads_a_clock(side) or (isinstance(side, ast.Name) and side.id in readings)
                for side in (each.left, each.right)
            )
            for each in ast.walk(node)
        )

    durations = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and passed(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return [
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Compare)
        and (passed(node) or any(isinstance(each, ast.Name) and each.id in durations for each in ast.walk(node)))
    ]


def test_no_test_measures_time() -> None:
    """A busy machine is slower, and nothing is wrong: what is bounded is counted, what must happen is waited for."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.parent.name in ("bench", "fuzz", "soak"):  # programs of their own, with a limit on a hang
            continue  # which measures and is no test
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert not measured(node), f"{path.name}:{measured(node)} compares a measured time"


def test_a_measured_time_is_found() -> None:
    """In each way that it was written; a comparison with a moment, and a clock that a test turns, are none."""
    for line in (
        "begun = loop.time()\n    work()\n    assert loop.time() - begun < 2",
        "begun = time.monotonic()\n    assert (status, time.monotonic() - begun < 5) == (504, True)",
        "begun = perf_counter()\n    took = perf_counter() - begun\n    assert took < 1",
        "at = asyncio.get_running_loop().time()\n    if end() - at > 1:\n        raise AssertionError",
    ):
        (function,) = ast.parse(f"def test():\n    {line}\n").body
        assert isinstance(function, ast.FunctionDef)
        assert measured(function), line
    for line in (
        "clock.now += 5\n    assert clock.time() - 5 == 0",
        "before = time.monotonic()\n    assert before <= at <= time.monotonic()",
        "assert row.available_in(time.monotonic()) <= 1",
        "assert seconds_until(time.time() - 30) == 0",
    ):
        (function,) = ast.parse(f"def test():\n    {line}\n").body
        assert isinstance(function, ast.FunctionDef)
        assert not measured(function), line


def test_no_file_speaks_of_another_place() -> None:
    """Nothing names a machine's paths, and only the captures test looks outside the checkout."""
    for path in [*CORE, *BUILT_IN.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text()
        assert "/work" + "/" not in text
        assert "shared" + "/" not in text or path.name == "test_captures.py"
