"""`auth_passthrough`: the client's own key is the one Azure sees."""

from dataclasses import dataclass

from gateway import ApiError, Next, Request, Response, Stage


@dataclass
class AuthPassthrough(Stage):
    """Pass the client's key on to Azure, as Azure wants it.

    `Authorization: Bearer K` and `api-key: K` both reach Azure as `api-key: K`; an Entra token (a JSON Web
    Token) stays `Authorization: Bearer`. No key is a 401. The key is only passed on, never checked here:
    Azure refuses a wrong one.
    """

    provides = ("caller", "credential")

    async def __call__(self, request: Request, call_next: Next) -> Response:
        key = request.key()
        if key is None:
            raise ApiError(
                401,
                "no key was presented; send your Azure OpenAI key as `Authorization: Bearer YOUR_KEY` "
                "(the api_key of an OpenAI client)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        request.caller = key.digest
        request.target = request.target.replace(credential=key)
        return await call_next(request)
