"""Encodes what preprocess brings before its request has reached the encoder.

Triton hands a batch over as a whole and takes its answers as a whole. A text, a picture that is
held and a long video in one batch would leave together, and whatever comes meanwhile would wait.
So media are encoded here, on a thread of its own, while `execute` answers what is ready; a request
comes with leases. The order is ours too: those of the lowest `priority` first, among them small
media, and none waits for ever behind its equals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from triptych.contract import Item
from triptych.encode.cache import Entry
from triptych.encode.encoder import Encoder

logger = logging.getLogger("triptych.encode")

PATIENCE_S = 1.0
"""After so long, in seconds, a medium goes before smaller ones that came later."""
NICENESS = 10
"""Of the thread on a CPU: encoding takes what texts and their tokens leave."""
STOP_TIMEOUT_S = 10.0

Done = Callable[[Entry | None], None]
"""Told once, on the thread, with the pinned entry; None: it could not be encoded or kept."""


@dataclass(eq=False)
class Pending:
    """One content that waits for its turn."""

    key: str
    item: Item
    media: torch.Tensor
    """As `Item.shape` and `Item.dtype` say."""
    since: float
    """Monotonic seconds."""
    priority: int = 0
    """The lower goes first."""
    done: list[Done] = field(default_factory=list)
    taken: bool = False
    """It is being encoded."""


class EncodeAhead:
    """A queue before a tower, and the thread that empties it.

    Args:
        encoder: Whose tower.
        max_tokens: Embeddings of one forward pass; see `EncoderSettings.max_encoder_tokens`.
    """

    def __init__(self, encoder: Encoder, max_tokens: int) -> None:
        self._encoder = encoder
        self._max_tokens = max_tokens
        self._pending: dict[str, Pending] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="triptych-encode", daemon=True)
        self._thread.start()

    def submit(
        self, key: str, item: Item, media: torch.Tensor, done: Done, priority: int = 0
    ) -> Callable[[], None]:
        """Take a medium over; of one content, whoever brings it again waits for the first.

        Args:
            key: `triptych.encode.keys.content_key`, computed from ``media`` by the caller.
            item: What it is; the family has checked it.
            media: On the host.
            done: Told when it is encoded.
            priority: The lower goes first; of one content, the lowest that anybody gives.

        Returns:
            What to call when nobody waits for ``done`` any more. What nobody waits for is not
            begun, and between two parts of it not gone on with.
        """
        with self._changed:
            if not self._stopping:
                new = Pending(key, item, media, time.monotonic(), priority)
                pending = self._pending.setdefault(key, new)
                pending.priority = min(pending.priority, priority)
                pending.done.append(done)
                self._changed.notify()
                return lambda: self._withdraw(pending, done)
        done(None)
        return lambda: None

    def stop(self) -> None:
        """Give up what is pending, and end the thread; a second call does nothing."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(STOP_TIMEOUT_S)

    def _withdraw(self, pending: Pending, done: Done) -> None:
        with self._changed:
            if done in pending.done:
                pending.done.remove(done)
            if not pending.done and not pending.taken:
                self._pending.pop(pending.key, None)

    def _run(self) -> None:
        if self._encoder.device.type == "cpu":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        with self._encoder.stream():
            while batch := self._next():
                self._encode(batch)
        for left in self._pending.values():
            _tell(left, None)

    def _next(self) -> list[Pending]:
        """The next batch, when there is one; empty: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._stopping)
            return [] if self._stopping else self._take(self._pending.values())

    def _take(self, pending: Iterable[Pending]) -> list[Pending]:
        """What to encode next, from now on taken."""
        batch = choose(pending, self._max_tokens, time.monotonic())
        for one in batch:
            one.taken = True
        return batch

    def _pause(self, of: Pending) -> bool:
        """Between two parts of a large medium: a batch of others, and whether to go on with it."""
        with self._changed:
            if self._stopping or not of.done:
                return False
            others = [
                one
                for one in self._pending.values()
                if not one.taken
                and one.item.tokens <= self._max_tokens
                and one.priority <= of.priority
            ]
            batch = self._take(others) if others else []
        if batch:
            self._encode(batch)
        return True

    def _encode(self, batch: list[Pending]) -> None:
        entries: list[Entry | None] = [None] * len(batch)
        media = [(one.key, one.item, one.media) for one in batch]
        try:
            # A medium of several parts is larger than a batch and has one to itself.
            entries = self._encoder.encode_ahead(media, lambda: self._pause(batch[0]))
        except Exception:
            logger.exception("encoding ahead failed")
        finally:
            with self._changed:  # from here on, the same content is another submission
                for one in batch:
                    del self._pending[one.key]
            for one, entry in zip(batch, entries, strict=True):
                if entry:
                    self._encoder.cache.count_hits(max(0, len(one.done) - 1), entry)
                _tell(one, entry)
                if entry:
                    self._encoder.cache.release(entry)


def choose(pending: Iterable[Pending], max_tokens: int, now: float) -> list[Pending]:
    """What to encode next: by priority; of one, what has waited too long by age, then by size.

    Args:
        pending: Not empty.
        max_tokens: Embeddings of the whole; the first may have more by itself.
        now: Monotonic seconds.
    """

    def rank(one: Pending) -> tuple[int, bool, float]:
        patient = now - one.since < PATIENCE_S
        return one.priority, patient, one.item.tokens if patient else one.since

    batch: list[Pending] = []
    tokens = 0
    for one in sorted(pending, key=rank):
        if batch and tokens + one.item.tokens > max_tokens:
            break
        batch.append(one)
        tokens += one.item.tokens
    return batch


def _tell(pending: Pending, entry: Entry | None) -> None:
    for done in pending.done:
        try:
            done(entry)
        except Exception:
            logger.exception("whoever waited for %s could not be told", pending.key[:12])
