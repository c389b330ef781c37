"""`hide_azure_headers`: responses do not show which region or deployment they come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Annotated

from gateway import Headers, Meta, Next, Request, Response, Services, Stage

TOPOLOGY = (
    "x-ms-*", "azureml-*", "azure-*", "apim-*", "ocp-*", "x-azure-*", "x-envoy-*", "x-aml-*", "openai-azure-*",
    "skip-error-remapping", "x-ratelimit-abusepenalty-active", "cmp-upstream-response-duration", "server", "via",
    "request-context", "x-powered-by", "x-aspnet-version",
)  # fmt: skip


@dataclass
class HideAzureHeaders(Stage):
    """Remove the response headers that show Azure's region, deployment or machines.

    Such as `x-ms-region`, `x-ms-deployment-name`, `azureml-model-session` and `apim-request-id`. Headers that clients
    use (`x-request-id`, `retry-after`, `x-ratelimit-*`) stay.
    """

    names: Annotated[
        list[str], Meta(description="header names, case-insensitive; `*` matches any characters: x-ms-*")
    ] = field(default_factory=lambda: list(TOPOLOGY))

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for index, name in enumerate(self.names):
            if not Headers.is_name(name):
                yield ("names", index), f"{name!r} is not a valid header name"

    async def start(self, services: Services) -> None:
        self.idle = not self.names
        self._hidden = re.compile("|".join(translate(name.lower()) for name in self.names)).match

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        hidden = {name for name, _ in response.headers if self._hidden(name.lower())}
        for name in hidden:
            response.headers.remove(name)
        if hidden:
            request.count(self.id)
        return response
