"""`api_version`: the version of Azure's API for each request."""

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

    A resource's own `api_version` replaces `version`. A client's `?api-version=` is never passed on.
    """

    version: Annotated[
        str,
        Meta(
            pattern=VERSION,
            examples=["2024-10-21, 2025-04-01-preview or v1"],
            description="the default api-version",
        ),
    ] = "2024-10-21"
    models: Annotated[
        dict[str, Version], Meta(description="api-versions of single models, by the client's name of the model")
    ] = field(default_factory=dict)
    operations: Annotated[
        dict[str, Version],
        Meta(description="api-versions of single operations (images.edits) or groups of them (responses.*)"),
    ] = field(default_factory=dict)

    otherwise: Annotated[
        list[Version],
        Meta(description="fallbacks for an operation that the version lacks: the first one that has it is used"),
    ] = field(default_factory=list)

    provides = ("api_version",)

    def __post_init__(self) -> None:
        self._of_operation: dict[str, str | None] = {}
        self._chosen: dict[tuple[str | None, str], str] = {}

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        for name in self.models:
            if name != name.strip() or not re.search(r"\S", name):
                yield ("models", name), f"{name!r} is not a model name: it is empty or has spaces around it"
        for name in self.operations:
            prefix = name.removesuffix("*") if name.endswith(".*") else ""
            if name not in services.operations and not (
                prefix and any(each.startswith(prefix) or each == prefix[:-1] for each in services.operations)
            ):
                yield (
                    ("operations", name),
                    f"{name!r} is not an operation, such as files.list, or a group, such as files.*",
                )

    async def __call__(self, request: Request, call_next: Next) -> Response:
        version = self.version
        resource = request.target.resource
        if resource is not None and resource.api_version is not None:
            version = resource.api_version
        if self.operations and (own := self._version_of(request.operation or "")) is not None:
            version = own
        else:
            if self.models and (model := await request.model()) is not None:
                version = self.models.get(model.strip(), version)
            if self.otherwise:
                version = self._with_fallback(request, version)
        request.target = request.target.replace(api_version=version)
        return await call_next(request)

    def _with_fallback(self, request: Request, version: str) -> str:
        """Return the version if it has the operation, else the first fallback that has it."""
        key = (request.operation, version)
        found = self._chosen.get(key)
        if found is None:
            usable = [each for each in (version, *self.otherwise) if request.supported_in(each)]
            found = self._chosen[key] = usable[0] if usable else version
        return found

    def _version_of(self, operation: str) -> str | None:
        """Return an operation's own version: that of its name, else that of its most specific group."""
        if operation not in self._of_operation:
            parts = operation.split(".")
            names = [operation, *(".".join([*parts[:size], "*"]) for size in range(len(parts), 0, -1))]
            self._of_operation[operation] = next(
                (self.operations[name] for name in names if name in self.operations), None
            )
        return self._of_operation[operation]
