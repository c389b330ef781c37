"""The rules of the project that a test can check."""

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

# Core files without a test file of the same name, and where they are tested.
TESTED_ELSEWHERE = {
    "azure/path_ids": "a part of test_urls and test_request",
    "config/identity": "a part of test_oidc",
    "testing/azure": "a part of test_testing",
    "azure/request_view": "types only",
    "transport/response_head": "a part of test_server",
    "limits/counters": "types only",
    "__init__": "the public API, pinned here",
    "__main__": "one line, run by test_cli",
    "version": "one line, read by test_cli",
    "usage/response_text": "a part of test_usage_scanner",
    "usage/metered_operations": "a table, checked by test_accounting",
    "usage/usage_fields": "a part of test_usage_scanner",
    "protocol/request_id": "a part of test_server and test_hostile",
    "limits/memory_counters": "a part of test_counters",
    "limits/token_bucket": "a part of test_counters",
    "limits/shared_counters": "a part of test_counters",
    "limits/shared_memory": "a part of test_counters and test_connection_limit",
    "limits/wait_queue": "a part of test_counters",
    "errors": "raised and seen everywhere; shapes in test_stage and test_server",
    "fields": "a part of test_config",
    "exchange": "its life is the contract of test_stage",
    "protocol/http1_fields": "the ground of test_http1_request and test_http1_response",
    "protocol/header_policy": "a table, read by test_server and test_upstream",
    "transport/deadline": "a part of test_server and test_upstream",
    "transport/write_buffer": "counted in test_costs",
    "transport/connection_pool": "a part of test_upstream",
    "transport/upstream_response": "a part of test_upstream_connection",
    "transport/paused_reading": "a part of test_upstream_connection",
    "transport/upgradable_connection": "one side of test_websocket_relay",
    "admin/diagnosis": "a part of test_doctor",
    "azure/resources": "a part of test_model_field and of balance's tests",
    "balancing/attempts": "a part of balance's tests",
    "balancing/circuit_state": "a part of test_circuit_breaker",
    "balancing/failure_window": "a part of test_circuit_breaker",
    "balancing/retries": "a part of balance's tests",
    "balancing/retry_budget": "a part of balance's tests",
    "balancing/failure_policy": "a part of balance's tests",
    "config/credentials": "a part of test_config",
    "config/pools": "a part of test_config",
    "services": "used by stages in test_stage",
    "transport/write_timeout": "slow and stopped clients of test_server and test_websocket_relay",
    "transport/websocket_limits": "a part of test_websocket_relay",
    "transport/websocket_messages": "a part of test_websocket_relay",
    "transport/websocket_ping": "a part of test_websocket_relay",
    "transport/websocket_side": "a part of test_websocket_relay",
    "testing/serving": "a part of test_testing and test_docs",
    "settings": "read by test_config, used by test_server",
    "response_writer": "one side of test_server and test_stage",
    "stream_writer": "a part of test_server, test_stage and test_typewriter",
    "generation": "a part of test_reload and test_reload_memory",
    "process/server_process": "run by test_cli and test_supervisor",
    "transport/http_server": "a part of test_server and test_file_descriptors",
    "transport/socket_state": "slow and disconnected clients of test_server and test_websocket_relay",
    "body/request_body": "a part of test_request",
    "protocol/headers": "a part of test_request",
    "auth/client_address": "a part of test_server and test_hostile",
    "auth/credentials": "a part of test_request and of auth_passthrough's tests",
    "process/worker": "one side of test_supervisor",
    "process/worker_health": "a part of test_supervisor",
    "process/worker_messages": "a part of test_supervisor and of test_reload",
    "process/worker_process": "one side of test_supervisor",
    "process/worker_restarts": "a part of test_supervisor",
    "process/two_phase_reload": "a part of test_supervisor",
    "process/generations": "a part of test_reload",
    "testing/surface": "what the fake Azure has, a part of test_operations",
    "testing/stages": "a part of test_testing and of every stage's tests",
    "testing/demo": "run by test_cli",
    "limits/redis_messages": "both ends are in test_redis_counters",
    "limits/redis_url": "a part of test_store",
    "limits/redis_script": "a part of test_redis_counters",
    "limits/stall_tolerant_timer": "a part of test_redis_counters",
    "config/addresses": "a part of test_config",
    "config/keys": "a part of test_config",
    "config/load": "a part of test_config",
    "config/match": "a part of test_config",
    "config/paths": "a part of test_config",
    "config/pipeline_order": "a part of test_config",
    "config/teams": "a part of test_config",
    "config/background": "a part of test_store and of test_resources",
    "config/resources": "a part of test_config",
    "config/convert": "a part of test_config",
    "config/files": "a part of test_config",
    "config/nodes": "a part of test_config",
    "config/sources": "a part of test_file_watch",
    "config/pipeline": "a part of test_config",
    "config/schema": "a part of test_config",
    "config/show": "a part of test_config",
    "config/write": "a part of test_go_proxy",
}


