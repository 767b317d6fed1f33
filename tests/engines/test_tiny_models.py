"""The trained models through their towers and vLLM: what they say of shapes and tones is true."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from generations import collect, text
from tiny.clips import CLIP_TYPES, clip_example
from tiny.examples import example
from tiny.questions import LLAVA_TYPES
from tiny.scenes import draw
from tiny.tone_questions import SOUND_PAIR_TYPES, SOUND_TYPES, sound_example
from tiny.tones import synthesise
from triptych import families
from triptych.chat.prompt import MediumSize, PromptBuilder
from triptych.chat.request import parse
from triptych.contract import Item, Modality, Prompt, aligned
from triptych.encode import Encoder
from triptych.engines.base import Media
from triptych.engines.vllm import VllmEngine
from triptych.families.base import Family
from triptych.media.image import fit
from triptych.settings import DecodeSettings, EncoderSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own warnings are not ours, and its process is a fork of this one.
    pytest.mark.filterwarnings("default"),
]

MODELS = Path(__file__).parents[2] / "models"
TYPES = {
    "tiny-llava-1.5": LLAVA_TYPES,
    "tiny-llava-next-video": CLIP_TYPES,
    "tiny-qwen2-audio": SOUND_TYPES + SOUND_PAIR_TYPES,
}
EACH = {"tiny-llava-1.5": 3, "tiny-llava-next-video": 8, "tiny-qwen2-audio": 6}
"""Questions of every type."""
Medium = tuple[Item, np.ndarray[Any, Any]]


def medium(modality: Modality, array: np.ndarray[Any, Any], tokens: int) -> Medium:
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return Item(modality, content, str(array.dtype), array.shape, 0, tokens), array


def pictures(family: Family, type_: str, rng: random.Random) -> tuple[list[Medium], str, str]:
    scenes, question = example(type_, rng)
    media = []
    for scene in scenes:
        picture = draw(scene, (rng.randint(90, 300), rng.randint(90, 300)))
        plan = family.plan_image(picture.height, picture.width)
        media.append(medium("image", fit(picture, plan), plan.tokens))
    return media, question.text, question.answer


def clips(family: Family, type_: str, rng: random.Random) -> tuple[list[Medium], str, str]:
    clip, question = clip_example(type_, rng)
    frames: Sequence[Image.Image] = [draw(scene, (160, 120)) for scene in clip.frames(8)]
    plan = family.plan_video(len(frames), 120, 160, fps=4.0)
    pixels = np.stack([fit(frame, plan) for frame in frames])
    return [medium("video", pixels, plan.tokens)], question.text, question.answer


def sounds(family: Family, type_: str, rng: random.Random) -> tuple[list[Medium], str, str]:
    heard, question = sound_example(type_, rng)
    media = []
    for sound in heard:
        wave = synthesise(sound)
        media.append(medium("audio", wave, family.plan_audio(len(wave)).tokens))
    return media, question.text, question.answer


DRAWN = {"image": pictures, "video": clips, "audio": sounds}


@pytest.fixture(scope="module", params=TYPES)
def family(request: pytest.FixtureRequest) -> Family:
    return families.load(MODELS / request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: Family) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(DecodeSettings(model=str(family.checkpoint.path)), family)
    await engine.start()
    yield engine
    await engine.stop()


def prompt(builder: PromptBuilder, media: Sequence[Medium], question: str) -> Prompt:
    parts = [
        {"type": f"{item.modality}_url", f"{item.modality}_url": {"url": "data:,"}}
        for item, _ in media
    ]
    content = [*parts, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    request = parse(msgspec.json.encode({"max_tokens": 96, **body}))
    sizes = [MediumSize(item.tokens, item.hash) for item, _ in media]
    return builder.build(request, builder.render(request), sizes)


def encoded(encoder: Encoder, media: Sequence[Medium]) -> Media:
    items, data, offset = [], np.zeros(sum(aligned(a.nbytes) for _, a in media), np.uint8), 0
    for item, array in media:
        items.append(msgspec.structs.replace(item, offset=offset))
        data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        offset += aligned(array.nbytes)
    (answer,) = encoder.encode([(items, torch.from_numpy(data))])
    return [
        (
            item,
            answer.embeddings[item.offset : item.offset + item.nbytes]
            .view(getattr(torch, item.dtype))
            .view(item.shape),
        )
        for item in answer.ticket.items
    ]


async def test_answers_are_true(engine: VllmEngine, family: Family) -> None:
    torch.set_num_threads(1)
    directory = family.checkpoint.path
    (modality,) = family.modalities
    placeholders = {modality: family.placeholder(modality)}
    builder = PromptBuilder(directory, placeholders, max_model_len=family.context_length)
    encoder = Encoder(family, EncoderSettings(model=str(directory)), torch.device("cpu"))
    rng = random.Random(30_000)
    wrong, asked = [], 0
    for type_ in TYPES[directory.name]:
        for _ in range(EACH[directory.name]):
            media, question, answer = DRAWN[modality](family, type_, rng)
            given = encoded(encoder, media)
            said = text(await collect(engine, prompt(builder, media, question), given))
            asked += 1
            if said != answer:
                wrong.append(f"{type_}: {question} → {said!r}, true is {answer!r}")
    assert len(wrong) <= 0.05 * asked, "\n".join(wrong)
