"""What tritonserver's log says about loading: which model, for how long, and why not.

The server opens its ports only after every model has loaded, so its log is all there is to
watch until then.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable

from triptych.errors import ConfigurationError, InternalError, TriptychError

_LOADING = re.compile(r'\] "?loading: (?P<model>[^":]+):\d+"?')
_LOADED = re.compile(r"\] \"?successfully loaded '(?P<model>[^']+)'")
_FAILED = re.compile(
    r"\] (?P<quoted>\"?failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*))$"
)
_NO_ENVIRONMENT = re.compile(
    r"Failed to get the canonical path for (?P<path>.*/\.venvs/(?P<name>\w+))"
)
_REFUSED = re.compile(r"^error: creating server: (?P<reason>.*)$")
_ERROR = re.compile(r"^E\d{4} \S+ \d+ [\w.]+:\d+\] (?P<text>.*)$")
_BANNER = re.compile(r"^[+|]|^$")
_NO_GPU = ("CudaDriverHelper has not been initialized", "CUDA driver version is insufficient")
"""Errors in the log of a machine without a GPU, which are none."""


class StartLog:
    """Follows the log line by line.

    Args:
        on_change: Called, from the thread that feeds the lines, whenever a model begins to load
            or has loaded.
        keep: How many of the last lines `tail` can give.
    """

    def __init__(self, on_change: Callable[[StartLog], None], *, keep: int = 400) -> None:
        self.loading: dict[str, float] = {}
        """When each model that is loading began to, `time.monotonic` seconds."""
        self.loaded: dict[str, float] = {}
        """How long each model took, seconds."""
        self.failure: TriptychError | None = None
        """Why the server will not start, once that is known."""
        self._on_change = on_change
        self._lines: deque[str] = deque(maxlen=keep)

    def feed(self, line: str) -> None:
        """Take the next line, without its newline."""
        self._lines.append(line)
        if match := _LOADING.search(line):
            self.loading[match["model"]] = time.monotonic()
            self._on_change(self)
        elif match := _LOADED.search(line):
            began = self.loading.pop(match["model"], None)
            if began is not None:
                self.loaded[match["model"]] = time.monotonic() - began
            self._on_change(self)
        elif self.failure is None:
            if match := _FAILED.search(line):
                self.failure = _explain(match["model"], _unquote(match["quoted"]))
            elif match := _REFUSED.search(line):
                self.failure = ConfigurationError(f"tritonserver did not start: {match['reason']}")

    def tail(self, count: int = 15) -> str:
        """The last lines that say something: no tables, no blanks."""
        telling = [line for line in self._lines if not _BANNER.match(line)]
        return "\n".join(telling[-count:])

    def errors(self) -> list[str]:
        """The messages that Triton logged as errors, but for those that the lack of a GPU makes."""
        found = (match["text"] for line in self._lines if (match := _ERROR.match(line)))
        return [_unquote(text) for text in found if not any(known in text for known in _NO_GPU)]


def _unquote(text: str) -> str:
    """Undo the quoting of Triton's log, which is JSON's."""
    try:
        plain = json.loads(text, strict=False)
    except ValueError:
        return text.strip('"')
    return plain if isinstance(plain, str) else text


def _explain(model: str, message: str) -> TriptychError:
    """Why a model did not load, in its own words where they are meant for people."""
    message, _, place = message.partition("\n\nAt:\n")
    if match := _NO_ENVIRONMENT.search(message):
        return ConfigurationError(
            f"the model {model!r} did not load: there is no {match['path']}; "
            f"scripts/setup --engine {match['name']} makes it"
        )
    found = TriptychError.parse(message)
    if isinstance(found, InternalError) and found.what == message:
        reason = message.partition(" version ")[2].partition(": ")[2] or message
        where = place.strip().splitlines()[0].strip() if place.strip() else ""
        return ConfigurationError(
            f"the model {model!r} did not load: {reason}" + (f" (at {where})" if where else "")
        )
    return type(found)(f"the model {model!r} did not load: {found.what}", where=found.where)
