"""What an answer took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from triptych_client import Answer, Chunk, Stages, Usage


@dataclass
class Meter:
    """Times of one answer, in seconds since it was asked for."""

    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    usage: Usage | None = None
    stages: Stages | None = None
    finish_reason: str | None = None

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Pass ``chunks`` on."""
        for chunk in chunks:
            if chunk.text:
                self.last = time.perf_counter() - self.began
                self.first = self.last if self.first is None else self.first
            self._note(chunk)
            yield chunk

    def whole(self, answer: Answer) -> None:
        """Note an answer that came in one piece, which has no first token."""
        self.last = time.perf_counter() - self.began
        self._note(answer)

    def facts(self) -> Iterator[str]:
        """What is known, for a person."""
        if self.first is not None:
            yield f"time to first token {self.first * 1000:.0f} ms"
        if usage := self.usage:
            tokens = usage.completion_tokens
            yield f"{tokens} tokens in {self.last:.2f} s"
            # Between the first and the last, which is the speed of decoding alone.
            took = self.last - (self.first or 0.0)
            made = tokens - (self.first is not None)
            if took > 0 and made > 0:
                yield f"{made / took:.1f} tokens/s"
            details = usage.prompt_tokens_details
            cached = f", {details.cached_tokens} cached" if details else ""
            yield f"{usage.prompt_tokens} tokens of prompt{cached}"
        if self.stages and self.stages.media:
            yield f"{self.stages.media_cached} of {self.stages.media} media cached"

    def details(self) -> Iterator[str]:
        """What else is known."""
        if self.stages:
            for name in ("preprocess", "encode", "prefill", "decode"):
                yield f"{name} {getattr(self.stages, f'{name}_ms'):.0f} ms"
        yield f"finish reason {self.finish_reason}"

    def _note(self, piece: Chunk | Answer) -> None:
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage
        self.stages = piece.stages or self.stages
