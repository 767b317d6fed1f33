"""One request that SGLang is at work on: its outputs as deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from triptych.contract import Prompt
from triptych.engines.base import Alternative, Delta, FinishReason, TokenLogprob, Usage
from triptych.engines.sglang_wire import Output, Scored
from triptych.engines.stops import StopStrings
from triptych.engines.token_bytes import token_bytes
from triptych.errors import Cancelled, TriptychError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Generation:
    """One request, from before SGLang has it until it has ended."""

    def __init__(self, sglang_id: str, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.id = sglang_id
        self.prompt = prompt
        self.finished = False
        """SGLang has ended it."""
        self._tokenizer = tokenizer
        self._stops = StopStrings(prompt.sampling.stop)
        self._outputs: asyncio.Queue[Output | TriptychError] = asyncio.Queue()
        self._drawn = 0

    def put(self, output: Output | TriptychError) -> None:
        """What comes of it; an error is the last."""
        self._outputs.put_nowait(output)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What SGLang adds to the answer.

        Raises:
            TriptychError: What was put.
        """
        reason: FinishReason | None = None
        while reason is None:
            output = await self._outputs.get()
            if isinstance(output, TriptychError):
                self.finished = not isinstance(output, Cancelled)
                raise output
            self.finished = bool(output.finish)
            self._drawn += len(output.token_ids)
            delta = self._delta(output)
            reason = delta.finish_reason
            yield delta

    def _delta(self, output: Output) -> Delta:
        reason: FinishReason | None = output.finish or None
        text, stopped = self._stops.add(output.text)
        if stopped:
            reason = "stop"
        elif reason:
            text += self._stops.rest()
        return Delta(
            text,
            len(output.token_ids),
            self._logprobs(output),
            reason,
            Usage(self.prompt.length, self._drawn, output.cached_tokens) if reason else None,
        )

    def _logprobs(self, output: Output) -> tuple[TokenLogprob, ...]:
        tops = output.top_logprobs or ((),) * len(output.logprobs)
        return tuple(
            TokenLogprob(
                *self._scored(drawn),
                tuple(Alternative(*self._scored(other)) for other in top),
            )
            for drawn, top in zip(output.logprobs, tops, strict=True)
        )

    def _scored(self, scored: Scored) -> tuple[str, float, bytes | None]:
        """A token's text, its probability's logarithm, and its own bytes."""
        token, logprob = scored
        piece = self._tokenizer.id_to_token(token)
        # Some models have more rows than their tokenizer has tokens.
        raw = None if piece is None else token_bytes(piece)
        text = self._tokenizer.decode([token]) if raw is None else raw.decode(errors="replace")
        return text, logprob, raw
