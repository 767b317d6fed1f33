"""What every engine's library wants of the process that it runs in.

Nothing here overrules what the user has set.
"""

from __future__ import annotations

import contextlib
import locale
import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger("triptych.engines")

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # a checkpoint is a directory; nothing is asked of the network
    "TOKENIZERS_PARALLELISM": "false",  # else a warning for each fork
}


def prepare(variables: Mapping[str, str]) -> None:
    """Set up this process, before an engine's library is imported.

    Args:
        variables: Environment variables of that library, set unless the user has.
    """
    # A stub of Triton starts in the C locale, and the libraries read UTF-8 without saying so.
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
    _name_interpreter()
    for name, value in {**_DEFAULTS, **variables}.items():
        os.environ.setdefault(name, value)


def _name_interpreter() -> None:
    """Tell Python where its interpreter is: in a stub, the running program is another."""
    python = Path(sys.prefix, "bin", "python")
    if not python.exists():
        logger.warning("%s does not exist; the engine may fail to start its processes", python)
        return
    if not sys.executable or Path(sys.executable).parent != python.parent:
        sys.executable = str(python)
    multiprocessing.set_executable(str(python))
