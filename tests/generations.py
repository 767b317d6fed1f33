"""Prompts with their media, as preprocess and the encoder would hand them to an engine."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from triptych.contract import GridTHW, Prompt, PromptItem, Sampling, TicketItem
from triptych.engines.base import Delta, Engine, Media
from triptych.families import Family

_NUMBERS = itertools.count()


def generation(
    family: Family,
    token_ids: Sequence[int],
    embeddings: Sequence[torch.Tensor] = (),
    grids: Sequence[GridTHW] = (),
    **sampling: Any,
) -> tuple[Prompt, Media]:
    """What `Engine.generate` takes.

    Args:
        family: Says which token is the placeholder.
        token_ids: With one placeholder a picture.
        embeddings: Of the pictures, each (tokens, width).
        grids: Of the pictures.
        sampling: Fields of `Sampling`; greedy and 16 tokens unless given.
    """
    placeholder = family.checkpoint.added_tokens[family.placeholder("image")]
    positions = [index for index, token in enumerate(token_ids) if token == placeholder]
    media = [
        (
            TicketItem(
                modality="image",
                hash=hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
                dtype="float32",
                shape=tuple(tensor.shape),
                offset=0,
                grid_thw=grid,
            ),
            tensor,
        )
        for tensor, grid in zip(embeddings, grids, strict=True)
    ]
    prompt = Prompt(
        id=f"chatcmpl-{next(_NUMBERS)}",
        created=0,
        model="tiny",
        token_ids=list(token_ids),
        items=[
            PromptItem("image", position, item.shape[0], item.hash)
            for position, (item, _) in zip(positions, media, strict=True)
        ],
        sampling=Sampling(**{"max_tokens": 16, "temperature": 0.0, **sampling}),
    )
    return prompt, media


def picture(family: Family, seed: int, rows: int = 8, columns: int = 6) -> tuple[Any, GridTHW]:
    """Made-up embeddings of a picture of ``rows`` × ``columns`` patches, and its grid."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows * columns // 4, family.embedding_width, generator=made), (
        1,
        rows,
        columns,
    )


def changed(prompt: Prompt, **sampling: Any) -> Prompt:
    """The same prompt as another generation, drawn otherwise."""
    return msgspec.structs.replace(
        prompt,
        id=f"chatcmpl-{next(_NUMBERS)}",
        sampling=msgspec.structs.replace(prompt.sampling, **sampling),
    )


async def collect(engine: Engine, prompt: Prompt, media: Media = ()) -> list[Delta]:
    """All the deltas of a generation."""
    return [delta async for delta in engine.generate(prompt, media)]


def text(deltas: Sequence[Delta]) -> str:
    """The whole answer."""
    return "".join(delta.text for delta in deltas)


def said(deltas: Sequence[Delta]) -> tuple[str, int]:
    """The answer up to its last whole character, and how many tokens it has."""
    assert deltas[-1].usage is not None
    return whole(text(deltas)), deltas[-1].usage.completion_tokens


def whole(answer: str) -> str:
    """Without the end of a character that never came, which engines hold back."""
    return answer.rstrip("\N{REPLACEMENT CHARACTER}")
