"""vLLM's configuration, made from the stage's settings and the user's engine arguments."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from triptych.engines import vllm_environment, vllm_grammar, vllm_ingest
from triptych.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from triptych.families.base import Family
    from triptych.settings import DecodeSettings

_GIB = 1 << 30


def build_config(
    settings: DecodeSettings, family: Family, given: Mapping[str, Any], *, on_cpu: bool
) -> VllmConfig:
    """The configuration of an engine that holds the language model only.

    Args:
        settings: The stage's.
        family: The model's.
        given: The user's engine arguments, which overrule ours.
        on_cpu: Whether vLLM will run on the CPU.

    Raises:
        ConfigurationError: An argument is unknown, or vLLM refuses them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"{settings.engine_args}: vLLM has no engine argument {name!r}{_hint(name, known)}"
            )
    start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
    ingest = vllm_ingest.arguments(settings, family, given)
    try:
        defaults = _defaults(settings, family, on_cpu=on_cpu)
        arguments = AsyncEngineArgs(**{**defaults, **given, **ingest})
        config = arguments.create_engine_config()
    except Exception as error:
        raise ConfigurationError(f"vLLM refuses its configuration: {error}") from error
    vllm_ingest.prepare(settings, config)
    if on_cpu:
        vllm_environment.fork_on_cpu(start_method)
        if config.cache_config.kv_cache_memory_bytes is None:
            config.cache_config.kv_cache_memory_bytes = _cpu_cache_bytes(config)
    return config


def _defaults(settings: DecodeSettings, family: Family, *, on_cpu: bool) -> dict[str, Any]:
    """The arguments that the user may overrule."""
    arguments: dict[str, Any] = {
        "model": str(family.checkpoint.path.resolve()),
        "dtype": settings.engine_dtype,
        "max_model_len": settings.max_model_len or family.context_length,
        "max_num_seqs": settings.max_num_seqs,
        # Media come as embeddings; a limit of 0 raw items leaves the towers out of the engine.
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {
            modality: int(modality in family.engine_encodes)
            for modality in sorted(family.modalities | {"image", "video"})
        },
        "skip_mm_profiling": True,
        # It would keep embeddings in two processes that have to agree about its content, and the
        # encoder has a cache of them already. Keys and values are still shared by content hash.
        "mm_processor_cache_gb": 0,
        # A span is made of the numbers.
        "disable_log_stats": not settings.otlp_endpoint,
        "otlp_traces_endpoint": settings.otlp_endpoint or None,
        # In turn among equals, as without; an engine that is to have no priorities says "fcfs".
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": vllm_grammar.BACKEND},
    }
    if on_cpu:
        # Compiling takes half a minute and gains little there.
        arguments["enforce_eager"] = True
        if settings.engine_dtype == "auto":
            arguments["dtype"] = "float32"
    return arguments


def _cpu_cache_bytes(config: VllmConfig) -> int:
    """Memory for keys and values on a CPU: all slots at full length, but 1 GiB at most.

    vLLM would take most of the machine, and touching a page costs time: 3 s a GiB here, at each
    start. One request of full length fits whatever that takes.
    """
    model = config.model_config
    block: int = config.cache_config.block_size
    element = model.dtype.itemsize
    heads = model.get_num_kv_heads(config.parallel_config)
    layers = model.get_num_layers(config.parallel_config)
    block_bytes: int = 2 * layers * heads * model.get_head_size() * element * block
    blocks: int = -(-model.max_model_len // block)
    slots: int = config.scheduler_config.max_num_seqs
    # One block more: vLLM keeps one for itself.
    wanted = (slots * blocks + 1) * block_bytes
    return max((blocks + 1) * block_bytes, min(wanted, _GIB))


def _hint(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
