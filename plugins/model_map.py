r"""`model_map`: maps the requested model to a deployment of an Azure resource."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Literal

from gateway import ApiError, Meta, Next, Request, Response, Services, Stage, Target

DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Names = list[str]  # inside the class, `list` is a setting

POOL = "pool:"  # prefix of a pool's name; the name of a deployment has no colon
MAX_LISTED = 20  # names in an error message


@dataclass
class ModelMap(Stage):
    r"""Map models to deployments, and serve `/v1/models` from the map.

    A name is exact (`gpt-4o`), a glob (`gpt-4o-*`) or, after `~`, a regular expression for the whole name
    (`~gpt-(.+)`), whose groups the deployment may use (`prod-\1`). Exact names come first, then the others in the
    order of the file. A deployment is `NAME` in the team's resource, `RESOURCE/NAME` in another one, or `pool:NAME`:
    the stage `balance` picks one of the pool.
    """

    models: Annotated[
        dict[str, str] | str,
        Meta(description="`model: deployment` or `model: pool:NAME`; or one string: model=deployment,model=deployment"),
    ] = field(default_factory=dict)
    unmapped: Annotated[
        Literal["own_name_without_dots", "own_name", "refuse"],
        Meta(
            description="a model without a mapping: the deployment of its name without dots, as in Azure's older names "
            "(gpt-3.5-turbo: gpt-35-turbo), the deployment of its unchanged name, or a 404"
        ),
    ] = "own_name_without_dots"
    default: Annotated[
        str | None, Meta(description="the deployment of every model without a mapping; overrides `unmapped`")
    ] = None
    allow: Annotated[
        Names | None,
        Meta(description="models that the team may use, as names, globs or regular expressions; default: all"),
    ] = None
    deny: Annotated[Names, Meta(description="models that the team may not use, even if `allow` has them")] = field(
        default_factory=list
    )
    list: Annotated[
        Names, Meta(description="names that /v1/models lists besides the exact ones, for globs and expressions")
    ] = field(default_factory=list)

    @property
    def provides(self) -> tuple[str, ...]:
        return ("deployment", "pool") if any(target.pool is not None for target in self.targets) else ("deployment",)

    @property
    def targets(self) -> Iterator[Target]:
        # (With groups, the deployment depends on the request.)
        patterns = [target.replace(deployment=None) for _, target, _ in self._patterns]
        yield from (target for target in (*self._exact.values(), *patterns, self._default) if target is not None)

    def __post_init__(self) -> None:
        self._exact: dict[str, Target] = {}
        self._patterns: list[tuple[re.Pattern[str], Target, str]] = []
        self._default: Target | None = None
        self._services = Services(team="", stage="")
        self._team_target = Target()
        self._listed: tuple[str, ...] = ()
        self._allowed: Callable[[str], object] | None = None
        self._denied: Callable[[str], object] = matcher((), loose=True)
        self._denied_deployments: set[str] = set()
        self._open = True

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Read the map, and yield its mistakes with their location."""
        self._services = services
        self._team_target = Target(resource=services.resource)
        seen: set[str] = set()
        for location, written, deployment in self._entries():
            name = written.strip()
            if not name or not deployment.strip():
                yield location, f"{written}={deployment!s} is not model=deployment; both need a name"
                continue
            if name in seen:
                yield location, f"the model {name!r} is listed twice"
                continue
            seen.add(name)
            yield from ((location, problem) for problem in self._add(name, deployment.strip()))
        for pair in self._broken_pairs():
            yield ("models",), f"{pair!r} is not model=deployment, as in gpt-4o=my-gpt-4o,gpt-4=my-gpt-4"
        if self.default is not None:
            target, problem = self._target(self.default.strip())
            self._default = target
            if problem:
                yield ("default",), problem
        if self.default is None and self.unmapped != "refuse" and services.resource is None and services.resources:
            yield (), "models without a mapping have no resource; set the team's `resource:`, or `unmapped: refuse`"
        self._listed = tuple(dict.fromkeys([*self._exact, *(name.strip() for name in self.list)]))
        for setting, names in (("allow", self.allow or ()), ("deny", self.deny)):
            for index, name in enumerate(names):
                try:
                    matcher((name,))
                except re.error as exc:
                    yield (setting, index), f"the regular expression {name[1:]!r} is invalid: {exc}"

    async def start(self, services: Services) -> None:
        self._open = self.allow is None and not self.deny
        self._allowed = None if self.allow is None else matcher(tuple(self.allow))
        # Another spelling may be the same deployment: Azure ignores the case, and dots may be left out. A client could
        # also request the deployment by its own name.
        self._denied = matcher(tuple(self.deny), loose=True)
        denied = [each for name, target in self._exact.items() if self._denied(name) for each in names_of(target)]
        for pattern, target, template in self._patterns:
            for name in self.deny:
                if (found := pattern.fullmatch(name)) is not None:
                    mapped = _with_deployment(target, found.expand(template))
                    denied += names_of(mapped) if mapped is not None else ()
        self._denied_deployments = {normalized(name) for name in denied}

    def _entries(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
        if isinstance(self.models, str):
            for pair in self.models.split(","):
                if pair.count("=") == 1:
                    name, _, deployment = pair.partition("=")
                    yield ("models",), name, deployment
        else:
            for name, deployment in self.models.items():
                yield ("models", name), name, deployment

    def _broken_pairs(self) -> Iterator[str]:
        if isinstance(self.models, str) and self.models.strip():
            pairs = self.models.split(",")
            if not pairs[-1].strip():
                pairs.pop()  # a comma at the end is allowed
            yield from (pair.strip() for pair in pairs if pair.count("=") != 1)

    def _add(self, name: str, deployment: str) -> Iterator[str]:
        pattern: str | None = None
        if name.startswith("~"):
            pattern = name[1:]
        elif any(sign in name for sign in "*?["):
            pattern = translate(name)
        if pattern is None:
            target, problem = self._target(deployment)
            if target is not None:
                self._exact[name] = target
            elif problem:
                yield problem
            return
        try:
            compiled = re.compile(pattern)
        except re.error as exc:
            yield f"the regular expression {pattern!r} is invalid: {exc}"
            return
        if deployment.startswith(POOL):
            target, problem = self._target(deployment)
            if target is not None:
                self._patterns.append((compiled, target, ""))
            elif problem:
                yield problem
            return
        # Only the configuration may choose the resource; groups are a client's text.
        resource, _, name_template = deployment.rpartition("/")
        target, problem = self._target(f"{resource}/x" if resource else "x")
        if target is None or not DEPLOYMENT.fullmatch(re.sub(r"\\(\d|g<\w+>)", "x", name_template)):
            yield (
                problem
                or f"{name_template!r} is not a valid deployment name: use at most 64 letters, digits, . _ and -"
            )
            return
        try:
            compiled.sub(name_template, "")  # checks its groups, even without a match
        except (re.error, IndexError) as exc:
            yield f"the deployment {deployment!r} uses a group that {name!r} does not have: {exc}"
            return
        self._patterns.append((compiled, target, name_template))

    def _target(self, text: str) -> tuple[Target | None, str | None]:
        """Return the target of `NAME`, `RESOURCE/NAME` or `pool:NAME`, or the mistake in it."""
        if text.startswith(POOL):
            pool = self._services.pools.get(text.removeprefix(POOL).strip())
            if pool is None:
                known = ", ".join(self._services.pools) or "none; pools are listed in gateway.yaml's `pools:`"
                return None, f"there is no pool {text.removeprefix(POOL).strip()!r}; there is {known}"
            return Target(pool=pool), None
        resource_name, slash, name = text.rpartition("/")
        resource = self._services.resources.get(resource_name) if slash else self._services.resource
        if slash and resource is None:
            known = ", ".join(self._services.resources) or "none"
            return None, f"there is no resource {resource_name!r} for {text!r}; there is {known}"
        if resource is None and len(self._services.resources) > 1:
            return None, f"{text!r} names no resource, and there are several; write RESOURCE/{name}, or set `resource:`"
        if not DEPLOYMENT.fullmatch(name):
            return None, f"{name!r} is not a valid deployment name: use at most 64 letters, digits, . _ and -"
        return Target(resource=resource, deployment=name), None

    async def __call__(self, request: Request, call_next: Next) -> Response:
        key_models = request.allowed_models
        find = self._target_of if self._open and key_models is None else lambda name: self._permitted(name, key_models)
        if request.operation == "models.list":
            usable = [name for name in self._listed if self._allows(name, key_models)]
            return Response.json({"object": "list", "data": [self._model(name) for name in usable]})
        if request.operation == "models.retrieve":
            name = await request.model() or ""
            if name not in self._listed or not self._allows(name, key_models):
                find(name)
            return Response.json(self._model(name))
        await request.map_models(find)
        return await call_next(request)

    def _allows(self, name: str, key_models: tuple[str, ...] | None) -> bool:
        """Whether the team, and the key if it has a list of models, may use a model."""
        if (self._allowed is not None and not self._allowed(name)) or self._denied(name):
            return False
        return key_models is None or bool(matcher(key_models)(name))

    def _permitted(self, name: str, key_models: tuple[str, ...] | None) -> Target:
        """Return the target of a model. Raises ApiError 404 if it is not allowed, or has no target."""
        found = self._target_of(name) if self._allows(name, key_models) else None
        if (
            found is not None
            and self.deny
            and name not in self._exact
            and any(self._denied(each) or normalized(each) in self._denied_deployments for each in names_of(found))
        ):
            found = None
        if found is None:
            # Like OpenAI's error for a model that a project has no access to.
            listed = ", ".join([each for each in self._listed if self._allows(each, key_models)][:MAX_LISTED])
            raise ApiError(
                404,
                f"the model {name!r} is not available to you; available models: {listed or 'ask the operator'}",
                param="model",
                code="model_not_found",
            )
        return found

    def _target_of(self, name: str) -> Target:
        """Return the target of a model. Raises ApiError 404 if it has none."""
        found = self._find(name)
        if found is None:
            raise self._not_mapped(name)
        return found

    def _find(self, name: str) -> Target | None:
        """Return the target of a model, or None if it has none."""
        if (target := self._exact.get(name)) is not None:
            return target
        for pattern, target, template in self._patterns:
            if (found := pattern.fullmatch(name)) is not None:
                return _with_deployment(target, found.expand(template))
        if self._default is not None:
            return self._default
        if self.unmapped == "refuse":
            return None
        return _with_deployment(self._team_target, self._default_name(name))

    def _default_name(self, name: str) -> str:
        return name.replace(".", "") if self.unmapped == "own_name_without_dots" else name

    def _not_mapped(self, name: str) -> ApiError:
        mapped = [*self._exact, *(written for _, written, _ in self._entries() if written.strip() not in self._exact)]
        listed = ", ".join(mapped[:MAX_LISTED]) + (", ..." if len(mapped) > MAX_LISTED else "")
        return ApiError(
            404,
            f"the model {name!r} is not mapped to a deployment; mapped models: {listed or 'none'}",
            param="model",
            code="model_not_found",
        )

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "azure-openai"}


