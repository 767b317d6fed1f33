"""The user's own arguments of an engine: a JSON file that goes to it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from triptych.errors import ConfigurationError


def read_arguments(path: str) -> dict[str, Any]:
    """The object in the JSON file ``path``; empty if there is no path.

    Raises:
        ConfigurationError: No such file, or it holds anything but an object.
    """
    if not path:
        return {}
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"engine_args {path!r}: {error}") from None
