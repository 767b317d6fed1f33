"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from triptych.chat.chunks import Chunk
from triptych.gateway import answers, asked, body, document, prompts, schema, schema_requests
from triptych.gateway.answering import Answering
from triptych.gateway.choices import Pieces
from triptych.gateway.observe import record_of
from triptych.gateway.state import Shared, State

REFUSED = (400, 401, 404, 408, 413, 415, 429, 499, 500, 503, 504)
OF_MEDIA = (403, 422)
"""Statuses that only a medium brings."""

router = APIRouter()


@router.post(
    "/chat/completions",
    tags=["chat"],
    response_class=Response,
    responses=document.answers(schema.ChatCompletion, *REFUSED, *OF_MEDIA, stream=Chunk),
    openapi_extra=document.body(schema_requests.ChatCompletionRequest),
)
async def create_chat_completion(request: Request, state: Shared) -> Response:
    """Answer a conversation."""
    wanted = asked.read(await body.read(request, state.options))
    pieces = await _ask(wanted, request, state)
    form = answers.ChatForm(wanted)
    return Answering(wanted, form, pieces, record_of(request), state.closing)


@router.post(
    "/completions",
    tags=["completions"],
    response_class=Response,
    responses=document.answers(schema.Completion, *REFUSED, stream=schema.Completion),
    openapi_extra=document.body(schema_requests.CompletionRequest),
)
async def create_completion(request: Request, state: Shared) -> Response:
    """Go on with prompts of text as they are, without the model's chat template."""
    wanted = prompts.read(await body.read(request, state.options))
    pieces = await _ask(wanted, request, state)
    if len(wanted.prompts) > 1:
        pieces = [prompts.placed(each, index // wanted.n) for index, each in enumerate(pieces)]
    form = answers.TextForm(wanted)
    return Answering(wanted, form, pieces, record_of(request), state.closing)


async def _ask(wanted: asked.Asked, request: Request, state: State) -> list[Pieces]:
    """The answers, each of which begins when it is read."""
    record = record_of(request)
    ensemble = record.model = await state.backend.resolve(wanted.model)
    timeout = state.options.request_timeout_s
    return [
        state.backend.chat(ensemble, each, record.request_id, timeout, record.traceparent)
        for each in wanted.bodies
    ]
