"""vLLM fetches the embeddings itself: what it is told at its start, by a request, and after one.

Its own end of that is `triptych.handover.vllm_connector`, which runs in its process. A request
brings everything that it would bring otherwise, except the embeddings: their place is taken by the
ticket.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from triptych import contract, settings
from triptych.contract import Order, Ticket
from triptych.errors import ConfigurationError, InternalError, TriptychError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from triptych.families.base import Family
    from triptych.settings import DecodeSettings

CONNECTOR = "triptych.handover.vllm_connector"
_OURS = ("ec_transfer_config", "worker_extension_cls")
_NEEDED = ("ensure_cache_available", "take_unavailable_requests", "update_state_after_free")
"""What vLLM's connectors can do since the version that this is written against."""


def arguments(settings: DecodeSettings, family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """VLLM's engine arguments that `DecodeSettings.embedding_ingest` asks for.

    Args:
        settings: The stage's.
        family: The model's.
        given: The user's engine arguments.

    Raises:
        ConfigurationError: This vLLM, this machine or this family cannot do that.
    """
    if settings.embedding_ingest == "inline":
        return {}
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

    if lacks := [name for name in _NEEDED if not hasattr(ECConnectorBase, name)]:
        raise _refused(f"this version of vLLM has no {', '.join(lacks)} in its EC connectors")
    if importlib.util.find_spec("nixl") is None:
        raise _refused("NIXL is not installed (scripts/setup does)")
    if family.engine_encodes:
        raise _refused(f"vLLM must be given the pixels of {family.name}, not embeddings")
    if taken := [name for name in _OURS if name in given]:
        raise _refused(f"it needs vLLM's {', '.join(taken)} for itself ({settings.engine_args})")
    extra = {"buffer_mb": settings.handover_buffer_mb, "timeout_s": settings.handover_timeout_s}
    return {
        "ec_transfer_config": ECTransferConfig(
            ec_connector="TriptychConnector",
            ec_role="ec_consumer",
            ec_connector_module_path=CONNECTOR,
            ec_connector_extra_config=extra,
        ),
        "worker_extension_cls": f"{CONNECTOR}.Calls",
    }


def prepare(given: DecodeSettings, config: VllmConfig) -> None:
    """Get this process's environment ready for an engine with the connector.

    Raises:
        ConfigurationError: The engine would have more than one worker.
    """
    if given.embedding_ingest == "inline":
        return
    parallel = config.parallel_config
    workers = parallel.world_size * parallel.data_parallel_size
    if workers > 1 or parallel.distributed_executor_backend != "uni":
        raise _refused(
            "vLLM's scheduler must run in the process of its only worker, got "
            f"{workers} workers by {parallel.distributed_executor_backend!r}"
        )
    if given.handover_key:
        # Not in the configuration, which vLLM logs.
        os.environ[f"{settings.PREFIX}HANDOVER_KEY"] = given.handover_key


def refer(
    ticket: Ticket, prompt_id: str, rendered: Mapping[str, Any], parameters: SamplingParams
) -> None:
    """Put a reference to embeddings in their place.

    Args:
        ticket: Where they are.
        prompt_id: By which `why` asks.
        rendered: The prompt as vLLM's renderer leaves it, with tensors for embeddings that have
            shapes and no values; they are taken out.
        parameters: Of the request; gets the ticket.
    """
    for items in rendered["mm_kwargs"].values():
        for item in items:
            for name in [name for name in item if name.endswith("_embeds")]:
                del item[name]
    order = {contract.ORDER: _order(ticket, prompt_id)}
    parameters.extra_args = {**(parameters.extra_args or {}), "ec_transfer_params": order}


async def give_back(llm: AsyncLLM, ticket: Ticket) -> None:
    """Have the engine end the leases of embeddings that no request refers to."""
    await llm.collective_rpc("triptych_give_back", args=(_order(ticket, ""),))


async def why(llm: AsyncLLM, prompt_id: str) -> TriptychError:
    """What a request has failed with that vLLM has ended without a word."""
    (told,) = await llm.collective_rpc("triptych_why", args=(prompt_id,))
    return TriptychError.parse(told) if told else InternalError("the engine failed on this request")


def _order(ticket: Ticket, prompt_id: str) -> bytes:
    return msgspec.json.encode(Order(prompt_id, msgspec.structs.replace(ticket, again=None)))


def _refused(why: str) -> ConfigurationError:
    return ConfigurationError(f"embedding_ingest is 'connector', but {why}; set it to 'inline'")
