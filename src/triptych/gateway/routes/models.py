"""``GET /v1/models``: every name that goes into ``model``."""

from __future__ import annotations

from fastapi import APIRouter, Response

from triptych.gateway import document, schema
from triptych.gateway.backend import Served
from triptych.gateway.state import Shared, State, json_response

router = APIRouter(tags=["models"])


@router.get(
    "/models",
    response_class=Response,
    responses=document.answers(schema.ModelList, 401, 500, 503, 504),
)
async def list_models(state: Shared) -> Response:
    """Every name that goes into ``model``: the ensembles that are loaded, and their aliases."""
    found = [_model(served, state) for served in await state.backend.served()]
    return json_response(schema.ModelList(data=found))


@router.get(
    "/models/{model:path}",
    response_class=Response,
    responses=document.answers(schema.Model, 401, 404, 500, 503, 504),
)
async def retrieve_model(model: str, state: Shared) -> Response:
    """One of them."""
    return json_response(_model(Served(model, await state.backend.resolve(model)), state))


def _model(served: Served, state: State) -> schema.Model:
    return schema.Model(id=served.name, root=served.ensemble, created=state.started)
