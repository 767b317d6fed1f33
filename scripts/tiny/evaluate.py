"""The evaluation, through transformers' own processors and greedy generation in float32."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image

from .chats import Media
from .clips import CLIP_TYPES
from .questions import VideoScene
from .recipes import RECIPES
from .scenes import Scene, draw
from .tones import RATE, Sound, integers, synthesise

FRAMES = 6
VIDEO_FPS = 2.0


def random_size(rng: random.Random, most: int = 280) -> tuple[int, int]:
    """Width and height from 84 pixels on; one picture in five is larger than the model's limit."""
    if rng.random() < 0.2:
        return rng.choice(((512, 512), (640, 480), (480, 640), (800, 600), (1024, 768)))
    width = rng.randint(84, most)
    return width, min(most, max(84, round(width * rng.uniform(0.6, 1.7))))


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        text: The question.
        answer: The right answer.
        kind: Of part in the conversation that stands for one medium.
        media: How many media it is about.
        arguments: The processor's, lists all.
    """

    text: str
    answer: str
    kind: str
    media: int
    arguments: Mapping[str, list[Any]]


class Subject(ABC):
    """A checkpoint under evaluation."""

    model_class: ClassVar[str]
    splits: ClassVar[tuple[str, str]] = ("held_out_pictures", "held_out_combinations")
    """Fresh media, and such of combinations that the training never showed."""
    without_combinations: ClassVar[frozenset[str]] = frozenset()
    """Types of question that have no such combinations."""
    batch: ClassVar[int] = 1
    """Questions that are answered together."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """What the processor is told whatever the media are."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load it."""
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        model = getattr(transformers, self.model_class)
        self.model = model.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        if hasattr(self.processor, "image_processor"):
            # Pillow's bicubic, as the training used; the other backend's is close, not the same.
            self.processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil"
            )

    @abstractmethod
    def inputs(
        self, media: Sequence[Media], rng: random.Random
    ) -> tuple[str, Mapping[str, list[Any]]]:
        """The kind of part that stands for one of the media, and the processor's arguments."""

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """The answers to some questions, decoded greedily."""
        turns = []
        for question in asked:
            kind = {"type": question.kind}
            content = [*[kind] * question.media, {"type": "text", "text": question.text}]
            turns.append([{"role": "user", "content": content}])
        prompts = [
            self.processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True)
            for t in turns
        ]
        arguments = {
            name: [value for question in asked for value in question.arguments[name]]
            for name in asked[0].arguments
        }
        inputs = self.processor(
            text=prompts, return_tensors="pt", padding=True, **arguments, **self.fixed
        ).to(self.model.device)
        generated = self.model.generate(**inputs, max_new_tokens=120, do_sample=False)
        drawn = generated[:, inputs["input_ids"].shape[1] :]
        decoded = self.processor.tokenizer.batch_decode(drawn, skip_special_tokens=True)
        return [str(text) for text in decoded]


class Pictures(Subject):
    """LLaVA-1.5."""

    model_class = "LlavaForConditionalGeneration"
    batch = 10

    def inputs(
        self, media: Sequence[Media], rng: random.Random
    ) -> tuple[str, Mapping[str, list[Any]]]:
        """Pictures of any size."""
        scenes = [scene for scene in media if isinstance(scene, Scene)]
        pictures = [draw(s, random_size(rng), smooth=rng.choice((1, 2))) for s in scenes]
        return "image", {"images": pictures}


class PicturesAndVideos(Pictures):
    """Qwen2.5-VL."""

    model_class = "Qwen2_5_VLForConditionalGeneration"
    batch = 1

    def inputs(
        self, media: Sequence[Media], rng: random.Random
    ) -> tuple[str, Mapping[str, list[Any]]]:
        """Pictures, or a video."""
        if not isinstance(media[0], VideoScene):
            return super().inputs(media, rng)
        metadata = {
            "fps": VIDEO_FPS,
            "total_num_frames": FRAMES,
            "frames_indices": list(range(FRAMES)),
        }
        return "video", {"videos": [frames(media[0], FRAMES, rng)], "video_metadata": [metadata]}


