"""`api_version`: which of Azure's APIs requests go to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from gateway import Meta, Next, Request, Response, Services, Stage

VERSION = r"^(20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])(-preview)?|v1)$"
Version = Annotated[str, Meta(pattern=VERSION, examples=["2024-10-21, 2025-04-01-preview or v1"])]


@dataclass
class ApiVersion(Stage):
    """Choose Azure's api-version: a dated one for the classic API, or `v1` for `/openai/v1`.

    A resource's own `api_version` takes the place of `version`. A client's own `?api-version=` is never passed on.
    """

    version: Annotated[
        str,
        Meta(
            pattern=VERSION,
            examples=["2024-10-21, 2025-04-01-preview or v1"],
            description="the api-version of every model that `models` does not name",
        ),
    ] = "2024-10-21"
    models: Annotated[
        dict[str, Version], Meta(description="another version for single models, by the name that clients use")
    ] = field(default_factory=dict)
    operations: Annotated[
        dict[str, Version],
        Meta(description="another version for single operations (images.edits), or all of a kind (responses.*)"),
    ] = field(default_factory=dict)

    otherwise: Annotated[
        list[Version],
        Meta(description="for an operation that the version does not have: the first of these that has it"),
    ] = field(default_factory=list)

    provides = ("api_version",)

    def __post_init__(self) -> None:
        self._of_operation: dict[str, str | None] = {}
        self._chosen: dict[tuple[str | None, str], str] = {}

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        for name in self.models:
            if name != name.strip() or not re.search(r"\S", name):
                yield ("models", name), f"the model's name {name!r} has spaces around it, or is none"
        for name in self.operations:
            kind = name.removesuffix("*") if name.endswith(".*") else ""
            if name not in services.operations and not (
                kind and any(each.startswith(kind) or each == kind[:-1] for each in services.operations)
            ):
                yield ("operations", name), f"{name!r} is no operation, such as files.list, nor a kind, such as files.*"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        version = self.version
        resource = request.target.resource
        if resource is not None and resource.api_version is not None:
            version = resource.api_version
        if self.operations and (of_operation := self._version_of(request.operation or "")) is not None:
            version = of_operation
        else:
            if self.models and (model := await request.model()) is not None:
                version = self.models.get(model.strip(), version)
            if self.otherwise:
                version = self._with(request, version)
        request.target = request.target.replace(api_version=version)
        return await call_next(request)

    def _with(self, request: Request, version: str) -> str:
        """Return the version, or the first other one that has the operation where this one does not."""
        place = (request.operation, version)
        found = self._chosen.get(place)
        if found is None:
            there = [each for each in (version, *self.otherwise) if request.supported_in(each)]
            found = self._chosen[place] = there[0] if there else version
        return found

    def _version_of(self, operation: str) -> str | None:
        """Return an operation's own version: what is given for its name, else for the longest kind it is of."""
        if operation not in self._of_operation:
            kinds = operation.split(".")
            names = [operation, *(".".join([*kinds[:size], "*"]) for size in range(len(kinds), 0, -1))]
            self._of_operation[operation] = next(
                (self.operations[name] for name in names if name in self.operations), None
            )
        return self._of_operation[operation]
