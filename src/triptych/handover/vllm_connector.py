"""vLLM's end of the road NIXL: embeddings go straight into the memory of its worker.

vLLM asks an *EC connector* for the outputs of an encoder that runs elsewhere. It makes one in its
worker and one in its scheduler. This one needs both in one process, which they are while an engine
has one worker, and there they share an `Intake`:

    scheduler   ``ensure_cache_available`` before it begins with a request: fetched, or fetch it
                ``take_unavailable_requests`` what could not be: fails that request alone
                ``update_state_after_alloc`` what it will compute in this step
    worker      ``start_load_caches`` puts that into vLLM's cache of encoder outputs

A request brings its `triptych.contract.Order` in ``ec_transfer_params``, and of its items only
what is not an embedding: grids and times. Written against vLLM 0.32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from triptych import contract
from triptych.handover import trust
from triptych.handover.intake import Intake
from triptych.handover.reader import NixlFetcher
from triptych.settings import PREFIX

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

KEY_VARIABLE = f"{PREFIX}HANDOVER_KEY"
"""How the engine's process is told `HandoverSettings.handover_key`: vLLM logs its configuration."""

_intakes: dict[str, Intake] = {}
"""By vLLM's ``engine_id``."""


@dataclass
class Loads(ECConnectorMetadata):  # type: ignore[misc]  # vLLM's imports are not followed
    """What a step needs in the worker's cache of encoder outputs, by name."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


class TriptychConnector(ECConnectorBase):  # type: ignore[misc]  # likewise
    """See the module; ``ec_connector_extra_config`` has ``buffer_mb`` and ``timeout_s``.

    Raises:
        ConfigurationError: NIXL does not start.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        config = vllm_config.ec_transfer_config
        assert config is not None
        assert config.engine_id is not None
        self._engine_id: str = config.engine_id
        if role is ECConnectorRole.WORKER:
            extra = config.ec_connector_extra_config
            fetcher = NixlFetcher(
                extra["buffer_mb"] << 20,
                trust.load_key(os.environ.get(KEY_VARIABLE, "")),
                extra["timeout_s"],
                _device(),
            )
            _intakes[self._engine_id] = Intake(fetcher, vllm_config.model_config.dtype)
        self._intake = _intakes[self._engine_id]
        self._loads = Loads()

    def shutdown(self) -> None:
        """The worker's: end all reads."""
        if self.role is ECConnectorRole.WORKER:
            _intakes.pop(self._engine_id, None)
            self._intake.close()

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Hand over what this step needs; nothing is copied or waited for."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        encoder_cache.update(metadata.tensors)

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Nothing: the encoder is elsewhere."""

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether the embeddings of all that is not computed yet are here; else fetch them."""
        order = _order(request)
        if order is None:
            return True
        names, needed = [], []
        for place, feature in enumerate(request.mm_features):
            names.append(feature.identifier)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens:
                needed.append(place)
        return self._intake.ready(request.request_id, order, names, needed)

    def take_unavailable_requests(self) -> set[str]:
        """Requests to be failed."""
        return self._intake.take_lost()

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item need not be encoded."""
        return self._intake.has(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """The item is computed in this step."""
        name = request.mm_features[index].identifier
        tensor = self._intake.take(request.request_id, index, name)
        if tensor is not None:
            self._loads.tensors[name] = tensor

    def update_state_after_free(self, request: Request, index: int) -> None:
        """The item was computed."""
        self._intake.used(request.request_id, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        """What was allocated since the last step."""
        loads, self._loads = self._loads, Loads()
        return loads

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended, was aborted, or has failed; maybe without ever having begun."""
        if order := _order(request):
            self._intake.end(request.request_id, order)
        return False, None


class Calls:
    """What vLLM's worker can be asked for besides (``worker_extension_cls``)."""

    vllm_config: VllmConfig

    def triptych_give_back(self, order: bytes) -> None:
        """End the lease of an order that no request brought."""
        self._triptych_intake.give_back(order)

    def triptych_why(self, order: str) -> str:
        """The error of a request that was failed; see `Intake.why`."""
        return self._triptych_intake.why(order)

    @property
    def _triptych_intake(self) -> Intake:
        config = self.vllm_config.ec_transfer_config
        assert config is not None
        return _intakes[config.engine_id or ""]


def _order(request: Request) -> bytes | None:
    return (request.ec_transfer_params or {}).get(contract.ORDER)


def _device() -> torch.device:
    """Where this worker's model is."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
