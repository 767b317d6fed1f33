"""Fills a tower from a checkpoint's safetensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from triptych.errors import ConfigurationError
from triptych.families.checkpoint import Checkpoint

logger = logging.getLogger("triptych.families")

ModuleType = TypeVar("ModuleType", bound=torch.nn.Module)


def load_weights(
    build: Callable[[], ModuleType],
    checkpoint: Checkpoint,
    *,
    prefixes: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    unused: tuple[str, ...] = (),
) -> ModuleType:
    """A module with the weights that the checkpoint has for it, and nothing else read.

    Args:
        build: Makes the module. It runs with the meta device as the default, so parameters cost
            nothing; a buffer that is computed must name its device.
        checkpoint: Where the weights are.
        prefixes: What the weights' names may start with; the first that the checkpoint has counts.
        device: Where the module goes.
        dtype: Of the parameters. Buffers keep theirs.
        unused: What the names of weights that the module does without may start with, behind the
            prefix; others that it does without are logged.

    Returns:
        The module in evaluation mode; its parameters ask for no gradient.

    Raises:
        ConfigurationError: A weight is missing, of another shape, or not floating point.
    """
    with torch.device("meta"):
        module = build()
    prefix = next((prefix for prefix in prefixes if checkpoint.names(prefix)), None)
    if prefix is None:
        raise ConfigurationError(
            f"the checkpoint {checkpoint.path} has no weights under {' or '.join(prefixes)}"
        )
    expected = module.state_dict()
    present = {name.removeprefix(prefix) for name in checkpoint.names(prefix)}
    if extra := {name for name in present - set(expected) if not name.startswith(unused)}:
        logger.warning("%s: weights not used: %s", checkpoint.path, ", ".join(sorted(extra)))
    weights = {}
    for name, tensor in checkpoint.tensors(prefix + name for name in expected):
        wanted = expected[name.removeprefix(prefix)].shape
        if tensor.shape != wanted or not tensor.is_floating_point():
            raise ConfigurationError(
                f"the weight {name!r} of {checkpoint.path} must be floating point of shape "
                f"{tuple(wanted)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        # A copy even where nothing changes: the file may be replaced while it is mapped.
        weights[name.removeprefix(prefix)] = tensor.to(device, dtype, copy=True)
    module.load_state_dict(weights, assign=True)
    module.to(device).eval().requires_grad_(False)
    return module
