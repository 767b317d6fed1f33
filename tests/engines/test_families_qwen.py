"""The Qwen-VL families through tower and engines: greedy float32 tokens are those of Hugging Face.

Pictures and clips go the whole way from arrays: plan, encoder, ticket, engine. vLLM with a tower of
its own, given the media themselves, must draw the same. Clips are scaled by us for all, since
Hugging Face's own scaling, which vLLM takes too, is one step of 256 off in places; the rest of
their processing is their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

import qwen_checkpoints as tiny
from by_ticket import ENGINES, started
from generations import collect, said, whole
from raw_vllm import Raw, RawVllm
from triptych import families
from triptych.chat.prompt import MediumSize, PromptBuilder
from triptych.chat.request import parse
from triptych.contract import Item, Prompt
from triptych.encode import Encoder
from triptych.engines.base import Engine, Media
from triptych.errors import InvalidValue
from triptych.media.image import fit
from triptych.settings import EncoderSettings
from unit.qwen import request as laid_out

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's own warnings are not ours, and its process is a fork of this one.
    pytest.mark.filterwarnings("default"),
]

ANSWER = 24
"""Tokens."""
IMAGES = ["", "image 0", "image 1", "image 0, image 1, image 2", "image 2, image 2"]
CLIPS = ["clip 0 2.0", "clip 1 1.5", "clip 1 1.0, clip 0 2.0", "image 0, clip 0 2.0, image 1"]
KINDS = {
    "qwen2_vl": (tiny.tiny_qwen2_vl, [*IMAGES, *CLIPS]),
    # Another rate is another answer: the timing of a clip counts.
    "qwen2_5_vl": (tiny.tiny_qwen2_5_vl, [*IMAGES, *CLIPS, "clip 0 3.0", "clip 0 0.4"]),
    "qwen3_vl": (tiny.tiny_qwen3_vl, [*IMAGES, *CLIPS, "clip 0 0.4"]),
    "qwen3_vl_moe": (tiny.tiny_qwen3_vl_moe, [*IMAGES, *CLIPS]),
}
TOKENS_PER_SECOND = 2
"""Of Qwen2.5-VL's checkpoint."""
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Medium:
    """One medium, and what Hugging Face's processor makes of it."""

    item: Item
    array: Any
    inputs: Inputs
    size: MediumSize
    raw: Any
    """The medium itself, as vLLM takes it."""


