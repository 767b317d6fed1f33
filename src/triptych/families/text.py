"""The little that a family must know of its language model, read from config.json."""

from __future__ import annotations

import msgspec

from triptych.families.checkpoint import Checkpoint
from triptych.families.fields import Positive, read_config

DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "max_position_embeddings": 2048},
    "mistral": {"hidden_size": 4096, "max_position_embeddings": 131_072},
    "qwen2": {"hidden_size": 4096, "max_position_embeddings": 32_768},
}
"""What transformers' config classes fill in, by ``model_type``: checkpoints of the hub leave fields
out that have these values."""


class TextConfig(msgspec.Struct, frozen=True):
    """Of ``text_config``."""

    hidden_size: Positive
    """Width of an embedding."""
    max_position_embeddings: Positive
    """Tokens of prompt and answer together."""


def text_config(checkpoint: Checkpoint, model_type: str) -> TextConfig:
    """The checkpoint's ``text_config`` over the defaults of its language model.

    Args:
        checkpoint: Whose.
        model_type: Of the language model, where ``text_config`` does not say.

    Raises:
        ConfigurationError: A field is missing or of the wrong type.
    """
    raw = {key: value for key, value in checkpoint.text_config.items() if value is not None}
    nested = checkpoint.text_config is not checkpoint.config
    defaults = DEFAULTS.get(raw.get("model_type", model_type) if nested else model_type, {})
    where = f"{checkpoint.path / 'config.json'}: text_config"
    return read_config(TextConfig, {**defaults, **raw}, where)
