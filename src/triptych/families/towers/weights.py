"""Fills a tower from a checkpoint's safetensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from triptych.errors import ConfigurationError
from triptych.families.checkpoint import Checkpoint

logger = logging.getLogger("triptych.families")

SCALE = "_scale_inv"
"""Behind the name of a quantised weight: the name of its scales."""
BLOCK = (128, 128)
"""Rows and columns of a quantised weight that have one scale, where config.json does not say."""

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
        ConfigurationError: A weight is missing, of another shape, or not floating point; or it is
            FP8 and its scales are missing or of another shape.
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
    scales = {name + SCALE for name in expected} & present
    if extra := {n for n in present - set(expected) - scales if not n.startswith(unused)}:
        logger.warning("%s: weights not used: %s", checkpoint.path, ", ".join(sorted(extra)))
    found = dict(checkpoint.tensors(prefix + name for name in scales))
    weights = {}
    for name, tensor in checkpoint.tensors(prefix + name for name in expected):
        wanted = expected[name.removeprefix(prefix)].shape
        if tensor.shape != wanted or not tensor.is_floating_point():
            raise ConfigurationError(
                f"the weight {name!r} of {checkpoint.path} must be floating point of shape "
                f"{tuple(wanted)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.element_size() == 1:
            tensor = dequantised(tensor, found.get(name + SCALE), name, checkpoint)
        # A copy even where nothing changes: the file may be replaced while it is mapped.
        weights[name.removeprefix(prefix)] = tensor.to(device, dtype, copy=True)
    module.load_state_dict(weights, assign=True)
    module.to(device).eval().requires_grad_(False)
    return module


def dequantised(
    weight: torch.Tensor, scales: torch.Tensor | None, name: str, checkpoint: Checkpoint
) -> torch.Tensor:
    """An FP8 weight as float32: each block of it times the block's scale.

    Args:
        weight: Shape (rows, columns), one byte an element.
        scales: One a block of ``quantization_config.weight_block_size``, which is how DeepSeek
            and Qwen write FP8 checkpoints; they call them inverse, and multiply by them.
        name: Of the weight.
        checkpoint: Whose.

    Raises:
        ConfigurationError: There are no scales, or they are not as many as the blocks.
    """
    quantisation = checkpoint.config.get("quantization_config") or {}
    block = quantisation.get("weight_block_size") or BLOCK
    if scales is None or weight.ndim != 2:
        raise ConfigurationError(
            f"the weight {name!r} of {checkpoint.path} is {weight.dtype} of shape "
            f"{tuple(weight.shape)}, and only matrices with {name + SCALE!r} are served so"
        )
    blocks = tuple(-(-extent // size) for extent, size in zip(weight.shape, block, strict=True))
    if tuple(scales.shape) != blocks:
        raise ConfigurationError(
            f"the weight {name + SCALE!r} of {checkpoint.path} must be of shape {blocks}, one a "
            f"block of {tuple(block)}, got {tuple(scales.shape)}"
        )
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]
