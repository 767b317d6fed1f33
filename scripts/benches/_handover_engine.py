"""Notes, in vLLM's process, when the embeddings of a step are where the language model reads them.

vLLM tells its EC connector the end of that part of a step. So an engine that is given embeddings
gets a connector too, which does nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata

from triptych.handover.vllm_connector import Calls, Loads, TriptychConnector

__all__ = ["Calls", "Noting", "NotingConnector"]


@dataclass
class Encoded(ECConnectorMetadata):
    """Whether a step has embeddings."""

    any: bool


class _Notes:
    _vllm_config: Any
    _connector_metadata: Any

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        metadata = self._connector_metadata
        if metadata.tensors if isinstance(metadata, Loads) else metadata.any:
            path = Path(self._vllm_config.ec_transfer_config.ec_connector_extra_config["notes"])
            with path.open("a") as notes:
                notes.write(f"{time.monotonic()}\n")
        return None, None


class NotingConnector(_Notes, TriptychConnector):
    """For an engine that fetches."""


class Noting(_Notes, ECConnectorBase):
    """For an engine that is given embeddings."""

    def build_connector_meta(self, scheduler_output: Any) -> Encoded:
        """Whether any are new in this step."""
        return Encoded(bool(scheduler_output.scheduled_encoder_inputs))

    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save_caches(self, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None:
        """Nothing."""

    def has_cache_item(self, identifier: str) -> bool:
        """No."""
        return False

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Nothing."""
