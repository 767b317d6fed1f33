"""vLLM as others run it: its own processor and its own tower, given the media themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from generations import whole
from triptych.engines import vllm_environment
from triptych.engines.vllm_arguments import build_config
from triptych.families import Family
from triptych.settings import DecodeSettings

Raw = tuple[str, Any]
"""A modality, and one medium as vLLM takes it."""


class RawVllm:
    """An engine with its tower.

    Args:
        family: Whose checkpoint.
        each: Media of one modality that a request may have.
    """

    def __init__(self, family: Family, each: int) -> None:
        self._family = family
        self._given = {
            "limit_mm_per_prompt": dict.fromkeys(sorted(family.modalities), each),
            "enable_mm_embeds": False,
        }
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Import vLLM and load the whole checkpoint."""
        on_cpu = vllm_environment.prepare(eager=True)
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = DecodeSettings(model=str(self._family.checkpoint.path))
        config = build_config(settings, self._family, self._given, on_cpu=on_cpu)
        self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    async def answer(self, text: str, media: Sequence[Raw], max_tokens: int) -> tuple[str, int]:
        """The greedy answer up to its last whole character, and how many tokens it has.

        Args:
            text: The prompt, with one placeholder a medium.
            media: In the order of the prompt.
            max_tokens: Of the answer.
        """
        from vllm import SamplingParams

        (prompt,) = await self._llm.renderer.render_cmpl_async([_prompt(text, media)])
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens)
        async for output in self._llm.generate(prompt, parameters, str(next(self._numbers))):
            last = output.outputs[0]
        return whole(last.text), len(last.token_ids)

    async def stop(self) -> None:
        """End the engine's process."""
        self._llm.shutdown()


def _prompt(text: str, media: Sequence[Raw]) -> Mapping[str, Any]:
    data: dict[str, list[Any]] = {}
    for modality, medium in media:
        data.setdefault(modality, []).append(medium)
    return {"prompt": text, "multi_modal_data": data} if data else {"prompt": text}
