"""Muon for the matrices inside the blocks, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, by Newton-Schulz; shape (n, rows, columns)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon:
    """Momentum whose step is made orthogonal, and as long as a step of AdamW would be."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        """Matrices of one shape are stepped together."""
        shapes: defaultdict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            shapes[tuple(parameter.shape)].append(parameter)
        self.groups = list(shapes.values())
        self.momentum, self.decay = momentum, decay
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    def step(self, rate: float) -> None:
        """One step at this learning rate; parameters without a gradient stay."""
        with torch.no_grad():
            for group, buffer in zip(self.groups, self.buffers, strict=True):
                if group[0].grad is None:
                    continue
                gradient = torch.stack(
                    [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
                )
                buffer.lerp_(gradient, 1 - self.momentum)
                update = orthogonal(gradient.lerp(buffer, self.momentum))
                update *= 0.2 * max(update.shape[1:]) ** 0.5
                torch._foreach_mul_(group, 1 - rate * self.decay)
                torch._foreach_add_(group, list(update.unbind()), alpha=-rate)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The model's parameters for Muon and for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = any(part in name for part in (".blocks.", ".layers.", ".merger.mlp", "projector."))
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return matrices, others
