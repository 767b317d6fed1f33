"""The one thread that answers: deltas wait in outboxes, and what piled up goes out together.

A send costs 100–300 µs, which with many streams is more than a token does, and it is taken from
the engine's own thread in this process. So a generation's first text and its end go out at once;
the rest goes out in rounds, and after a round the thread rests in proportion to what it took. One
stream loses nothing by that: its next token takes longer than the rest. With many streams the
rounds grow apart, and what piles up for a request between two of them leaves as one response.

Triton wants all that is done with a response sender done by one thread, and nothing after the
final response; this thread and `Outbox` see to both. Nothing here knows Triton: what is sent to is
a `Reply`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from triptych.engines.base import Delta, FinishReason, TokenLogprob, Usage
from triptych.errors import InternalError
from triptych.stages.times import Times

logger = logging.getLogger("triptych.stages.decode")

SHARE = 0.15
"""Of the thread's time, the most that rounds may take."""
MAX_REST_S = 0.06
"""Seconds between two rounds at most: less than an eye sees."""
POLL_S = 0.02
"""Seconds between two looks at whether callers have gone away; sending always comes first."""
POLL_SHARE = 0.05
"""Of the thread's time, the most that those looks may take,"""
MAX_POLL_S = 0.25
"""unless there would be more seconds than this between two of them: one look may be slow."""


class Parcel(msgspec.Struct, frozen=True):
    """What one response carries: the deltas that piled up. Any that ends a generation is last."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    kv_transfer: dict[str, Any] | None = None
    error: BaseException | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish_reason is not None or self.error is not None


class Reply(Protocol):
    """Where the parcels of one request go. Only the sender thread calls it."""

    def send(self, parcel: Parcel) -> None:
        """Send it; the last one as final."""
        ...

    def close(self) -> None:
        """Send that there is nothing more, after a `send` that failed."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the caller has gone away."""
        ...


