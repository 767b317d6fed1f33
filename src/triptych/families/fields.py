"""Reads the fields of a checkpoint's JSON files, and has the types that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from triptych.errors import ConfigurationError

Positive = Annotated[int, msgspec.Meta(gt=0)]
Zero = Annotated[float, msgspec.Meta(ge=0, le=0)]
"""A feature that is not served, and must be off."""

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
"""By their names in config.json."""

Fields = TypeVar("Fields", bound=msgspec.Struct)


def read_config(kind: type[Fields], raw: Mapping[str, Any], what: str) -> Fields:
    """``raw`` as ``kind``; nulls are defaults, fields that ``kind`` has not are passed over.

    Raises:
        ConfigurationError: A field is missing or of the wrong type; ``what`` names the file.
    """
    try:
        return msgspec.convert({key: v for key, v in raw.items() if v is not None}, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{what}: {error}") from None