@lru_cache(maxsize=1024)
def matcher(names: tuple[str, ...], *, loose: bool = False) -> Callable[[str], object]:
    """Return a function that matches models by names, globs or, after `~`, regular expressions. Raises re.error.

    `loose` is for denied models: it ignores the case, and dots except in expressions and in globs that have dots.
    """
    exact = {name for name in names if not name.startswith("~") and not any(sign in name for sign in "*?[")}
    patterns = [
        (re.compile(name[1:] if name[:1] == "~" else translate(name), re.IGNORECASE if loose else 0), "." in name)
        for name in names
        if name not in exact
    ]
    if loose:
        exact = {normalized(name) for name in exact}

    def match(model: str) -> bool:
        text = normalized(model) if loose else model
        return text in exact or any(
            pattern.fullmatch(model) or (not dotted and pattern.fullmatch(text)) for pattern, dotted in patterns
        )

    return match


def normalized(name: str) -> str:
    """Return a name in the form in which Azure compares names: lower case, without dots."""
    return name.lower().replace(".", "")


def names_of(target: Target) -> list[str]:
    """Return the names of the deployments that a target may use."""
    if target.pool is not None:
        return [each.name for each in target.pool.deployments]
    return [target.deployment] if target.deployment is not None else []


def _with_deployment(target: Target, name: str) -> Target | None:
    """Return a target with this deployment, or None if the name is invalid; a pool's target stays."""
    if target.pool is not None:
        return target
    return target.replace(deployment=name) if DEPLOYMENT.fullmatch(name) else None
