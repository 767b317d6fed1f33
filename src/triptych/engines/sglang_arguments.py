"""SGLang's arguments, made from the stage's settings and the user's own, in SGLang's process."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec

from triptych.engines.arguments import read_arguments
from triptych.errors import ConfigurationError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from triptych.families.base import Family
    from triptych.settings import DecodeSettings

MARGIN = 8
"""Tokens by which SGLang's context is longer than ours: it keeps the last seven for itself. An
answer is cut to ours, so that no position beyond it is ever computed."""
LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
"""Environment variable by which SGLang takes a context that is longer than the checkpoint's."""
_OURS: Mapping[str, object] = {
    "incremental_streaming_output": True,
    "skip_tokenizer_init": False,
    "enable_deterministic_inference": False,
    "enable_priority_scheduling": True,
    "schedule_low_priority_values_first": True,
    "tokenizer_worker_num": 1,
    "nnodes": 1,
}
"""Arguments that this engine rests on. Deterministic inference ends SGLang at the first request
with ``min_p``."""
_GIB = 1 << 30


def build_arguments(
    settings: DecodeSettings, family: Family, *, on_cpu: bool
) -> tuple[ServerArgs, int]:
    """SGLang's arguments, and the context they give, in tokens.

    Raises:
        ConfigurationError: An argument is unknown, not served, or SGLang refuses them.
    """
    from sglang.srt.server_args import ServerArgs

    given = read_arguments(settings.engine_args)
    try:
        check_arguments(given, {field.name for field in dataclasses.fields(ServerArgs)})
        check_types(given, get_type_hints(ServerArgs))
    except ConfigurationError as error:
        raise error.at(settings.engine_args) from None
    context = find_context(settings, family, given)
    arguments = {
        **_defaults(settings, family),
        **(_on_cpu(settings, family, context) if on_cpu else {}),
        **given,
        **_OURS,
        "context_length": context + MARGIN,
    }
    os.environ[LONGER_CONTEXT] = "1"
    try:
        return ServerArgs(**arguments), context
    except Exception as error:
        raise ConfigurationError(f"SGLang refuses its configuration: {error}") from error


def check_arguments(given: Mapping[str, Any], known: set[str]) -> None:
    """Whether the user's arguments are SGLang's, and leave alone what this engine rests on.

    Raises:
        ConfigurationError: At the first that is not, or does not.
    """
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(f"SGLang has no engine argument {name!r}{hint}")
        if value != _OURS.get(name, value):
            raise ConfigurationError(f"{name} must be {_OURS[name]!r}, got {value!r}")


def check_types(given: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Whether the user's arguments are of their types: SGLang finds out late, or never.

    Raises:
        ConfigurationError: At the first that is not.
    """
    for name, value in given.items():
        try:
            msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            raise ConfigurationError(
                f"SGLang refuses its configuration: {name} is {value!r}: {error}"
            ) from None
        except TypeError:
            continue  # a type that JSON has nothing for


def find_context(settings: DecodeSettings, family: Family, given: Mapping[str, Any]) -> int:
    """Tokens of prompt and answer together.

    Raises:
        ConfigurationError: More than the checkpoint was made for, and nobody has said that it may.
    """
    context = given.get("context_length") or settings.max_model_len or family.context_length
    if context > family.context_length and os.environ.get(LONGER_CONTEXT) != "1":
        raise ConfigurationError(
            f"a context of {context} tokens is longer than the checkpoint's "
            f"{family.context_length}; {LONGER_CONTEXT}=1 in the environment allows it"
        )
    return int(context)


def _defaults(settings: DecodeSettings, family: Family) -> dict[str, Any]:
    """The arguments that the user may overrule."""
    return {
        "model_path": str(family.checkpoint.path.resolve()),
        "dtype": settings.engine_dtype,
        "max_running_requests": settings.max_num_seqs,
        "enable_multimodal": True,
        "disable_priority_preemption": True,  # who has a slot keeps it, as in vLLM
        "log_level": "error",
        # A scheduler that has nothing to do must not look busy.
        "sleep_on_idle": True,
    }


def _on_cpu(settings: DecodeSettings, family: Family, context: int) -> dict[str, Any]:
    """What a CPU needs: PyTorch's own attention and sampling, nothing captured or compiled."""
    return {
        "device": "cpu",
        "dtype": "float32" if settings.engine_dtype == "auto" else settings.engine_dtype,
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "mem_fraction_static": 1.0,  # a part would be of what was free before the model was loaded
        "max_total_tokens": _cache_tokens(settings, family, context + MARGIN),
    }


def _cache_tokens(settings: DecodeSettings, family: Family, length: int) -> int:
    """Tokens whose keys and values a CPU keeps: all slots at full length, but 1 GiB at most.

    SGLang would take nearly all of the machine's memory, and touching it costs most of a minute at
    each start. One request of full length fits whatever that takes.
    """
    config = family.checkpoint.text_config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    held: int = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width
    element = 4 if settings.engine_dtype in ("auto", "float32") else 2
    return max(length, min(settings.max_num_seqs * length, _GIB // (held * element)))
