"""Map the models of a request that names several: the graders of an evaluation, and the image tool.

Batch files are in `batch_files.py`, and the messages of a WebSocket in `message_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway.azure.batch_files import batch_models, map_batch
from gateway.azure.model_field import model_name
from gateway.azure.resources import common_resource
from gateway.errors import ApiError

if TYPE_CHECKING:
    from gateway.azure.request_view import RequestView
    from gateway.azure.resources import Target

__all__ = ("map_image_deployment", "map_several", "several_models")


async def map_several(request: RequestView, find: Callable[[str], Target]) -> None:
    """Replace each model in a body that names several by its deployment; see `Request.map_models`."""
    if request._operation is not None and request._operation.model == "lines":
        await map_batch(request, lambda name: find(model_name(name).strip()))
        return
    body = await request.json()
    _, found = _mapped_graders(body, find)
    if not found:
        request.set_json(body)  # each key once: of two equal keys, Azure could read the unchecked one
        return
    resource = common_resource(found.values())
    if resource is None and (len(found) > 1 or any(target.pool is not None for target in found.values())):
        raise ApiError(400, f"the models of one evaluation must be in one Azure resource: {', '.join(found)}")
    if resource is not None:
        found = {name: target.within(resource) or target for name, target in found.items()}
    changed, _ = _mapped_graders(body, found.__getitem__)
    request.notes["model"] = ", ".join(found)
    request.target = request.target.routed_to(next(iter(found.values())))
    request.set_json(changed)


async def several_models(request: RequestView) -> tuple[str, ...]:
    """Return the models of a body that names several; see `Request.models`."""
    if request._operation is not None and request._operation.model == "lines":
        return await batch_models(request)
    _, found = _mapped_graders(await request.json(), lambda name: request.target.replace(deployment=name))
    return tuple(found)


def _mapped_graders(body: dict[str, Any], find: Callable[[str], Target]) -> tuple[dict[str, Any], dict[str, Target]]:
    """Return an evaluation with the models of its graders and its data source mapped, and the target of each model."""
    found: dict[str, Target] = {}

    def mapped(grader: object) -> object:
        """Map the model of a grader, and those of nested graders, in a list or a mapping."""
        if isinstance(grader, list):
            return [mapped(each) for each in grader]
        if not isinstance(grader, dict):
            return grader
        if not isinstance(grader.get("type"), str):
            return {name: mapped(each) for name, each in grader.items()}
        return with_model({**grader, "graders": mapped(grader["graders"])} if "graders" in grader else grader)

    def with_model(named: dict[str, Any]) -> dict[str, Any]:
        if named.get("model") is None:
            return named
        name = model_name(named["model"]).strip()
        found[name] = target = find(name)
        return {**named, "model": target.deployment}

    changed = {**body}
    try:
        if isinstance(body.get("data_source"), dict):
            changed["data_source"] = with_model(body["data_source"])
        if isinstance(body.get("testing_criteria"), list):
            changed["testing_criteria"] = [mapped(each) for each in body["testing_criteria"]]
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    return changed, found


_IMAGES = "x-ms-oai-image-generation-deployment"


def map_image_deployment(request: RequestView, find: Callable[[str], Target]) -> None:
    """Map the model of the image tool, which Azure's Responses API reads from the header `_IMAGES`."""
    name = request.headers.get(_IMAGES)
    if name is None:
        return
    found, target = find(model_name(name).strip()), request.target
    if target.deployment is not None or target.pool is not None:
        resource = common_resource((target, found))
        if resource is None:
            raise ApiError(400, f"the models in the body and in {_IMAGES} must be in one Azure resource")
        request.target, found = target.within(resource) or target, found.within(resource) or found
    elif found.pool is not None:
        found = found.pinned(target.resource)
    request.headers.set(_IMAGES, found.deployment or "")
