"""`parameters`: adapts request parameters to the deployment's model and the api-version."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, NamedTuple

from gateway import Meta, Next, Request, Response, Services, Stage

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "chat.completions", "completions", "responses", "embeddings"
OPERATIONS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)

# -- the table: by base model ----------------------------------------------------------------------------------------
# Models and parameters: Microsoft's page "Azure OpenAI reasoning models" (2026-02-24): its tables of models, "Not
# Supported" and the notes on `max_completion_tokens` and `max_output_tokens`. o1-mini, o1-preview: the page of 2025-02.
# gpt-5-chat is not one of them (BerriAI/litellm #15198); gpt-5.1-chat and later are (the page; Aider #4707), and so
# is gpt-chat-latest (IBM/mcp-context-forge #5021).
REASONING = ("o1", "o1-*", "o3", "o3-*", "o4-*", "gpt-5*", "codex-mini*", "gpt-chat-latest*")
NOT_REASONING = ("gpt-5-chat*", "gpt-5chat*")
REASONING_DROPS = {
    CHAT: (
        "temperature", "top_p", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "logit_bias",
    ),
    RESPONSES: ("temperature", "top_p", "top_logprobs"),
}  # fmt: skip
# Chat Completions only: the limit of the Responses API is `max_output_tokens` for every model.
REASONING_RENAMES = {CHAT: {"max_tokens": "max_completion_tokens"}}
# The page's row "Parallel Tool Calls".
ONE_TOOL_CALL = ("o1", "o1-*", "o3", "o3-*", "o4-*", "codex-mini*", "gpt-5*-pro", "gpt-5*-pro-20*")
ONE_TOOL_CALL_DROPS = ("parallel_tool_calls",)

# -- the table: by api-version ---------------------------------------------------------------------------------------
# The first api-version with a parameter: Microsoft's page "API version lifecycle", and for 2024-09-01-preview
# Azure/azure-rest-api-specs #30909. v1 has all of them. Parameters that change the response, such as `audio`,
# `modalities` and `response_format`, are not in the table: Azure rejects them, and the client gets that error.
SINCE = {
    CHAT: {
        "stream_options": "2024-09-01", "parallel_tool_calls": "2024-09-01", "store": "2024-12-01",
        "metadata": "2024-12-01", "reasoning_effort": "2024-12-01", "prediction": "2025-01-01",
    },
    COMPLETIONS: {"stream_options": "2024-09-01"},
}  # fmt: skip
LIMIT_SINCE = "2024-09-01"  # `max_completion_tokens`; before, it was `max_tokens` (openai-python #1724)

# The beginning of a base model in a deployment's name: prod-gpt-5-mini, gpt5-mini, gpt4o_eu, xc-o3.
MODEL_START = re.compile(r"(?<![a-z0-9])(gpt-?(?=[0-9])|gpt-(?:oss|chat)|o[134](?![a-z0-9])|codex-mini)")

# A top-level field: rules do not apply to nested ones.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# Fields that no rule may change: a request is not valid without them.
NOT_PARAMETERS = frozenset({"model", "messages", "input", "prompt", "stream"})


@dataclass
class Rule:
    """A rule for the models of a name; it overrides the table."""

    models: Annotated[str, Meta(description="base models, as a glob: gpt-oss-*", min_length=1)]
    rename: Annotated[
        dict[Name, Name], Meta(description="parameters to rename: {max_tokens: max_completion_tokens}")
    ] = field(default_factory=dict)
    drop: Annotated[list[Name], Meta(description="parameters to remove")] = field(default_factory=list)
    keep: Annotated[list[Name], Meta(description="parameters to keep, despite earlier rules and the table")] = field(
        default_factory=list
    )
    operations: Annotated[
        list[str],
        Meta(description="operations; default: chat.completions and responses; also possible: completions, embeddings"),
    ] = field(default_factory=lambda: [CHAT, RESPONSES])


class Plan(NamedTuple):
    """The changes to the parameters of one operation, model and api-version."""

    rename: dict[str, str]
    drop: frozenset[str]
    affected: tuple[str, ...]


@dataclass
class Parameters(Stage):
    """Rename or remove parameters that the deployment's model or the api-version rejects, by a built-in table.

    The model is the deployment's base model: from `base_models`, else from the deployment's name, else from the
    client's name of the model. A request that needs no change is sent byte for byte; in a changed one, all other values
    keep their bytes. The log event has the changes as `adapted`: names, never values.
    """

    base_models: Annotated[
        dict[str, str],
        Meta(
            description="base models of deployments (NAME or RESOURCE/NAME), or of models by the client's name, if the "
            "name does not contain it: {prod-chat: gpt-5-mini}"
        ),
    ] = field(default_factory=dict)
    rules: Annotated[
        list[Rule], Meta(description="rules that override the table; a later rule overrides an earlier one")
    ] = field(default_factory=list)
    header: Annotated[bool, Meta(description="report the changes in the response header x-gateway-adapted")] = False

    needs = ("deployment", "api_version")

    def __post_init__(self) -> None:
        # Clients choose the names: the cache is bounded.
        self._plan = lru_cache(maxsize=1024)(self._make_plan)

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for name, base in self.base_models.items():
            resource, slash, deployment = name.rpartition("/")
            if not deployment.strip() or not base.strip() or name != name.strip():
                yield ("base_models", name), f"{name}: {base} is not `deployment: base model`; both need a name"
            elif slash and resource not in services.resources:
                known = ", ".join(services.resources) or "none"
                yield ("base_models", name), f"there is no resource {resource!r} for {name!r}; there is {known}"
        for index, rule in enumerate(self.rules):
            for path, problem in mistakes_in(rule):
                yield ("rules", index, *path), problem

    async def __call__(self, request: Request, call_next: Next) -> Response:
        operation = request.operation
        if operation not in OPERATIONS:
            return await call_next(request)
        target = request.target
        plan = self._plan(
            operation,
            target.resource.name if target.resource is not None else "",
            target.deployment or "",
            await request.model() or "",
            target.api_version or "",
        )
        if plan is None or not await request.fields(*plan.affected):
            return await call_next(request)
        fields = await request.fields()
        changes = adapt(fields, plan)
        request.set_fields(fields)
        for change in changes:
            request.record_adaptation(change)
        request.count(self.id)
        response = await call_next(request)
        if self.header:
            response.headers.add("x-gateway-adapted", ", ".join(changes))
        return response

    def _make_plan(self, operation: str, resource: str, deployment: str, model: str, version: str) -> Plan | None:
        names = self._models(resource, deployment, model.strip())
        drop: set[str] = set()
        rename: dict[str, str] = {}
        dated = version[:10] if version[:1].isdigit() else "9999"  # v1 has everything
        drop.update(name for name, since in SINCE.get(operation, {}).items() if dated < since)
        if any(matches(name, REASONING) and not matches(name, NOT_REASONING) for name in names):
            drop.update(REASONING_DROPS.get(operation, ()))
            rename.update(REASONING_RENAMES.get(operation, {}))
        elif operation == CHAT and dated < LIMIT_SINCE:
            rename["max_completion_tokens"] = "max_tokens"
        if operation in (CHAT, RESPONSES) and any(matches(name, ONE_TOOL_CALL) for name in names):
            drop.update(ONE_TOOL_CALL_DROPS)
        for rule in self.rules:
            if operation in rule.operations and any(matches(name, (rule.models.lower(),)) for name in names):
                apply(rule, rename, drop)
        affected = tuple(dict.fromkeys([*rename, *sorted(drop)]))
        return Plan(rename, frozenset(drop), affected) if affected else None

    def _models(self, resource: str, deployment: str, model: str) -> tuple[str, ...]:
        """Return the base model if it is known, else all names of the model."""
        for name in (f"{resource}/{deployment}", deployment, model):
            if (configured := self.base_models.get(name)) is not None:
                return (base_model(configured.strip()) or configured.strip().lower(),)
        for name in (deployment, model):
            if (found := base_model(name)) is not None:
                return (found,)
        return tuple(name.lower() for name in (deployment, model) if name)


def base_model(name: str) -> str | None:
    """Return the base model in a name, such as gpt-5-mini for prod-gpt5-mini; None if there is none."""
    starts = list(MODEL_START.finditer(lowered := name.lower().replace("_", "-")))
    if not starts:
        return None
    found = next((each for each in starts if each.group().startswith("gpt")), starts[0])
    return lowered[found.start() :].replace("gpt", "gpt-", 1).replace("gpt--", "gpt-", 1)


def matches(name: str, globs: tuple[str, ...]) -> bool:
    """Whether any of the globs matches the name."""
    return any(fnmatchcase(name, each) for each in globs)


def apply(rule: Rule, rename: dict[str, str], drop: set[str]) -> None:
    """Apply a rule on top of the changes so far."""
    for name in rule.keep:
        rename.pop(name, None)
        drop.discard(name)
    for name in rule.drop:
        # Parameters that are renamed to it are dropped, too.
        sources = [old for old, new in rename.items() if new == name]
        for old in (name, *sources):
            rename.pop(old, None)
            drop.add(old)
    for old, new in rule.rename.items():
        rename.pop(new, None)
        drop -= {old, new}
        rename[old] = new


def adapt(fields: dict[str, bytes], plan: Plan) -> list[str]:
    """Change a body's fields; return the changes.

    If a body has a parameter under both names, the value under the new name stays, unless it is null.
    """
    changes: list[str] = []
    before = dict(fields)
    fields.clear()
    for name, value in before.items():
        new = plan.rename.get(name)
        if name in plan.drop or (new is not None and before.get(new, b"null") != b"null"):
            changes.append(f"{name}: dropped")
        elif new is not None:
            changes.append(f"{name}: renamed {new}")
            fields[new] = value
        elif value != b"null" or name not in fields:
            fields[name] = value
    return changes


def mistakes_in(rule: Rule) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the mistakes in a rule."""
    if rule.models.startswith("~") or rule.models.count("[") != rule.models.count("]"):
        yield (
            ("models",),
            f"{rule.models!r} is not a valid glob, such as gpt-oss-*; rules do not support regular expressions",
        )
    if not (rule.rename or rule.drop or rule.keep):
        yield (), f"the rule for {rule.models!r} is empty; add rename, drop or keep"
    for name in rule.operations:
        if name not in OPERATIONS:
            yield ("operations",), f"{name!r} is not an operation with parameters: {', '.join(OPERATIONS)}"
    for old, new in rule.rename.items():
        if new in NOT_PARAMETERS or list(rule.rename.values()).count(new) > 1:
            yield (
                ("rename", old),
                f"{old!r} cannot be renamed to {new!r}, which is a required field or the new name of two parameters",
            )
        if old == new or new in rule.rename:
            yield ("rename", old), f"{old!r} cannot be renamed to {new!r}, which is itself renamed"
    names = [*rule.rename, *rule.drop, *rule.keep]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield (), f"the rule for {rule.models!r} has {name!r} twice"
        if name in NOT_PARAMETERS:
            yield (), f"{name!r} is not a parameter that a rule may change"
