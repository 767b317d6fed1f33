"""A directory for the sockets and temporary files of one SGLang, which it never removes itself.

The engine removes it when it stops. If the stage is killed, whoever starts the next server knows by
its name that nobody needs it any more (`triptych.processes.is_orphaned`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from triptych import processes
from triptych.errors import ConfigurationError

LOADS = "loads"
"""File in which SGLang's scheduler says how much it has to do: 16 KiB a scheduler, mapped."""
_MAX_PATH_BYTES = 107
"""Of a Unix socket, unix(7)."""
_LONGEST_NAME = "tmp_8_chars"
"""Python gives temporary files such names, and SGLang takes them for its sockets."""


def make() -> Path:
    """A new directory.

    Raises:
        ConfigurationError: Its path is too long for sockets.
    """
    folder = Path(tempfile.gettempdir()) / f"{processes.owned_name()}sglang"
    length = len(os.fsencode(folder / _LONGEST_NAME))
    if length > _MAX_PATH_BYTES:
        raise ConfigurationError(
            f"the paths of SGLang's sockets in {folder} would have {length} bytes, and "
            f"{_MAX_PATH_BYTES} are possible; set TMPDIR to a shorter one"
        )
    folder.mkdir(mode=0o700)
    return folder


def environ(folder: Path) -> dict[str, str]:
    """The environment in which SGLang keeps its temporary files there, but for a cache of torch."""
    found = {**os.environ, "TMPDIR": str(folder)}
    found.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.geteuid()}"
    )
    return found
