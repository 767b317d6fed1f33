"""When a request came, and until when its answer is wanted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from triptych.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a request says of itself apart from its tensors."""

    at: float = field(default_factory=time.monotonic)
    """`time.monotonic` seconds."""
    timeout_s: float = 0.0
    """Triton's ``timeout`` of the request, in seconds, for the whole of its life; 0: none."""
    traceparent: str = ""

    @property
    def deadline(self) -> float:
        """When its answer must be whole; 0: it has time."""
        return self.at + self.timeout_s if self.timeout_s else 0.0


def check(deadline: float, doing: str) -> None:
    """Whether there is time left.

    Args:
        deadline: `Arrival.deadline`.
        doing: What the request waited for until now, in words.

    Raises:
        DeadlineExceeded: There is none.
    """
    if deadline and time.monotonic() >= deadline:
        raise _exceeded(doing)


@asynccontextmanager
async def within(deadline: float, doing: str) -> AsyncIterator[None]:
    """Cut off what runs inside at the deadline.

    Raises:
        DeadlineExceeded: It was cut off.
    """
    if not deadline:
        yield
        return
    limit = asyncio.timeout_at(deadline)  # the loop's clock is `time.monotonic`
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise _exceeded(doing) from None


def _exceeded(doing: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the request's timeout passed {doing}")
