"""`auth_passthrough`: the client's own key goes to Azure."""

from dataclasses import dataclass

from gateway import ApiError, Next, Request, Response, Stage


@dataclass
class AuthPassthrough(Stage):
    """Pass the client's key on to Azure, in Azure's format.

    `Authorization: Bearer K` and `api-key: K` both reach Azure as `api-key: K`; an Entra token (a JSON Web Token)
    stays `Authorization: Bearer`. A request without a key is a 401. The gateway does not check the key: Azure rejects
    a wrong one.
    """

    provides = ("caller", "credential")

    async def __call__(self, request: Request, call_next: Next) -> Response:
        key = request.key()
        if key is None:
            raise ApiError.invalid_key(
                "no API key in the request; send your Azure OpenAI key as `Authorization: Bearer YOUR_KEY` "
                "(the api_key of an OpenAI client)"
            )
        request.caller = key.digest
        request.target = request.target.replace(credential=key)
        return await call_next(request)
