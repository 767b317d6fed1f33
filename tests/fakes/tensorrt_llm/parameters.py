"""Sampling and what comes beside a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    max_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def greedy(self) -> bool:
        """As documented: whatever the temperature, unless there is a top_k or a top_p."""
        return self.top_k in (None, 1) and self.top_p in (None, 0.0)


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    request_type: str | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    mrope_position_ids_handle: dict[str, Any] | None = None
    mrope_position_deltas_handle: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        kinds = {"context_only", "generation_only", "context_and_generation"}
        if self.request_type not in kinds:
            raise ValueError(f"unknown request type {self.request_type}")
        if not self.multimodal_embedding_handles:
            raise ValueError("multimodal_embedding_handles must be provided")
