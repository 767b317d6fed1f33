"""The training: the tower on what every token shows, then conversations as well."""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batch import IGNORED, Batch
from .checkpoint import load_weights, save_weights
from .language import hidden_states
from .optim import Muon, split
from .recipes import Recipe


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
    begin_with: Path | None = None
    """The checkpoint whose language model a new model takes over."""
    state: Path | None = None
    """Where to keep the full-precision weights; by default `state.safetensors` in `out`."""
    vision_share: float = 1.0
    """The share of the run that the tower's own steps take at most."""
    started: float = field(default_factory=time.monotonic)
    """When the minutes began."""


class Heads(nn.Module):  # type: ignore[misc]  # mypy skips torch
    """Linear readers of a token's embedding, one for each kind of classes; for training alone."""

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.readers = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in classes.items()}
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


def answer_loss(model: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """Weighted cross entropy of the answers' tokens."""
    chosen = batch.labels.flatten().ne(IGNORED).nonzero().squeeze(1)
    scores = model.lm_head(states.flatten(0, 1)[chosen]).float()
    weights = batch.weights.flatten()[chosen]
    losses = F.cross_entropy(scores, batch.labels.flatten()[chosen], reduction="none")
    return (losses * weights).sum() / weights.sum()


def exact(recipe: Recipe, model: nn.Module, batch: Batch) -> list[bool]:
    """Whether greedy decoding would give each chat's answers exactly.

    It would if, given the right beginning, every next token is the likeliest: no need to generate.
    """
    with torch.no_grad():
        encoded = [recipe.encode(model, group.inputs, noise=False) for group in batch.groups]
        states = hidden_states(model.model.language_model, batch, encoded)
    right = model.lm_head(states).argmax(-1).eq(batch.labels) | batch.labels.eq(IGNORED)
    return right.all(1).tolist()  # type: ignore[no-any-return]


def quick_accuracy(
    recipe: Recipe, model: nn.Module, tokenizer: Tokenizer, device: torch.device, count: int
) -> dict[str, list[float]]:
    """Share of exact answers by type: on seen combinations, and on unseen ones."""
    rng = random.Random(99)
    result: dict[str, list[float]] = defaultdict(list)
    for type_ in recipe.types:
        for unseen in (False, True):
            right: list[bool] = []
            while len(right) < count:
                size = min(32, count)
                chats = [recipe.one_question(type_, rng, unseen=unseen) for _ in range(size)]
                batch = recipe.collate(tokenizer, chats, rng).to(device)
                right += exact(recipe, model, batch)
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


def train(recipe: Recipe, settings: Settings) -> None:
    """Train; write the checkpoint, and the full-precision state to resume from."""
    device = settings.device
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # it compiles anew for every shape, and nearly all differ
    recipe.write_files(settings.out)
    tokenizer_file = str(settings.out / "tokenizer.json")
    loader = iter(
        DataLoader(
            recipe.chats(tokenizer_file, settings.batch, settings.seed),
            batch_size=None,
            num_workers=settings.workers,
            pin_memory=cuda,
            prefetch_factor=2 if settings.workers else None,
        )
    )
    model, heads = _model(recipe, settings)
    matrices, others = split(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [*others, *heads.parameters()],
        lr=settings.rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=cuda,
    )
    log = Log(device)
    checks = [0.3, 0.5, 0.7, 0.85, 0.95]
    for step in range(settings.steps):
        batch = log.wait(lambda: next(loader)).to(device)
        elapsed = (time.monotonic() - settings.started) / 60
        progress = max(step / settings.steps, elapsed / settings.minutes)
        rate = learning_rate(progress, step, settings.rate)
        seeing_only = (
            step < settings.vision_steps
            and progress < settings.vision_share
            and not settings.resume
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            dense, answers = losses(recipe, model, heads, batch, seeing_only=seeing_only)
        (answers + 0.5 * dense).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        muon.step(rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        model.zero_grad()
        heads.zero_grad()
        log.add(dense, answers)
        finished = progress >= 1.0 or step + 1 == settings.steps
        if (step + 1) % 100 == 0 or finished:
            log.report(step + 1, elapsed, rate)
        if progress >= checks[0] or finished:
            checks = [c for c in checks if c > progress] or [2.0]
            save(recipe, model, heads, settings)
        if finished:
            break
    tokenizer = Tokenizer.from_file(tokenizer_file)
    accuracy = quick_accuracy(recipe, model, tokenizer, device, 64 if cuda else 16)
    print(json.dumps(accuracy), flush=True)


def losses(
    recipe: Recipe, model: nn.Module, heads: Heads, batch: Batch, *, seeing_only: bool
) -> tuple[Tensor, Tensor]:
    """What the tower errs in, and what the answers do; nought where there is nothing to learn."""
    encoded = [recipe.encode(model, group.inputs, noise=True) for group in batch.groups]
    dense = answers = torch.zeros((), device=batch.ids.device)
    if encoded:
        dense = heads.loss(
            torch.cat([e.flatten(0, 1) for e in encoded]),
            torch.cat([group.dense.flatten(0, 1) for group in batch.groups]),
        )
    if not seeing_only:
        states = hidden_states(model.model.language_model, batch, encoded)
        answers = answer_loss(model, states, batch)
    return dense, answers


class Log:
    """Mean losses and speeds, every now and then."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)
        self.waited, self.marked, self.reported = 0.0, time.monotonic(), 0

    def wait(self, get: Callable[[], Batch]) -> Batch:
        """A batch; the wait for it counts."""
        before = time.monotonic()
        batch = get()
        self.waited += time.monotonic() - before
        return batch

    def add(self, dense: Tensor, answers: Tensor) -> None:
        """One step's losses."""
        self.sums += torch.stack([dense.detach(), answers.detach()])

    def report(self, step: int, minutes: float, rate: float) -> None:
        """Print the means since the last report."""
        count, now = step - self.reported, time.monotonic()
        dense, answers = (self.sums / count).tolist()
        print(
            f"step {step}  {minutes:.1f} min  dense {dense:.4f}  answers {answers:.4f}  "
            f"rate {rate:.5f}  {count / (now - self.marked):.1f} steps/s  "
            f"waiting for data {self.waited / (now - self.marked):.0%}",
            flush=True,
        )
        self.sums.zero_()
        self.waited, self.marked, self.reported = 0.0, now, step


def save(recipe: Recipe, model: nn.Module, heads: Heads, settings: Settings) -> None:
    """Write the checkpoint in bfloat16, and all of it in float32 to resume from."""
    save_weights(model, settings.out / "model.safetensors", torch.bfloat16, recipe.hub_name)
    state = settings.state or settings.out / "state.safetensors"
    save_weights(model, state, torch.float32, recipe.hub_name)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()},
        state.with_suffix(".heads"),
    )


def _model(recipe: Recipe, settings: Settings) -> tuple[nn.Module, Heads]:
    """New, or as an earlier run left them."""
    model = recipe.new_model(settings.out, settings.seed)
    heads = Heads(model.config.text_config.hidden_size, recipe.dense_classes)
    if settings.begin_with:
        recipe.begin_with(model, settings.begin_with)
    if settings.resume:
        load_weights(model, settings.resume, recipe.hub_name)
        heads.load_state_dict(load_file(settings.resume.with_suffix(".heads")))
    return model.to(settings.device), heads.to(settings.device)
