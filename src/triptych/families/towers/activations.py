"""Activation functions by their names in config.json."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, relu, silu

from triptych.families.fields import Activation


def gelu_tanh(hidden: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh."""
    return gelu(hidden, approximate="tanh")


def quick_gelu(hidden: torch.Tensor) -> torch.Tensor:
    """GELU by OpenAI's approximation with a sigmoid."""
    return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
}
