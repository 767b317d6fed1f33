"""The sampling of a request: what the caller gave, then the checkpoint, then OpenAI's defaults.

generation_config.json overrules the defaults, as in vLLM (its ``--generation-config auto``):
temperature, top_p, top_k, min_p, repetition_penalty, and max_new_tokens as the most that an
answer may have. An explicit ``do_sample: false`` without a temperature means greedy, as in
Hugging Face's ``generate``; vLLM passes over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from triptych.chat.request import ChatRequest
from triptych.chat.structure import structural_tag
from triptych.chat.template import read_json
from triptych.contract import Sampling
from triptych.errors import ConfigurationError


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What a checkpoint's generation_config.json says of sampling; None is what it does not."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_new_tokens: Annotated[int, msgspec.Meta(gt=0)] | None = None
    do_sample: bool | None = None

    @classmethod
    def read(cls, checkpoint: str | Path) -> GenerationDefaults:
        """The defaults of a checkpoint; none where it has no generation_config.json.

        Raises:
            ConfigurationError: A value is of the wrong type or out of its range.
        """
        file = Path(checkpoint) / "generation_config.json"
        try:
            return msgspec.convert(read_json(file), cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{file}: {error}") from None


def sampling(request: ChatRequest, defaults: GenerationDefaults, max_tokens: int) -> Sampling:
    """How to draw the answer's tokens, at most ``max_tokens``."""
    greedy = defaults.do_sample is False
    tag = structural_tag(
        request.tools,
        request.tool_choice,
        parallel=request.parallel_tool_calls,
        response_format=request.response_format,
    )
    schema = ""
    if request.response_format is not None and not tag:
        schema = msgspec.json.encode(request.response_format.schema).decode()
    return Sampling(
        max_tokens=max_tokens,
        temperature=_first(request.temperature, defaults.temperature, 0.0 if greedy else 1.0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=max(0, int(_first(request.top_k, defaults.top_k, 0))),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=_first(request.presence_penalty, None, 0.0),
        frequency_penalty=_first(request.frequency_penalty, None, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=request.seed,
        stop=request.stop,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        json_schema=schema,
        structural_tag=tag,
        priority=request.priority or 0,
    )


def _first(given: float | None, default: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return otherwise if default is None else default
