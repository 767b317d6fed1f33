"""A request that has ended in a stage, as the log, Prometheus and traces tell of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from triptych.chat.chunks import Stages
from triptych.contract import Prompt
from triptych.engines.base import Usage
from triptych.errors import InternalError, TriptychError


@dataclass(frozen=True, slots=True)
class Ended:
    """One request; a stage before the last tells only of those that end there."""

    request_id: str
    """Triton's; may be empty."""
    outcome: str
    """OpenAI's finish reason, or an error's code."""
    where: str = ""
    """JSON path of what was wrong with it."""
    error: str = ""
    """In words, which may quote the request."""
    prompt: Prompt | None = None
    """None: it did not get that far."""
    stages: Stages | None = None
    usage: Usage | None = None
    first: float = 0.0
    """When its first token came, `time.monotonic` seconds; 0: none did."""
    at: float = field(default_factory=time.monotonic)

    @classmethod
    def by(cls, error: BaseException, request_id: str, **known: Any) -> Ended:
        """By an error; what is none of ours counts as a fault of ours."""
        if not isinstance(error, TriptychError):
            error = InternalError(type(error).__name__)
        return cls(request_id, error.code, error.where, error.what, **known)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token."""
        if not self.first or self.prompt is None or not self.prompt.arrived:
            return None
        return max(0.0, self.first - self.prompt.arrived)

    @property
    def itl_s(self) -> float | None:
        """Seconds between two of its tokens, on average."""
        if self.usage is None or self.stages is None or self.usage.completion_tokens < 2:
            return None
        return self.stages.decode_ms / 1000 / (self.usage.completion_tokens - 1)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by kind; the media's are among the prompt's."""
        if self.prompt is None or self.usage is None:
            return {}
        found = {
            "prompt": self.usage.prompt_tokens,
            "cached": self.usage.cached_tokens,
            "completion": self.usage.completion_tokens,
        }
        for item in self.prompt.items:
            found[item.modality] = found.get(item.modality, 0) + item.tokens
        return found

    def line(self, *, content: bool) -> dict[str, Any]:
        """What the log says of it.

        Args:
            content: Whether the error's words may be in it.
        """
        line: dict[str, Any] = {"request": self.request_id, "outcome": self.outcome}
        if self.where:
            line["where"] = self.where
        if self.error and content:
            line["error"] = self.error
        if self.prompt is not None:
            line |= {"id": self.prompt.id, "model": self.prompt.model}
        line |= {f"{kind}_tokens": count for kind, count in self.tokens.items()}
        if self.stages is not None:
            line |= {name: getattr(self.stages, name) for name in self.stages.__struct_fields__}
        if self.ttft_s is not None:
            line["ttft_ms"] = round(self.ttft_s * 1000, 2)
        return line
