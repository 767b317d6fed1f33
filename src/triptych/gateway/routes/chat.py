"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from triptych.gateway import asked, body, document, schema
from triptych.gateway.chat import ChatResponse
from triptych.gateway.faults import ModelNotFound
from triptych.gateway.observe import record_of
from triptych.gateway.state import Shared

UPSTREAM = (408, 429, 499, 500, 503, 504)
"""Statuses that are Triton's to give."""

router = APIRouter()


@router.post(
    "/chat/completions",
    tags=["chat"],
    response_class=Response,
    responses=document.answers(
        schema.ChatCompletion, 400, 401, 403, 404, 413, 415, *UPSTREAM, stream=True
    ),
    openapi_extra=document.body(schema.ChatCompletionRequest),
)
async def create_chat_completion(request: Request, state: Shared) -> Response:
    """Answer a conversation."""
    wanted = asked.read(await body.read(request, state.options))
    record = record_of(request)
    ensemble = record.model = await state.backend.resolve(wanted.model)
    timeout = state.options.request_timeout_s
    pieces = [
        state.backend.chat(ensemble, each, record.request_id, timeout) for each in wanted.bodies
    ]
    return ChatResponse(wanted, pieces, record, state.closing)


@router.post("/completions", include_in_schema=False)
async def create_completion() -> Response:
    """Say where to go: the models know conversations only."""
    raise ModelNotFound("the models here chat: use /v1/chat/completions, not /v1/completions")
