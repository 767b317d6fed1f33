"""Types of fields that several checkpoints' JSON files have."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(gt=0)]
Zero = Annotated[float, msgspec.Meta(ge=0, le=0)]
"""A feature that is not served, and must be off."""

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
"""By their names in config.json."""
