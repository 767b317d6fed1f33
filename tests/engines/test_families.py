"""Each family through its tower and engines: greedy float32 tokens are those of Hugging Face.

Media go the whole way from arrays: plan, encoder, ticket, engine. The checkpoints have random
weights, and another medium makes other tokens. vLLM with a tower of its own, given the media
themselves, must draw the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from by_ticket import ENGINES, started
from checkpoints import tiny_llava, tiny_llava_next_video, tiny_qwen2_audio
from generations import collect, said, whole
from raw_vllm import Raw, RawVllm
from triptych import families
from triptych.chat.prompt import MediumSize, PromptBuilder
from triptych.chat.request import parse
from triptych.contract import Item, Prompt, Ticket
from triptych.encode import Encoder
from triptych.engines.base import Engine, Media
from triptych.errors import InvalidValue
from triptych.media.image import fit
from triptych.settings import EncoderSettings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own warnings are not ours, and its process is a fork of this one.
    pytest.mark.filterwarnings("default"),
]

ANSWER = 24
"""Tokens."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Medium:
    """One medium, and what Hugging Face's processor makes of it."""

    item: Item
    array: Array
    inputs: dict[str, torch.Tensor]
    raw: Any
    """The medium itself, as vLLM takes it."""


class Kind:
    """One family under test, and Hugging Face's model of it."""

    def __init__(self, directory: Path, model: str, *seeds: Sequence[int]) -> None:
        import transformers

        torch.set_num_threads(1)
        self.seeds = seeds
        self.family = families.load(directory)
        (self.modality,) = self.family.modalities
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = (
            getattr(transformers, model).from_pretrained(directory, dtype=torch.float32).eval()
        )
        self.builder = PromptBuilder(
            directory,
            {self.modality: self.family.placeholder(self.modality)},
            max_model_len=self.family.context_length,
        )
        settings = EncoderSettings(model=str(directory))
        self.encoder = Encoder(self.family, settings, torch.device("cpu"))

    def medium(self, seed: int) -> Medium:
        """A medium of noise; the seed says which."""
        raise NotImplementedError

    def request(self, seeds: Sequence[int], **fields: Any) -> tuple[Prompt, list[Medium]]:
        """A conversation about some media."""
        part = {"type": f"{self.modality}_url", f"{self.modality}_url": {"url": "data:,"}}
        content = [*[part] * len(seeds), {"type": "text", "text": "What colour is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        request = parse(msgspec.json.encode({"max_tokens": ANSWER, **body}))
        media = [self.medium(seed) for seed in seeds]
        sizes = [MediumSize(medium.item.tokens, medium.item.hash) for medium in media]
        return self.builder.build(request, self.builder.render(request), sizes), media

    def raw(self, seeds: Sequence[int]) -> tuple[str, list[Raw]]:
        """The conversation of `request` as vLLM takes it from others."""
        part = {"type": self.modality, f"{self.modality}_url": "data:,"}
        content = [*[part] * len(seeds), {"type": "text", "text": "What colour is it?"}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text, [(self.modality, self.medium(seed).raw) for seed in seeds]

    def encode(self, *requests: Sequence[Medium]) -> list[Media]:
        """What the encoder hands to the engine, from one batch."""
        answers = self.encoder.encode([_laid_out(media) for media in requests])
        return [_read(answer.embeddings, answer.ticket) for answer in answers]

    @torch.inference_mode()
    def expected(self, prompt: Prompt, media: Sequence[Medium]) -> tuple[str, int]:
        """Hugging Face's greedy answer to the raw media, and how many tokens it has."""
        ids = torch.tensor([prompt.expanded()])
        inputs = {
            name: torch.cat([medium.inputs[name] for medium in media])
            for name in (media[0].inputs if media else ())
        }
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            do_sample=False,
            max_new_tokens=ANSWER,
        )
        drawn = output[0, ids.shape[1] :]
        return whole(self.tokenizer.decode(drawn, skip_special_tokens=True)), len(drawn)


class Llava(Kind):
    def __init__(self, directory: Path) -> None:
        import transformers

        super().__init__(
            tiny_llava(directory),
            "LlavaForConditionalGeneration",
            (),
            (0,),
            (1,),
            (0, 1, 2),
            (2, 2),
        )
        self.processor = transformers.CLIPImageProcessorPil.from_pretrained(directory)

    def medium(self, seed: int) -> Medium:
        shape = (90 + 20 * seed, 120, 3)
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
        plan = self.family.plan_image(image.height, image.width)
        item = Item("image", f"{seed}", "uint8", plan.shape, 0, plan.tokens)
        inputs = self.processor(image, return_tensors="pt")
        return Medium(item, fit(image, plan), dict(inputs), image)


class LlavaNextVideo(Kind):
    """All are given the frames that we plan: theirs are one step of 256 off in places."""

    def __init__(self, directory: Path) -> None:
        import transformers

        super().__init__(
            tiny_llava_next_video(directory),
            "LlavaNextVideoForConditionalGeneration",
            *((), (0,), (1,), (2,)),
        )
        self.processor = transformers.LlavaNextVideoVideoProcessor.from_pretrained(directory)

    def medium(self, seed: int) -> Medium:
        clip = np.random.default_rng(seed).integers(0, 256, (3 + seed, 90, 120, 3), np.uint8)
        plan = self.family.plan_video(*clip.shape[:3], fps=1.0)
        frames = np.stack([fit(Image.fromarray(frame), plan) for frame in clip])
        item = Item("video", f"{seed}", "uint8", frames.shape, 0, plan.tokens)
        inputs = self.processor(frames, return_tensors="pt")
        return Medium(item, frames, dict(inputs), frames)


class Qwen2Audio(Kind):
    """A window of 30 s, as the hub's checkpoints have it: vLLM's own path takes no other."""

    def __init__(self, directory: Path) -> None:
        import transformers

        super().__init__(
            tiny_qwen2_audio(directory, seconds=30),
            "Qwen2AudioForConditionalGeneration",
            *((), (0,), (1,), (0, 1, 2), (2, 2)),
        )
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)

    def medium(self, seed: int) -> Medium:
        samples = 9_000 + 7_777 * seed
        time = np.arange(samples) / 16_000
        wave = np.sin(2 * np.pi * 220 * (seed + 1) * time).astype(np.float32)
        tokens = self.family.plan_audio(samples).tokens
        item = Item("audio", f"{seed}", "float32", wave.shape, 0, tokens)
        features = self.extractor(
            wave, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
        )
        inputs = {
            "input_features": features["input_features"],
            "feature_attention_mask": features["attention_mask"],
        }
        return Medium(item, wave, inputs, (wave, 16_000))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "llava": Llava,
    "llava_next_video": LlavaNextVideo,
    "qwen2_audio": Qwen2Audio,
}


