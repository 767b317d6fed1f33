"""A request's JSON schema or structural tag as vLLM takes it, refused here where it cannot be held.

vLLM would choose among its libraries by the request, and its engine keeps the first that it was
given: after a schema that only the second library takes, no structural tag would work any more.
So there is one, XGrammar (`vllm_arguments`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from triptych.contract import Sampling
from triptych.errors import InvalidValue

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

BACKEND = "xgrammar"
SHOWN = 300
"""Characters of XGrammar's words that an error repeats."""
MAX_SPACES = 24
"""White space between two parts of JSON, in characters: enough to indent, and an end for a model
that would go on for ever."""

_PLACE_IN_SOURCE = re.compile(r"^\[[\d:]+\] \S+?:\d+: ")


def structured_outputs(sampling: Sampling) -> StructuredOutputsParams | None:
    """What the answer is held to; None: nothing.

    Raises:
        InvalidValue: A schema is broken, or asks for what XGrammar passes over.
    """
    place = where(sampling)
    if not place:
        return None
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output import backend_xgrammar as xgrammar

    tag = msgspec.json.decode(sampling.structural_tag or _tag(sampling.json_schema))
    for part in _json(tag):
        part["max_whitespace_cnt"] = MAX_SPACES
        if xgrammar.has_xgrammar_unsupported_json_features(part["json_schema"]):
            raise InvalidValue(
                "a schema has keywords that the engine cannot hold an answer to", where=place
            )
    wanted = StructuredOutputsParams(structural_tag=msgspec.json.encode(tag).decode())
    try:
        xgrammar.validate_xgrammar_grammar(SamplingParams(structured_outputs=wanted))
    except VLLMValidationError as error:
        said = _PLACE_IN_SOURCE.sub("", str(error.__cause__ or error).strip())
        raise InvalidValue(
            f"the engine cannot hold an answer to it: {said[:SHOWN]}", where=place
        ) from None
    return wanted


def where(sampling: Sampling) -> str:
    """The field of the request that asks for it; empty: none does."""
    if sampling.json_schema:
        return "response_format.json_schema.schema"
    return "tools" if sampling.structural_tag else ""


def _tag(schema: str) -> bytes:
    wanted = {"type": "json_schema", "json_schema": msgspec.Raw(schema.encode())}
    return msgspec.json.encode({"type": "structural_tag", "format": wanted})


def _json(part: Any) -> Iterator[dict[str, Any]]:
    """The parts of a structural tag that are JSON."""
    if not isinstance(part, dict):
        return
    if part.get("type") == "json_schema":
        yield part
    inner = (part.get("format"), part.get("content"))
    for each in (*inner, *part.get("tags", ()), *part.get("elements", ())):
        yield from _json(each)
