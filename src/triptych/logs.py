"""The log of Triptych's processes: ``triptych.*`` on stderr, where tritonserver's own log goes."""

from __future__ import annotations

import logging
import os
import sys

_LEVEL = "_TRIPTYCH_LOG_LEVEL"
"""Environment variable with the level, for the processes that a library starts below this one."""


def configure(level: str | None = None) -> None:
    """Send ``triptych.*`` to stderr, each line with the process it came from.

    Args:
        level: Of `logging`, in any case; processes below this one will have the same. None: that
            of the process above, else ``info``.
    """
    level = (level or os.environ.get(_LEVEL, "info")).upper()
    os.environ[_LEVEL] = level
    root = logging.getLogger("triptych")
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname).1s %(name)s[%(process)d] %(message)s")
        )
        root.addHandler(handler)
        root.propagate = False
