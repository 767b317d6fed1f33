"""The fake engine: says back what it was given, at once and always the same.

It is what tests run when they ask about everything but a language model, and the template for the
next engine: it keeps every promise of `Engine` and the same contract tests hold it.

An answer begins with what reached the engine, so that a caller can see that it was its own::

    prompt: 23 tokens, crc32 1c291ca3
    image 0: 12×192 float32, crc32 8e4f36a1

and goes on with the prompt's text. A word with the space before it is one token.
"""

from __future__ import annotations

import array
import asyncio
import re
import zlib
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer

from triptych.contract import Prompt
from triptych.engines.base import (
    Alternative,
    Delta,
    Engine,
    FinishReason,
    Media,
    TokenLogprob,
    Usage,
)
from triptych.engines.sampling import FIELDS, SUPPORTED, Declaration, mapped, refused
from triptych.errors import Cancelled, ConfigurationError, Unavailable

if TYPE_CHECKING:
    import torch

_WORD = re.compile(r"\s*\S+|\s+$")


class EchoEngine(Engine):
    """Keeps no weights; its slots and its context are as limited as a real engine's."""

    name = "echo"
    sampling: ClassVar[Declaration] = {
        **dict.fromkeys((field.name for field in FIELDS), mapped("nothing is drawn")),
        **dict.fromkeys(("max_tokens", "stop", "logprobs", "top_logprobs"), SUPPORTED),
        **dict.fromkeys(("response_format", "tool_choice"), refused("it only says back")),
        "priority": refused("its slots are given in turn"),
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._tokenizer: Tokenizer | None = None
        self._slots = asyncio.Semaphore(self.settings.max_num_seqs)
        self._live: dict[str, asyncio.Event] = {}
        """By prompt id, what is set when the generation must end."""

    async def start(self) -> None:
        """Read the tokenizer."""
        path = self.family.checkpoint.path / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigurationError(f"{path}: {error}") from None

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Say the prompt back; see the module."""
        await self.health()
        self.admit(prompt, media)
        room = min(prompt.sampling.max_tokens, self.context_length - prompt.length)
        words, reason = _cut(self._answer(prompt, media), prompt.sampling.stop, room)
        ended = self._live[prompt.id] = asyncio.Event()
        slot = asyncio.ensure_future(self._slots.acquire())
        try:
            await _unless(ended, slot)
            for count, word in enumerate(words, 1):
                await _unless(ended, asyncio.sleep(self.settings.echo_token_delay_s))
                yield _delta(prompt, word, count, reason if count == len(words) else None)
        finally:
            if slot.done() and not slot.cancelled():
                self._slots.release()
            slot.cancel()
            self._live.pop(prompt.id, None)

    async def abort(self, prompt_id: str) -> None:
        """End the generation before its next token."""
        if ended := self._live.get(prompt_id):
            ended.set()

    async def health(self) -> None:
        """Healthy from `start` to `stop`."""
        if self._tokenizer is None:
            raise Unavailable("the engine is not running")

    async def stop(self) -> None:
        """End every generation."""
        self._tokenizer = None
        for prompt_id in list(self._live):
            await self.abort(prompt_id)

    def _answer(self, prompt: Prompt, media: Media) -> str:
        assert self._tokenizer is not None
        ids = array.array("I", prompt.token_ids).tobytes()
        lines = [f"prompt: {prompt.length} tokens, crc32 {zlib.crc32(ids):08x}"]
        lines += [
            f"{item.modality} {index}: {'×'.join(map(str, item.shape))} {item.dtype}, "
            f"crc32 {checksum(embeddings):08x}"
            for index, (item, embeddings) in enumerate(media)
        ]
        return "\n".join([*lines, self._tokenizer.decode(prompt.token_ids)])


def checksum(embeddings: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    import torch

    return zlib.crc32(embeddings.contiguous().cpu().view(torch.uint8).numpy())


def _cut(answer: str, stops: Sequence[str], room: int) -> tuple[list[str], FinishReason]:
    """The words of the answer up to a stop string, ``room`` of them at most, and why it ends."""
    starts = [start for stop in stops if (start := answer.find(stop)) >= 0]
    words = _WORD.findall(answer[: min(starts)] if starts else answer) or [""]
    return (words[:room], "length") if len(words) > room else (words, "stop")


def _delta(prompt: Prompt, word: str, count: int, reason: FinishReason | None) -> Delta:
    logprobs: tuple[TokenLogprob, ...] = ()
    if prompt.sampling.logprobs:
        top = (Alternative(word, 0.0),) if prompt.sampling.top_logprobs else ()
        logprobs = (TokenLogprob(word, 0.0, top=top),)
    usage = Usage(prompt.length, count) if reason else None
    return Delta(word, 1, logprobs, reason, usage)


async def _unless(ended: asyncio.Event, work: Awaitable[Any]) -> None:
    """Wait for ``work``, unless ``ended`` is set before it is done: then `Cancelled`."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(ended.wait())
    try:
        if not ended.is_set():
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if ended.is_set():
            raise Cancelled("the generation was aborted")
    finally:
        waiter.cancel()
        task.cancel()