class Kind:
    """One family under test, and Hugging Face's model of it."""

    def __init__(self, directory: Path, cases: Sequence[str]) -> None:
        import transformers

        torch.set_num_threads(1)
        self.cases = cases
        self.family = families.load(directory)
        self.tokens = self.family.checkpoint.added_tokens
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(directory)
        self.videos = transformers.AutoVideoProcessor.from_pretrained(directory)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self.builder = PromptBuilder(
            directory,
            {modality: self.family.placeholder(modality) for modality in self.family.modalities},
            max_model_len=self.family.context_length,
        )
        settings = EncoderSettings(model=str(directory))
        self.encoder = Encoder(self.family, settings, torch.device("cpu"))

    def medium(self, name: str) -> Medium:
        """``image SEED`` or ``clip SEED FPS``, of noise."""
        seed, *fps = name.split()[1:]
        noise = np.random.default_rng(int(seed))
        return self._clip(name, noise, float(fps[0])) if fps else self._image(name, noise)

    def _image(self, name: str, noise: np.random.Generator) -> Medium:
        shape = (int(noise.integers(60, 200)), 150, 3)
        image = Image.fromarray(noise.integers(0, 256, shape, np.uint8))
        plan = self.family.plan_image(image.height, image.width)
        item = Item("image", name, "uint8", plan.shape, 0, plan.tokens, plan.grid_thw)
        inputs = dict(self.images(image, return_tensors="pt"))
        return Medium(item, fit(image, plan), inputs, MediumSize(plan.tokens, name), image)

    def _clip(self, name: str, noise: np.random.Generator, fps: float) -> Medium:
        clip = noise.integers(0, 256, (int(noise.integers(3, 6)), 150, 220, 3), np.uint8)
        plan = self.family.plan_video(*clip.shape[:3], fps)
        frames = np.stack([fit(Image.fromarray(frame), plan) for frame in clip])
        seconds = plan.second_per_grid
        assert seconds is not None
        item = Item("video", name, "uint8", frames.shape, 0, plan.tokens, plan.grid_thw, seconds)
        inputs = self.videos(
            [torch.from_numpy(frames).permute(0, 3, 1, 2)],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
        timing = {"second_per_grid_ts": torch.tensor([seconds])}
        times = self.family.prompt_times(
            plan.grid_thw, (np.arange(len(frames)) / fps).tolist(), seconds
        )
        text = self.family.prompt_text(plan.grid_thw, times)
        size = MediumSize(plan.tokens, name, text, times)
        inputs = {**inputs, **(timing if self.timed else {})}
        return Medium(item, frames, inputs, size, (frames, _sampled(len(frames), fps)))

    @property
    def timed(self) -> bool:
        return self.family.name == "Qwen2.5-VL"

    def request(self, case: str) -> tuple[Prompt, list[Medium]]:
        """A conversation about some media."""
        media = [self.medium(name) for name in case.split(", ") if name]
        kinds = [f"{medium.item.modality}_url" for medium in media]
        parts = [{"type": kind, kind: {"url": "data:,"}} for kind in kinds]
        content = [*parts, {"type": "text", "text": "What colour is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        request = parse(msgspec.json.encode({"max_tokens": ANSWER, **body}))
        sizes = [medium.size for medium in media]
        return self.builder.build(request, self.builder.render(request), sizes), media

    def raw(self, case: str) -> tuple[str, list[Raw]]:
        """The conversation of `request` as vLLM takes it from others."""
        media = [self.medium(name) for name in case.split(", ") if name]
        parts = [{"type": medium.item.modality} for medium in media]
        content = [*parts, {"type": "text", "text": "What colour is it?"}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text, [(medium.item.modality, medium.raw) for medium in media]

    def encode(self, *requests: Sequence[Medium]) -> list[Media]:
        """What the encoder hands to the engine, from one batch."""
        pairs = [[(medium.item, medium.array) for medium in media] for media in requests]
        return [
            [
                (
                    item,
                    answer.embeddings[item.offset : item.offset + item.nbytes]
                    .view(torch.float32)
                    .view(item.shape),
                )
                for item in answer.ticket.items
            ]
            for answer in self.encoder.encode([laid_out(*media) for media in pairs])
        ]

    @torch.inference_mode()
    def expected(self, prompt: Prompt, media: Sequence[Medium]) -> tuple[str, int]:
        """Hugging Face's greedy answer to the raw media, and how many tokens it has."""
        ids = torch.tensor([prompt.expanded()])
        image, video = self.tokens["<|image_pad|>"], self.tokens["<|video_pad|>"]
        if any(self.outlasts(medium) for medium in media):
            self.model.model.get_rope_index = lambda *_, **__: self.positions(
                ids[0].tolist(), media
            )
        names = dict.fromkeys(name for medium in media for name in medium.inputs)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image).int() + 2 * (ids == video).int(),
            **{
                name: torch.cat([m.inputs[name] for m in media if name in m.inputs])
                for name in names
            },
            do_sample=False,
            max_new_tokens=ANSWER,
        )
        vars(self.model.model).pop("get_rope_index", None)
        drawn = output[0, ids.shape[1] :]
        return whole(self.tokenizer.decode(drawn, skip_special_tokens=True)), len(drawn)

    def outlasts(self, medium: Medium) -> bool:
        """Whether a clip's steps reach further than its height and width, in positions."""
        if medium.size.times:  # every step is a picture of its own
            return False
        steps, rows, columns = medium.item.grid_thw or (1, 1, 1)
        return int((steps - 1) * self.pace(medium)) >= max(rows, columns) // 2

    def pace(self, medium: Medium) -> float:
        """Positions from one step of a clip to the next."""
        seconds = medium.item.second_per_grid or 1.0
        return seconds * TOKENS_PER_SECOND if self.timed else 1.0

    def positions(
        self, ids: Sequence[int], media: Sequence[Medium]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions as Qwen's own model has them, and vLLM: text goes on behind a medium's last.

        transformers 5 lets it go on behind the height and width of a clip, whose last steps then
        lie after the text that follows.
        """
        pads = {self.tokens["<|image_pad|>"], self.tokens["<|video_pad|>"]}
        waiting, found, at, last = iter(media), [], 0, 0
        while at < len(ids):
            if ids[at] in pads:
                medium = next(waiting)
                steps, rows, columns = medium.item.grid_thw or (1, 1, 1)
                here = np.indices((steps, rows // 2, columns // 2)).reshape(3, -1)
                here[0] = (here[0] * self.pace(medium)).astype(np.int64)
            else:
                here = np.zeros((3, 1), np.int64)
            found.append(here + last)
            at, last = at + here.shape[1], int(found[-1].max()) + 1
        return torch.from_numpy(np.concatenate(found, axis=1))[:, None], torch.tensor(
            [[last - len(ids)]]
        )


def _sampled(frames: int, fps: float) -> dict[str, Any]:
    """What vLLM must know of a clip whose frames have been chosen."""
    return {
        "fps": fps,
        "duration": frames / fps,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "do_sample_frames": False,
    }


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    make, cases = KINDS[request.param]
    return Kind(make(tmp_path_factory.mktemp("family") / request.param), cases)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def engine(kind: Kind, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Both ways for embeddings into vLLM, and SGLang."""
    async with started(kind.family, request.param) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def raw_vllm(kind: Kind) -> AsyncIterator[RawVllm]:
    engine = RawVllm(kind.family, each=3)
    await engine.start()
    yield engine
    await engine.stop()


async def test_greedy_tokens_are_those_of_hugging_face(engine: Engine, kind: Kind) -> None:
    """One after another, then all at once from one batch of the encoder."""
    requests = [kind.request(case) for case in kind.cases]
    expected = [kind.expected(prompt, media) for prompt, media in requests]
    assert len({answer for answer, _ in expected}) == len(expected), "media make a difference"
    for case, (prompt, media), answer in zip(kind.cases, requests, expected, strict=True):
        (given,) = kind.encode(media)
        assert said(await collect(engine, prompt, given)) == answer, case

    again = [kind.request(case)[0] for case in kind.cases]
    batch = kind.encode(*(media for _, media in requests))
    answers = await asyncio.gather(
        *(collect(engine, prompt, given) for prompt, given in zip(again, batch, strict=True))
    )
    assert [said(deltas) for deltas in answers] == expected


async def test_vllm_draws_the_same_from_the_media_themselves(raw_vllm: RawVllm, kind: Kind) -> None:
    """One after another, then all at once: what ours is held against is not HF's alone."""
    expected = [kind.expected(*kind.request(case)) for case in kind.cases]
    requests = [kind.raw(case) for case in kind.cases]
    for case, request, answer in zip(kind.cases, requests, expected, strict=True):
        assert await raw_vllm.answer(*request, ANSWER) == answer, case
    answers = await asyncio.gather(*(raw_vllm.answer(*request, ANSWER) for request in requests))
    assert answers == expected


async def test_the_prompt_is_counted_with_every_place(engine: Engine, kind: Kind) -> None:
    prompt, media = kind.request(kind.cases[-1])
    deltas = await collect(engine, prompt, *kind.encode(media))
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == len(prompt.expanded()) == prompt.length


async def test_what_the_engine_must_not_see_leaves_it_alive(engine: Engine, kind: Kind) -> None:
    prompt, media = kind.request(kind.cases[1])
    ((item, tensor),) = kind.encode(media)[0]
    wrong = {
        "narrow": (item.shape[0], tiny.WIDTH - 1),
        "too wide": (item.shape[0], kind.family.embedding_width + tiny.WIDTH),
    }
    for shape in wrong.values():
        with pytest.raises(InvalidValue):
            await collect(
                engine, prompt, [(msgspec.structs.replace(item, shape=shape), torch.zeros(shape))]
            )
    await engine.health()
    assert said(await collect(engine, prompt, [(item, tensor)])) == kind.expected(prompt, media)
