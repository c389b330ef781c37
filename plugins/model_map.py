r"""`model_map`: the model that a client asks for becomes a deployment of an Azure resource."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Literal

from gateway import ApiError, Meta, Next, Request, Response, Services, Stage, Target

DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Names = list[str]  # inside the class, `list` is a setting

POOL = "pool:"  # before a pool's name, where a deployment's could stand: no name has a colon
SHOWN = 20  # names in an error message


@dataclass
class ModelMap(Stage):
    r"""Map models to deployments, and answer `/v1/models` from the map.

    A name is exact (`gpt-4o`), a glob (`gpt-4o-*`) or, after `~`, a regular expression for the whole name
    (`~gpt-(.+)`), whose groups the deployment may use (`prod-\1`). Exact names win, then the others in the
    order of the file. A deployment is `NAME`, `RESOURCE/NAME` in a resource of its own, or `pool:NAME`, one of a
    pool's, which the stage `balance` picks.
    """

    models: Annotated[
        dict[str, str] | str,
        Meta(description="model: deployment, or pool:NAME; or as one text, model=deployment,model=deployment"),
    ] = field(default_factory=dict)
    unmapped: Annotated[
        Literal["own_name_without_dots", "own_name", "refuse"],
        Meta(
            description="what a model without a mapping is: the deployment of its own name, with the dots left out "
            "as Azure's older names have it (gpt-3.5-turbo: gpt-35-turbo) or as it is, or a 404"
        ),
    ] = "own_name_without_dots"
    default: Annotated[
        str | None, Meta(description="the deployment of every model without a mapping, before `unmapped` is asked")
    ] = None
    allow: Annotated[
        Names | None,
        Meta(description="the only models that the team may use, as names, globs or expressions; all if left out"),
    ] = None
    deny: Annotated[Names, Meta(description="models that it may not use, also of those in `allow`")] = field(
        default_factory=list
    )
    list: Annotated[
        Names, Meta(description="names that /v1/models shows besides the exact ones, for globs and expressions")
    ] = field(default_factory=list)

    @property
    def provides(self) -> tuple[str, ...]:
        return ("deployment", "pool") if any(target.pool is not None for target in self.targets) else ("deployment",)

    @property
    def targets(self) -> Iterator[Target]:
        # (Of a name with groups the deployment is not known before a client has asked.)
        patterns = [target.replace(deployment=None) for _, target, _ in self._patterns]
        yield from (target for target in (*self._exact.values(), *patterns, self._default) if target is not None)

    def __post_init__(self) -> None:
        self._exact: dict[str, Target] = {}
        self._patterns: list[tuple[re.Pattern[str], Target, str]] = []
        self._default: Target | None = None
        self._services = Services(team="", stage="")
        self._own = Target()
        self._listed: tuple[str, ...] = ()
        self._allowed: Callable[[str], object] | None = None
        self._denied: Callable[[str], object] = one_of((), loose=True)
        self._denied_deployments: set[str] = set()
        self._open = True

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Read the map; what is wrong in it is found here, with its place."""
        self._services = services
        self._own = Target(resource=services.resource)
        seen: set[str] = set()
        for place, written, deployment in self._written():
            name = written.strip()
            if not name or not deployment.strip():
                yield place, f"{written}={deployment!s} is not model=deployment; both need a name"
                continue
            if name in seen:
                yield place, f"the model {name!r} stands here twice"
                continue
            seen.add(name)
            yield from ((place, problem) for problem in self._add(name, deployment.strip()))
        for pair in self._broken_pairs():
            yield ("models",), f"{pair!r} is not model=deployment, as in gpt-4o=my-gpt-4o,gpt-4=my-gpt-4"
        if self.default is not None:
            target, problem = self._target(self.default.strip())
            self._default = target
            if problem:
                yield ("default",), problem
        if self.default is None and self.unmapped != "refuse" and services.resource is None and services.resources:
            yield (), "a model without a mapping has no resource; set the team's `resource:`, or `unmapped: refuse`"
        self._listed = tuple(dict.fromkeys([*self._exact, *(name.strip() for name in self.list)]))
        for setting, names in (("allow", self.allow or ()), ("deny", self.deny)):
            for position, name in enumerate(names):
                try:
                    one_of((name,))
                except re.error as exc:
                    yield (setting, position), f"the expression {name[1:]!r} is wrong: {exc}"

    async def start(self, services: Services) -> None:
        self._open = self.allow is None and not self.deny
        self._allowed = None if self.allow is None else one_of(tuple(self.allow))
        # By another spelling a model could still be the same deployment: Azure ignores the case, and dots may be left
        # out. And a deployment has a name of its own, by which it could be asked for.
        self._denied = one_of(tuple(self.deny), loose=True)
        denied = [each for name, target in self._exact.items() if self._denied(name) for each in names_of(target)]
        for pattern, target, template in self._patterns:
            for name in self.deny:
                if (found := pattern.fullmatch(name)) is not None:
                    made = _named(target, found.expand(template))
                    denied += names_of(made) if made is not None else ()
        self._denied_deployments = {plain(name) for name in denied}

    def _written(self) -> Iterator[tuple[tuple[str, ...], str, str]]:
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
                pairs.pop()  # a comma at the end does no harm
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
            yield f"the expression {pattern!r} is wrong: {exc}"
            return
        if deployment.startswith(POOL):
            target, problem = self._target(deployment)
            if target is not None:
                self._patterns.append((compiled, target, ""))
            elif problem:
                yield problem
            return
        # Only what the configuration says may choose the resource; the groups are a client's text.
        resource, _, name_template = deployment.rpartition("/")
        target, problem = self._target(f"{resource}/x" if resource else "x")
        if target is None or not DEPLOYMENT.fullmatch(re.sub(r"\\(\d|g<\w+>)", "x", name_template)):
            yield problem or f"{name_template!r} cannot be a deployment's name: letters, digits, . _ and -, at most 64"
            return
        try:
            compiled.sub(name_template, "")  # reads the groups it names, also where nothing matches
        except (re.error, IndexError) as exc:
            yield f"the deployment {deployment!r} uses a group that {name!r} does not have: {exc}"
            return
        self._patterns.append((compiled, target, name_template))

    def _target(self, text: str) -> tuple[Target | None, str | None]:
        """Return the target of `NAME`, `RESOURCE/NAME` or `pool:NAME`, or what is wrong with it."""
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
            return None, f"{text!r} names no resource and there are several; write RESOURCE/{name}, or `resource:`"
        if not DEPLOYMENT.fullmatch(name):
            return None, f"{name!r} cannot be a deployment's name: letters, digits, . _ and -, at most 64"
        return Target(resource=resource, deployment=name), None

    async def __call__(self, request: Request, call_next: Next) -> Response:
        of_key = request.allowed_models
        find = self._found if self._open and of_key is None else lambda name: self._permitted(name, of_key)
        if request.operation == "models.list":
            shown = [name for name in self._listed if self._may(name, of_key)]
            return Response.json({"object": "list", "data": [self._model(name) for name in shown]})
        if request.operation == "models.retrieve":
            name = await request.model() or ""
            if name not in self._listed or not self._may(name, of_key):
                find(name)
            return Response.json(self._model(name))
        await request.map_models(find)
        return await call_next(request)

    def _may(self, name: str, of_key: tuple[str, ...] | None) -> bool:
        """Whether the team may use a model, and the key, which may have a list of its own."""
        if (self._allowed is not None and not self._allowed(name)) or self._denied(name):
            return False
        return of_key is None or bool(one_of(of_key)(name))

    def _permitted(self, name: str, of_key: tuple[str, ...] | None) -> Target:
        """Return the target of a model. Raises ApiError 404 where it may not be used, or has none."""
        found = self._found(name) if self._may(name, of_key) else None
        if (
            found is not None
            and self.deny
            and name not in self._exact
            and any(self._denied(each) or plain(each) in self._denied_deployments for each in names_of(found))
        ):
            found = None
        if found is None:
            # As OpenAI answers for a model that a project has no access to.
            shown = ", ".join([each for each in self._listed if self._may(each, of_key)][:SHOWN])
            raise ApiError(
                404,
                f"the model {name!r} is not one that you may use here; you may use: {shown or 'ask the operator'}",
                param="model",
                code="model_not_found",
            )
        return found

    def _found(self, name: str) -> Target:
        """Return the target of a model. Raises ApiError 404 where it has none."""
        found = self._find(name)
        if found is None:
            raise self._refusal(name)
        return found

    def _find(self, name: str) -> Target | None:
        """Return the target of a model, or None where it is refused."""
        if (target := self._exact.get(name)) is not None:
            return target
        for pattern, target, template in self._patterns:
            if (found := pattern.fullmatch(name)) is not None:
                return _named(target, found.expand(template))
        if self._default is not None:
            return self._default
        if self.unmapped == "refuse":
            return None
        return _named(self._own, self._own_name(name))

    def _own_name(self, name: str) -> str:
        return name.replace(".", "") if self.unmapped == "own_name_without_dots" else name

    def _refusal(self, name: str) -> ApiError:
        mapped = [*self._exact, *(written for _, written, _ in self._written() if written.strip() not in self._exact)]
        shown = ", ".join(mapped[:SHOWN]) + (", ..." if len(mapped) > SHOWN else "")
        return ApiError(
            404,
            f"the model {name!r} is not mapped to a deployment; mapped are: {shown or 'none'}",
            param="model",
            code="model_not_found",
        )

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "azure-openai"}