def test_the_public_api_is_these_names() -> None:
    """The names for plugin authors; a change here breaks their plugins."""
    assert set(gateway.__all__) == {
        "ApiError", "Charge", "CountersUnavailable", "Credential", "Decision", "ErrorBody", "Event", "EventFilter",
        "Filter", "Headers", "Limit", "Meta", "Next", "Outcome", "Price", "Request", "Response", "Retrier",
        "RetryBudget", "RetryLimits", "Services", "Stage", "StreamError", "Target", "UpstreamError", "Usage",
    }  # fmt: skip
    for name in gateway.__all__:
        assert getattr(gateway, name).__doc__ or name in ("Next", "Meta")


@pytest.mark.parametrize("stage", STAGES)
def test_built_in_stages_import_only_public_names(stage: str) -> None:
    """As other plugins do; `tests/test_imports.py` checks that they import from no other module."""
    tree = ast.parse((BUILT_IN / f"{stage}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "gateway":
            assert {alias.name for alias in node.names} <= set(gateway.__all__)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_and_setting_is_documented_and_tested(stage: str) -> None:
    """In its docstring, in docs/stages.md, and in a test file of its name that mentions every setting."""
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
    """At the same path below `tests/`, or in `TESTED_ELSEWHERE`; test_cli runs every command."""
    place = path.relative_to(ROOT / "gateway").with_suffix("")
    tests = ROOT / "tests" / place.parent / f"test_{place.name}.py"
    assert tests.is_file() or str(place) in TESTED_ELSEWHERE or place.name == "__init__" or place.parts[0] == "cli"


def test_tests_elsewhere_exist() -> None:
    """Each core file of `TESTED_ELSEWHERE` exists, and so does each test file that a reason names."""
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for core, reason in TESTED_ELSEWHERE.items():
        assert (ROOT / "gateway" / f"{core}.py").is_file(), core
        assert set(re.findall(r"test_\w+", reason)) <= tests, core


def test_tests_state_the_behaviour() -> None:
    """Every test has a docstring."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


# Names of functions that read a running clock.
CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "thread_time", "time", "now"}


def reads_a_clock(node: ast.AST) -> bool:
    """Whether an expression calls `time.monotonic()`, `loop.time()`, `asyncio.get_running_loop().time()` or the like.

    A fake clock of a test is called `clock` and may be read.
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
    """Return the lines on which a function compares durations, which are differences of clock readings."""
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
            and not isinstance(each.right, ast.Constant)  # a moment, no duration
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
    """A busy machine is slow without an error, so tests count what is bounded and wait for what must happen."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.parent.name in ("bench", "fuzz", "soak"):  # programs that measure
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert not measured(node), f"{path.name}:{measured(node)} compares a measured time"


def test_a_measured_time_is_found() -> None:
    """In each form; comparisons of moments, and a fake clock, are accepted."""
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
    """No file names paths of a machine, and only the captures test reads outside the checkout."""
    for path in [*CORE, *BUILT_IN.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text()
        assert "/work" + "/" not in text
        assert "shared" + "/" not in text or path.name == "test_captures.py"
