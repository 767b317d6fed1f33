"""Batches for Qwen2-Audio: sounds filled up with silence to one of two lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from .audio import TOKEN
from .batch import Batch, Group
from .chats import Chat
from .rows import ChatWriter, Row, Rows
from .tone_questions import random_sound_chat
from .tones import MAX_TONES, PITCHES, RATE, Sound, integers, synthesise

Classes = NDArray[np.int64]

SHORT = (24, 32, 48, 64)
LONG = (112, 112, 112, 192)
"""Tokens of the two lengths; the longest sound of all has fewer than 112."""
DENSE_CLASSES = {"pitch": len(PITCHES) + 1, "number": MAX_TONES + 1, "begins": 2}
"""What the tower learns of every token: which tone sounds, the how manieth, whether it begins."""


def dense_classes(sound: Sound, tokens: int) -> Classes:
    """The classes of DENSE_CLASSES for every token, 0 for none, shape (tokens, 3)."""
    classes = np.zeros((tokens, len(DENSE_CLASSES)), np.int64)
    for number, tone in enumerate(sound.tones, 1):
        first, last = (round(at * RATE / TOKEN) for at in (tone.start, tone.end))
        classes[first:last, 0] = PITCHES.index(tone.pitch) + 1
        classes[first:last, 1] = number
        classes[first, 2] = 1
    return classes


class Collator:
    """Turns conversations into batches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Use this tokenizer, one of `audio.write_files`."""
        self.writer = ChatWriter(tokenizer)
        ids = self.writer.ids
        self.audio, self.begin, self.end = (
            ids[token] for token in ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
        )

    def batch(self, chats: list[Chat], rng: random.Random) -> Batch:
        """One batch; a sound is as long as the first of two lengths that it fits, or the second."""
        lengths = (rng.choice(SHORT), rng.choice(LONG))
        waves: dict[int, list[NDArray[np.int16]]] = {length: [] for length in lengths}
        dense: dict[int, list[Classes]] = {length: [] for length in lengths}
        places: dict[int, list[tuple[int, int]]] = {length: [] for length in lengths}
        rows: list[Row] = []
        for chat in chats:

            def place(row: Row, index: int, chat: Chat = chat) -> None:
                sound = chat.media[index]
                assert isinstance(sound, Sound)
                fits = sound.seconds * RATE <= lengths[0] * TOKEN and rng.random() < 0.9
                tokens = lengths[0] if fits else lengths[1]
                row.say(f"Audio {index + 1}: ")
                row.tokens(self.begin)
                places[tokens].append((len(rows), row.column))
                row.tokens(*[self.audio] * tokens, self.end)
                row.say("\n")
                waves[tokens].append(integers(synthesise(sound, tokens * TOKEN / RATE)))
                dense[tokens].append(dense_classes(sound, tokens))

            rows.append(self.writer.row(chat, place))
        padded = Rows.of(rows)
        groups = [
            Group(
                torch.from_numpy(np.stack(waves[length])),
                padded.slots(places[length], length),
                torch.from_numpy(np.stack(dense[length])),
            )
            for length in lengths
            if waves[length]
        ]
        types = [chat.turns[-1].type for chat in chats]
        return Batch(padded.ids, padded.positions, padded.labels, padded.weights, groups, types)


class Chats(IterableDataset[Batch]):  # type: ignore[misc]  # mypy skips torch
    """Endless batches of random conversations, different in every worker."""

    def __init__(self, tokenizer_file: str, size: int, seed: int) -> None:
        """Batches of `size` conversations."""
        self.tokenizer_file, self.size, self.seed = tokenizer_file, size, seed

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this worker."""
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        collator = Collator(Tokenizer.from_file(self.tokenizer_file))
        while True:
            yield collator.batch([random_sound_chat(rng) for _ in range(self.size)], rng)