@lru_cache(maxsize=1024)
def one_of(names: tuple[str, ...], *, loose: bool = False) -> Callable[[str], object]:
    """Return what tells whether a model is one of some names, globs, or, after `~`, expressions. Raises re.error.

    `loose` is for what is denied: the case does not count then, nor do dots, but in expressions and in globs that have
    some themselves.
    """
    exact = {name for name in names if not name.startswith("~") and not any(sign in name for sign in "*?[")}
    patterns = [
        (re.compile(name[1:] if name[:1] == "~" else translate(name), re.IGNORECASE if loose else 0), "." in name)
        for name in names
        if name not in exact
    ]
    if loose:
        exact = {plain(name) for name in exact}

    def among(model: str) -> bool:
        text = plain(model) if loose else model
        return text in exact or any(
            pattern.fullmatch(model) or (not dotted and pattern.fullmatch(text)) for pattern, dotted in patterns
        )

    return among


def plain(name: str) -> str:
    """Return a name as Azure takes it for the same as others: in lower case, and without dots."""
    return name.lower().replace(".", "")


def names_of(target: Target) -> list[str]:
    """Return the names of the deployments that a target may be."""
    if target.pool is not None:
        return [each.name for each in target.pool.deployments]
    return [target.deployment] if target.deployment is not None else []


def _named(target: Target, name: str) -> Target | None:
    """Return a target with this deployment, or None where that is no deployment's name; a pool has its own."""
    if target.pool is not None:
        return target
    return target.replace(deployment=name) if DEPLOYMENT.fullmatch(name) else None
