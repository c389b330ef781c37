"""`hide_azure_headers`: answers do not show where in Azure they come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Annotated

from gateway import Meta, Next, Request, Response, Services, Stage

TOPOLOGY = (
    "x-ms-*", "azureml-*", "azure-*", "apim-*", "ocp-*", "x-azure-*", "x-envoy-*", "x-aml-*", "openai-azure-*",
    "skip-error-remapping", "x-ratelimit-abusepenalty-active", "cmp-upstream-response-duration", "server", "via",
    "request-context", "x-powered-by", "x-aspnet-version",
)  # fmt: skip
NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass
class HideAzureHeaders(Stage):
    """Take the headers out of answers that tell the region, the deployment or the machines behind them.

    Such as `x-ms-region`, `x-ms-deployment-name`, `azureml-model-session` and `apim-request-id`. What clients go
    by (`x-request-id`, `retry-after`, `x-ratelimit-*`) stays.
    """

    names: Annotated[list[str], Meta(description="the names, in any case; `*` stands for any characters: x-ms-*")] = (
        field(default_factory=lambda: list(TOPOLOGY))
    )

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for place, name in enumerate(self.names):
            if not NAME.fullmatch(name):
                yield ("names", place), f"{name!r} is no header's name"

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
