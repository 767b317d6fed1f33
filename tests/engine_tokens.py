"""Greedy float32 tokens of every engine are those of Hugging Face's own model.

A test module inherits `TokensContract` and gives the fixtures ``engine``, ``family`` and
``reference``.
"""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from generations import collect, generation, text
from reference import HuggingFaceReference
from triptych.engines.base import Engine
from triptych.families import Family


def drawn(width: int, height: int, colour: str = "red") -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return image


PICTURES = {
    "none": [],
    "one": [drawn(120, 96)],
    "tiny": [drawn(8, 8)],
    "flat": [drawn(4000, 30)],
    "large": [drawn(1600, 1200)],
    "several": [drawn(120, 96), drawn(64, 200, "blue"), drawn(33, 57, "green")],
    "the same twice": [drawn(120, 96), drawn(120, 96)],
}


class TokensContract:
    @pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)
    async def test_greedy_tokens_are_those_of_hugging_face(
        self,
        engine: Engine,
        family: Family,
        reference: HuggingFaceReference,
        pictures: list[Image.Image],
    ) -> None:
        parts = [{"type": "image_url"}] * len(pictures)
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Describe it."}]}]
        ids, said = reference.generate(messages, pictures, 48)
        prepared = reference.prepare(messages, pictures)
        prompt, media = generation(
            family,
            prepared.compact_ids,
            reference.embeddings(prepared),
            prepared.grids,
            max_tokens=48,
        )
        assert prompt.expanded() == prepared.input_ids
        deltas = await collect(engine, prompt, media)

        assert text(deltas) == said
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == len(ids)
        assert deltas[-1].usage.prompt_tokens == len(prepared.input_ids)
