"""`api_version`: which of Azure's APIs requests go to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from gateway import Meta, Next, Request, Response, Services, Stage

VERSION = r"^([0-9]{4}-[0-9]{2}-[0-9]{2}(-preview)?|v1)$"
Version = Annotated[str, Meta(pattern=VERSION, examples=["2024-10-21, 2025-04-01-preview or v1"])]


@dataclass
class ApiVersion(Stage):
    """Choose Azure's api-version: a dated one for the classic API, or `v1` for `/openai/v1`.

    A client's own `?api-version=` is never passed on.
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

    provides = ("api_version",)

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        for name in self.models:
            if name != name.strip() or not re.search(r"\S", name):
                yield ("models", name), f"the model's name {name!r} has spaces around it, or is none"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        version = self.version
        if self.models and request.has_model:
            version = self.models.get((await request.model()).strip(), version)
        request.target = request.target.replace(api_version=version)
        return await call_next(request)