def _laid_out(media: Sequence[Medium]) -> tuple[list[Item], torch.Tensor]:
    """ITEMS and MEDIA as preprocess makes them."""
    from triptych.contract import aligned

    items, parts, offset = [], [], 0
    for medium in media:
        data = medium.array.reshape(-1).view(np.uint8)
        items.append(msgspec.structs.replace(medium.item, offset=offset))
        parts.append(np.pad(data, (0, aligned(data.size) - data.size)))
        offset += aligned(data.size)
    return items, torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *parts]))


def _read(embeddings: torch.Tensor, ticket: Ticket) -> Media:
    """EMBEDDINGS as decode reads them."""
    return [
        (
            item,
            embeddings[item.offset : item.offset + item.nbytes]
            .view(getattr(torch, item.dtype))
            .view(item.shape),
        )
        for item in ticket.items
    ]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return KINDS[request.param](tmp_path_factory.mktemp("family") / request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def engine(kind: Kind, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Both ways for embeddings into vLLM, and SGLang."""
    if request.param != "inline" and kind.family.engine_encodes:
        pytest.skip(f"{kind.family.name} goes into an engine as pixels, which vLLM alone takes")
    async with started(kind.family, request.param) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def raw_vllm(kind: Kind) -> AsyncIterator[RawVllm]:
    engine = RawVllm(kind.family, each=max(map(len, kind.seeds)))
    await engine.start()
    yield engine
    await engine.stop()


async def test_greedy_tokens_are_those_of_hugging_face(engine: Engine, kind: Kind) -> None:
    """One after another, then all at once from one batch of the encoder."""
    requests = [kind.request(seeds) for seeds in kind.seeds]
    expected = [kind.expected(prompt, media) for prompt, media in requests]
    assert len({answer for answer, _ in expected}) == len(expected), "media make a difference"
    for (prompt, media), answer in zip(requests, expected, strict=True):
        (given,) = kind.encode(media)
        assert said(await collect(engine, prompt, given)) == answer

    again = [kind.request(seeds)[0] for seeds in kind.seeds]
    batch = kind.encode(*(media for _, media in requests))
    answers = await asyncio.gather(
        *(collect(engine, prompt, given) for prompt, given in zip(again, batch, strict=True))
    )
    assert [said(deltas) for deltas in answers] == expected


async def test_vllm_draws_the_same_from_the_media_themselves(raw_vllm: RawVllm, kind: Kind) -> None:
    """One after another, then all at once: what ours is held against is not HF's alone."""
    expected = [kind.expected(*kind.request(seeds)) for seeds in kind.seeds]
    requests = [kind.raw(seeds) for seeds in kind.seeds]
    for request, answer in zip(requests, expected, strict=True):
        assert await raw_vllm.answer(*request, ANSWER) == answer
    answers = await asyncio.gather(*(raw_vllm.answer(*request, ANSWER) for request in requests))
    assert answers == expected


async def test_the_prompt_is_counted_with_every_place(engine: Engine, kind: Kind) -> None:
    prompt, media = kind.request(kind.seeds[1])
    deltas = await collect(engine, prompt, *kind.encode(media))
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(prompt.expanded()) == prompt.length


async def test_what_the_engine_must_not_see_leaves_it_alive(engine: Engine, kind: Kind) -> None:
    prompt, media = kind.request(kind.seeds[1])
    ((item, tensor),) = kind.encode(media)[0]
    narrow = msgspec.structs.replace(item, shape=(item.shape[0], item.shape[1] - 1))
    with pytest.raises(InvalidValue):
        await collect(engine, prompt, [(narrow, tensor[:, 1:])])
    await engine.health()
    assert said(await collect(engine, prompt, [(item, tensor)])) == kind.expected(prompt, media)
