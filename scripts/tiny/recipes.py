"""What differs from model to model in training: files, tower, data."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from . import audio, audio_data, data, forward, llava, llava_data, model
from .batch import Batch
from .chats import DEFAULT_SYSTEM, Chat, Media, Turn
from .checkpoint import llava_hub_name
from .clips import CLIP_TYPES, clip_example
from .examples import example, video_example
from .questions import IMAGE_TYPES, LLAVA_TYPES, PAIR_TYPES, VIDEO_TYPES, Question
from .tone_questions import SOUND_PAIR_TYPES, SOUND_TYPES, sound_example


class Recipe(ABC):
    """One model."""

    types: ClassVar[tuple[str, ...]]
    """The types of question that it learns."""
    dense_classes: ClassVar[Mapping[str, int]]
    """How many classes of each kind its tower learns of every token."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Write the checkpoint's files but the weights."""

    @abstractmethod
    def new_model(self, folder: Path, seed: int) -> nn.Module:
        """Transformers' model with random weights, by the folder's files."""

    def hub_name(self, name: str) -> str:
        """A parameter's name in the hub's checkpoints, from its name in transformers 5."""
        return llava_hub_name(name)

    def begin_with(self, model: nn.Module, folder: Path) -> None:
        """Take over the language model of another checkpoint."""
        raise ValueError("this model begins with nothing but random weights")

    @abstractmethod
    def encode(self, model: nn.Module, inputs: Tensor, *, noise: bool) -> Tensor:
        """Embeddings (media, tokens, hidden) of a `Group`'s inputs."""

    @abstractmethod
    def chats(self, tokenizer_file: str, size: int, seed: int) -> IterableDataset[Batch]:
        """Endless batches of about `size` conversations."""

    @abstractmethod
    def collate(self, tokenizer: Tokenizer, chats: list[Chat], rng: random.Random) -> Batch:
        """A batch of these conversations."""

    @abstractmethod
    def example(
        self, type_: str, rng: random.Random, *, unseen: bool
    ) -> tuple[list[Media], Question]:
        """Media and a question of this type."""

    def one_question(self, type_: str, rng: random.Random, *, unseen: bool = False) -> Chat:
        """A conversation of one question of this type, as the evaluation asks it."""
        media, asked = self.example(type_, rng, unseen=unseen)
        turn = Turn([*range(len(media)), asked.text], asked.answer, type_)
        return Chat(DEFAULT_SYSTEM, media, [turn])


class QwenVL(Recipe):
    """Qwen2.5-VL: pictures, two pictures, videos."""

    types = IMAGE_TYPES + PAIR_TYPES + VIDEO_TYPES
    dense_classes = data.DENSE_CLASSES

    def write_files(self, folder: Path) -> None:
        """See Recipe."""
        model.write_files(folder)

    def new_model(self, folder: Path, seed: int) -> nn.Module:
        """See Recipe."""
        return model.new_model(folder, seed)

    def hub_name(self, name: str) -> str:
        """See Recipe."""
        return model.hub_name(name)

    def encode(self, model: nn.Module, inputs: Tensor, *, noise: bool) -> Tensor:
        """See Recipe."""
        return forward.encode(model, inputs, noise)

    def chats(self, tokenizer_file: str, size: int, seed: int) -> IterableDataset[Batch]:
        """See Recipe."""
        return data.Chats(tokenizer_file, size, seed)

    def collate(self, tokenizer: Tokenizer, chats: list[Chat], rng: random.Random) -> Batch:
        """See Recipe."""
        return data.Collator(tokenizer).batch(chats, rng)

    def example(
        self, type_: str, rng: random.Random, *, unseen: bool
    ) -> tuple[list[Media], Question]:
        """See Recipe."""
        if type_ in VIDEO_TYPES:
            video, asked = video_example(type_, rng, unseen=unseen)
            return [video], asked
        scenes, asked = example(type_, rng, unseen=unseen)
        return [*scenes], asked


class Llava(Recipe):
    """LLaVA-1.5: pictures, two pictures."""

    types = LLAVA_TYPES
    dense_classes = data.DENSE_CLASSES
    video = False

    def write_files(self, folder: Path) -> None:
        """See Recipe."""
        llava.write_files(folder, video=self.video)

    def new_model(self, folder: Path, seed: int) -> nn.Module:
        """See Recipe."""
        return llava.new_model(folder, seed, video=self.video)

    def begin_with(self, model: nn.Module, folder: Path) -> None:
        """See Recipe; of a tiny Qwen2.5-VL."""
        llava.begin_with(model, folder)

    def encode(self, model: nn.Module, inputs: Tensor, *, noise: bool) -> Tensor:
        """See Recipe."""
        return llava.encode(model, inputs, noise, video=self.video)

    def chats(self, tokenizer_file: str, size: int, seed: int) -> IterableDataset[Batch]:
        """See Recipe."""
        return llava_data.Chats(tokenizer_file, size, seed, video=self.video)

    def collate(self, tokenizer: Tokenizer, chats: list[Chat], rng: random.Random) -> Batch:
        """See Recipe."""
        return llava_data.Collator(tokenizer).batch(chats, rng)

    def example(
        self, type_: str, rng: random.Random, *, unseen: bool
    ) -> tuple[list[Media], Question]:
        """See Recipe."""
        scenes, asked = example(type_, rng, unseen=unseen)
        return [*scenes], asked


class LlavaNextVideo(Llava):
    """LLaVA-NeXT-Video: clips."""

    types = CLIP_TYPES
    video = True

    def example(
        self, type_: str, rng: random.Random, *, unseen: bool
    ) -> tuple[list[Media], Question]:
        """See Recipe; there is nothing unseen."""
        clip, asked = clip_example(type_, rng)
        return [clip], asked


class Qwen2Audio(Recipe):
    """Qwen2-Audio: sounds, two sounds."""

    types = SOUND_TYPES + SOUND_PAIR_TYPES
    dense_classes = audio_data.DENSE_CLASSES

    def write_files(self, folder: Path) -> None:
        """See Recipe."""
        audio.write_files(folder)

    def new_model(self, folder: Path, seed: int) -> nn.Module:
        """See Recipe."""
        return audio.new_model(folder, seed)

    def encode(self, model: nn.Module, inputs: Tensor, *, noise: bool) -> Tensor:
        """See Recipe; the sounds bring noise of their own."""
        return audio.encode(model, inputs)

    def chats(self, tokenizer_file: str, size: int, seed: int) -> IterableDataset[Batch]:
        """See Recipe."""
        return audio_data.Chats(tokenizer_file, size, seed)

    def collate(self, tokenizer: Tokenizer, chats: list[Chat], rng: random.Random) -> Batch:
        """See Recipe."""
        return audio_data.Collator(tokenizer).batch(chats, rng)

    def example(
        self, type_: str, rng: random.Random, *, unseen: bool
    ) -> tuple[list[Media], Question]:
        """See Recipe."""
        sounds, asked = sound_example(type_, rng, unseen=unseen)
        return [*sounds], asked


RECIPES: dict[str, Recipe] = {
    "qwen2.5-vl": QwenVL(),
    "llava": Llava(),
    "llava-next-video": LlavaNextVideo(),
    "qwen2-audio": Qwen2Audio(),
}