class Outbox:
    """What waits for one request's reply.

    Args:
        reply: Where it goes.
        stream: False: everything waits for the end, and one parcel carries it all.
        on_cancel: Called once, by the sender thread, when the caller is seen to have gone away.
        times: Told of the first token.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        stream: bool,
        on_cancel: Callable[[], None] | None = None,
        times: Times | None = None,
    ) -> None:
        self.reply = reply
        self._times = times or Times()
        self.on_cancel = on_cancel
        self._stream = stream
        self._deltas: list[Delta] = []
        self._error: BaseException | None = None
        self._complete = False
        self._begun = False
        self.queued = False
        """Whether it waits in one of the sender's lines; the sender's lock guards this class."""
        self.closed = False
        """Whether the last parcel was taken out."""

    @property
    def ready(self) -> bool:
        """Whether there is something to send."""
        if self._complete:
            return not self.closed
        return self._stream and any(delta.text for delta in self._deltas)

    @property
    def urgent(self) -> bool:
        """Whether that is the first text or the end, which no round is waited for with."""
        return self._complete or not self._begun

    def put(self, delta: Delta) -> None:
        """Add a delta; after the last one nothing is added."""
        if not self._complete:
            self._times.token()
            self._deltas.append(delta)
            self._complete = delta.finish_reason is not None

    def fail(self, error: BaseException) -> None:
        """End with an error; text that has not gone out yet goes no more."""
        if not self._complete:
            self._error = error
            self._complete = True

    def take(self) -> Parcel:
        """Everything that has piled up, as one parcel."""
        deltas, self._deltas = self._deltas, []
        self._begun = True
        self.closed = self._complete
        if self._error is not None:
            return Parcel(error=self._error)
        last = deltas[-1]
        return Parcel(
            "".join(delta.text for delta in deltas),
            tuple(entry for delta in deltas for entry in delta.logprobs),
            last.finish_reason,
            last.usage,
            last.kv_transfer,
        )


class Sender:
    """The sender thread. `open`, `put` and `fail` may be called from any thread."""

    def __init__(self, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._next_poll = 0.0
        self._next_round = 0.0
        self._changed = threading.Condition()
        self._urgent: deque[Outbox] = deque()
        self._line: list[Outbox] = []
        """Those that the next round is for."""
        self._open: set[Outbox] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="triptych-sender", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def open(self, outbox: Outbox) -> None:
        """Begin to watch whether the caller of ``outbox`` is still there."""
        with self._changed:
            if not outbox.closed:
                self._open.add(outbox)
                self._changed.notify()

    def put(self, outbox: Outbox, delta: Delta) -> None:
        """Have ``delta`` sent when its turn comes."""
        with self._changed:
            outbox.put(delta)
            self._stand_in_line(outbox)

    def fail(self, outbox: Outbox, error: BaseException) -> None:
        """Have the error sent, as the last."""
        with self._changed:
            outbox.fail(error)
            self._stand_in_line(outbox)

    def stop(self, timeout_s: float) -> None:
        """Send what waits, then end the thread; open outboxes get an error first."""
        with self._changed:
            for outbox in self._open:
                outbox.fail(InternalError("the stage was stopped in the middle of the answer"))
                self._stand_in_line(outbox)
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _stand_in_line(self, outbox: Outbox) -> None:
        if not outbox.ready:
            return
        if outbox.urgent:
            # It may come to stand in line twice: whoever comes second finds nothing to send.
            self._urgent.append(outbox)
            self._changed.notify()
        elif not outbox.queued:
            outbox.queued = True
            self._line.append(outbox)
            if len(self._line) == 1:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._something_due():
                    if self._stopping and not self._line:
                        return
                    self._changed.wait(self._until_due())
            self._send_urgent()
            if self._round_due():
                self._make_round()
            if self._poll_due():
                self._poll()

    def _send_urgent(self) -> None:
        while self._urgent:
            self._send(self._urgent.popleft())

    def _make_round(self) -> None:
        begun = time.monotonic()
        with self._changed:
            line, self._line = self._line, []
            for outbox in line:
                outbox.queued = False
        for outbox in line:
            self._send(outbox)
            self._send_urgent()
        now = time.monotonic()
        self._next_round = now + min((now - begun) * (1 / SHARE - 1), MAX_REST_S)

    def _send(self, outbox: Outbox) -> None:
        with self._changed:
            if not outbox.ready:
                return
            parcel = outbox.take()
            if outbox.closed:
                self._open.discard(outbox)
        self._deliver(outbox, parcel)

    def _something_due(self) -> bool:
        return bool(self._urgent) or self._round_due() or self._poll_due()

    def _round_due(self) -> bool:
        return bool(self._line) and (self._stopping or time.monotonic() >= self._next_round)

    def _until_due(self) -> float | None:
        """Seconds until something is due that nobody will tell of; None: nothing is."""
        times = [self._next_poll] if self._open else []
        if self._line:
            times.append(self._next_round)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _deliver(self, outbox: Outbox, parcel: Parcel) -> None:
        try:
            outbox.reply.send(parcel)
        except Exception:
            logger.exception("a response could not be sent; its request is ended")
            with self._changed:
                outbox.fail(InternalError("a response could not be sent"))
                outbox.closed = True
                self._open.discard(outbox)
            self._cancel(outbox)
            try:
                outbox.reply.close()
            except Exception:
                logger.exception("the request could not be ended")

    def _poll_due(self) -> bool:
        return bool(self._open) and time.monotonic() >= self._next_poll

    def _poll(self) -> None:
        begun = time.monotonic()
        with self._changed:
            watched = [outbox for outbox in self._open if outbox.on_cancel]
        for outbox in watched:
            try:
                cancelled = outbox.reply.is_cancelled()
            except Exception:
                logger.exception("cannot see whether a caller is still there")
                cancelled = False
            if cancelled:
                self._cancel(outbox)
        now = time.monotonic()
        self._next_poll = now + max(self._poll_s, min((now - begun) / POLL_SHARE, MAX_POLL_S))

    @staticmethod
    def _cancel(outbox: Outbox) -> None:
        on_cancel, outbox.on_cancel = outbox.on_cancel, None
        if on_cancel:
            on_cancel()
