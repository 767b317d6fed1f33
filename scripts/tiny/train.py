"""The training: the vision tower on what every token shows, then conversations as well."""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLForConditionalGeneration

from .batch import IGNORED, Batch
from .data import ALL_TYPES, DENSE_CLASSES, Chats, Collator, one_question
from .forward import encode, hidden_states
from .model import load_weights, new_model, save_weights, write_files
from .optim import Muon, split


@dataclass(frozen=True)
class Settings:
    """What a run is told. It ends after `steps` or `minutes`, whichever comes first."""

    out: Path
    device: torch.device
    steps: int = 12000
    minutes: float = 600.0
    vision_steps: int = 800
    batch: int = 640
    workers: int = 14
    rate: float = 3e-3
    seed: int = 0
    resume: Path | None = None
    """Full-precision weights of an earlier run (its `state.safetensors`) to go on from."""


class Heads(nn.Module):  # type: ignore[misc]  # mypy skips torch
    """Linear readers of a token's embedding, one for each of DENSE_CLASSES; for training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.readers = nn.ModuleDict(
            {name: nn.Linear(width, classes) for name, classes in DENSE_CLASSES.items()}
        )

    def loss(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """Mean cross entropy over all tokens; most show no shape, so those weigh less."""
        total = embeddings.new_zeros((), dtype=torch.float32)
        for index, reader in enumerate(self.readers.values()):
            scores = reader(embeddings).float()
            weights = torch.ones(scores.shape[1], device=scores.device)
            weights[0] = 0.3
            total = total + F.cross_entropy(scores, classes[:, index], weights)
        return total / len(self.readers)


def answer_loss(model: Qwen2_5_VLForConditionalGeneration, states: Tensor, batch: Batch) -> Tensor:
    """Weighted cross entropy of the answers' tokens."""
    chosen = batch.labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    scores = model.lm_head(states.flatten(0, 1)[chosen]).float()
    weights = batch.weights.flatten()[chosen]
    losses = F.cross_entropy(scores, batch.labels.flatten()[chosen], reduction="none")
    return (losses * weights).sum() / weights.sum()


def exact(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> list[bool]:
    """Whether greedy decoding would give each chat's answers exactly.

    It would if, given the right beginning, every next token is the likeliest: no need to generate.
    """
    with torch.no_grad():
        states, _ = hidden_states(model, batch)
    right = model.lm_head(states).argmax(-1).eq(batch.labels) | batch.labels.eq(IGNORED)
    return right.all(1).tolist()  # type: ignore[no-any-return]


def quick_accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    collator: Collator,
    device: torch.device,
    count: int,
    seed: int,
) -> dict[str, list[float]]:
    """Share of exact answers by type: on seen pairs of kind and colour, and on unseen ones."""
    rng = random.Random(seed)
    result: dict[str, list[float]] = defaultdict(list)
    for type_ in ALL_TYPES:
        for unseen in (False, True):
            right: list[bool] = []
            while len(right) < count:
                chats = [one_question(type_, rng, unseen=unseen) for _ in range(min(32, count))]
                right += exact(model, collator.batch(chats, rng).to(device))
            result[type_].append(round(sum(right) / len(right), 4))
    return result


def learning_rate(progress: float, step: int, rate: float) -> float:
    """Warm-up over 150 steps, level for a third of the run, then a cosine to a hundredth."""
    decay = max(0.0, (progress - 0.33) / 0.67)
    return (
        rate
        * min(1.0, (step + 1) / 150)
        * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, decay))))
    )


def train(settings: Settings) -> None:
    """Train; write the checkpoint and `state.safetensors`, to resume from, into `settings.out`."""
    started = time.monotonic()
    device = settings.device
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # it compiles anew for every shape, and nearly all differ
    write_files(settings.out)
    tokenizer_file = str(settings.out / "tokenizer.json")
    model = new_model(settings.out, settings.seed).to(device)
    heads = Heads(model.config.text_config.hidden_size).to(device)
    if settings.resume:
        load_weights(model, settings.resume)
        heads.load_state_dict(load_file(settings.resume.with_suffix(".heads")))
    matrices, others = split(model)
    muon = Muon(matrices)
    cuda = device.type == "cuda"
    adam = torch.optim.AdamW(
        [*others, *heads.parameters()],
        lr=settings.rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=cuda,
    )
    loader = iter(
        DataLoader(
            Chats(tokenizer_file, settings.batch, settings.seed),
            batch_size=None,
            num_workers=settings.workers,
            pin_memory=cuda,
            prefetch_factor=2 if settings.workers else None,
        )
    )
    collator = Collator(Tokenizer.from_file(tokenizer_file))
    log = {"dense": torch.zeros((), device=device), "answers": torch.zeros((), device=device)}
    waited, marked, reported = 0.0, time.monotonic(), 0
    checks = [0.4, 0.7, 1.0]
    for step in range(settings.steps):
        before = time.monotonic()
        batch = next(loader).to(device)
        waited += time.monotonic() - before
        progress = max(step / settings.steps, (time.monotonic() - started) / 60 / settings.minutes)
        rate = learning_rate(progress, step, settings.rate)
        seeing_only = step < settings.vision_steps and not settings.resume
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            if seeing_only:
                encoded = [encode(model, g.pixels, noise=True) for g in batch.groups]
                answers = torch.zeros((), device=device)
            else:
                states, encoded = hidden_states(model, batch, noise=True)
                answers = answer_loss(model, states, batch)
            dense = heads.loss(
                torch.cat([e.flatten(0, 1) for e in encoded]),
                torch.cat([g.dense.flatten(0, 1) for g in batch.groups]),
            )
        (answers + 0.5 * dense).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        muon.step(rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        model.zero_grad()
        heads.zero_grad()
        log["dense"] += dense.detach()
        log["answers"] += answers.detach()
        finished = progress >= 1.0 or step + 1 == settings.steps
        if (step + 1) % 100 == 0 or finished:
            count, now = step + 1 - reported, time.monotonic()
            means = "  ".join(f"{name} {value.item() / count:.4f}" for name, value in log.items())
            print(
                f"step {step + 1}  {(now - started) / 60:.1f} min  {means}  rate {rate:.5f}  "
                f"{count / (now - marked):.1f} steps/s  "
                f"waiting for data {waited / (now - marked):.0%}",
                flush=True,
            )
            for value in log.values():
                value.zero_()
            waited, marked, reported = 0.0, now, step + 1
        if progress >= checks[0] or finished:
            checks = [c for c in checks if c > progress] or [2.0]
            save(model, heads, settings.out)
            accuracy = quick_accuracy(model, collator, device, 64 if cuda else 16, seed=99)
            print(json.dumps(accuracy), flush=True)
        if finished:
            break


def save(model: Qwen2_5_VLForConditionalGeneration, heads: Heads, out: Path) -> None:
    """Write the checkpoint in bfloat16, and all of it in float32 to resume from."""
    save_weights(model, out / "model.safetensors", torch.bfloat16)
    save_weights(model, out / "state.safetensors", torch.float32)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()},
        out / "state.heads",
    )