class Clips(Subject):
    """LLaVA-NeXT-Video."""

    model_class = "LlavaNextVideoForConditionalGeneration"
    splits = ("held_out_clips", "held_out_combinations")
    without_combinations = frozenset(CLIP_TYPES)

    def inputs(
        self, media: Sequence[Media], rng: random.Random
    ) -> tuple[str, Mapping[str, list[Any]]]:
        """A clip of 4 to 8 frames."""
        (clip,) = media
        assert isinstance(clip, VideoScene)
        pixels = np.stack([np.asarray(f) for f in frames(clip, rng.randint(4, 8), rng)])
        return "video", {"videos": [torch.from_numpy(pixels).permute(0, 3, 1, 2)]}


class Sounds(Subject):
    """Qwen2-Audio."""

    model_class = "Qwen2AudioForConditionalGeneration"
    splits = ("held_out_sounds", "held_out_orders")
    without_combinations = frozenset({"tone_pitch"})
    fixed: ClassVar[Mapping[str, Any]] = {"sampling_rate": RATE}

    def inputs(
        self, media: Sequence[Media], rng: random.Random
    ) -> tuple[str, Mapping[str, list[Any]]]:
        """Sounds as a WAV file holds them."""
        sounds = [sound for sound in media if isinstance(sound, Sound)]
        waves = [integers(synthesise(sound)).astype(np.float32) / 32768 for sound in sounds]
        return "audio", {"audio": waves}


SUBJECTS: dict[str, type[Subject]] = {
    "qwen2.5-vl": PicturesAndVideos,
    "llava": Pictures,
    "llava-next-video": Clips,
    "qwen2-audio": Sounds,
}


def frames(video: VideoScene, count: int, rng: random.Random) -> list[Image.Image]:
    """A video's frames, at some size."""
    size = (rng.randint(84, 196), rng.randint(84, 196))
    return [draw(scene, size) for scene in video.frames(count)]


def evaluate(
    model: str,
    folder: Path,
    device: torch.device,
    *,
    types: Sequence[str] = (),
    count: int = 200,
    seed: int = 0,
    write: Path | None = None,
) -> dict[str, Any]:
    """Accuracy by question type, printed and if asked for written; exact answers alone count.

    Args:
        model: Which model it is, one of SUBJECTS.
        folder: The checkpoint.
        device: Where to run it.
        types: Which types of question; by default all.
        count: Questions of each type and split.
        seed: Of the media; those of the training come from other streams of random numbers.
        write: The JSON file to write.

    Returns:
        For each type and each of the subject's splits the accuracy, and the majority baseline: the
        share of the commonest answer.
    """
    subject = SUBJECTS[model](folder, device)
    recipe = RECIPES[model]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for type_ in types or recipe.types:
        result[type_] = {}
        for split in subject.splits[: 1 if type_ in subject.without_combinations else 2]:
            rng = random.Random(f"evaluation {seed} {type_} {split}")
            asked = []
            for _ in range(count):
                media, question = recipe.example(type_, rng, unseen=split == subject.splits[1])
                kind, arguments = subject.inputs(media, rng)
                asked.append(Asked(question.text, question.answer, kind, len(media), arguments))
            right = 0
            for first in range(0, count, subject.batch):
                some = asked[first : first + subject.batch]
                for one, got in zip(some, subject.answers(some), strict=True):
                    right += got == one.answer
                    if got != one.answer:
                        print(f"  {type_}: {one.text!r} wants {one.answer!r}, got {got!r}")
            answers = Counter(one.answer for one in asked)
            result[type_][split] = {
                "accuracy": round(right / count, 4),
                "majority_baseline": round(answers.most_common(1)[0][1] / count, 4),
            }
        print(type_, json.dumps(result[type_]), flush=True)
    report = {"questions_per_type_and_split": count, "seed": seed, "types": result}
    if write:
        write.write_text(json.dumps(report, indent=2) + "\n")
    return report
