"""Decode's end of the road NIXL: reads by ticket, verifies, releases.

A fetch is tried at once, in the caller's thread: on one host the bytes are there when NIXL's call
returns. What is not done then is driven on by a thread, which sleeps while there is nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from triptych.contract import Ticket
from triptych.errors import (
    InternalError,
    InvalidValue,
    LeaseLost,
    Overloaded,
    TriptychError,
    Unavailable,
)
from triptych.handover.agent import Agent
from triptych.handover.arena import Arena
from triptych.handover.herald import Herald
from triptych.handover.parts import Part, parts, verified
from triptych.handover.peers import Peers

logger = logging.getLogger("triptych.handover")

AT_ONCE_S = 500e-6
"""How long a fetch into a GPU's memory is looked after in the caller's thread: what comes from the
same GPU is there by then, which a thread that sleeps between two looks sees some 0.1 ms later."""
FIRST_WAIT_S, LAST_WAIT_S = 50e-6, 1e-3
"""Between two looks at what is under way: from the first to the last, doubling."""
QUARANTINE_S = 10.0
"""How long memory is not used again whose transfer was given up: bytes may still arrive."""


@dataclass(eq=False)
class Fetch:
    """One ticket's way here."""

    ticket: Ticket
    parts: list[Part]
    deadline: float
    future: Future[list[torch.Tensor]] = field(default_factory=Future)


class Abandoned(NamedTuple):
    """A part whose transfer was given up."""

    handle: Any
    offset: int
    until: float


class NixlFetcher:
    """Fetches embeddings from the encoders that tickets name. Any thread may call.

    Args:
        capacity: Bytes that may be here at a time.
        key: `triptych.handover.trust.load_key`.
        timeout_s: One fetch may take, in seconds.
        device: Where the embeddings are to be; None: the host.

    Raises:
        ConfigurationError: NIXL is not there or does not start.
    """

    def __init__(
        self,
        capacity: int,
        key: bytes,
        timeout_s: float = 10.0,
        device: torch.device | None = None,
    ) -> None:
        begun = time.monotonic()
        self._timeout_s = timeout_s
        self._arena = Arena(capacity, device)
        # Verifying waits for its own work, not for all that an engine has queued.
        self._stream = torch.cuda.Stream(device) if self._arena.memory == "cuda" else None
        self._agent = Agent("decode")
        self._agent.register(self._arena)
        self._herald = Herald()
        self._peers = Peers((self._agent, self._herald.agent), key)
        self._active: list[Fetch] = []
        self._abandoned: deque[Abandoned] = deque()
        self._untold = False
        """Whether there is a peer whose transport was not logged yet."""
        self._closing = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="triptych-handover", daemon=True)
        self._thread.start()
        logger.info(
            "%s reads embeddings into %d MiB of %s memory, after %.1f s",
            self._agent.name,
            capacity >> 20,
            self._arena.memory,
            time.monotonic() - begun,
        )

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self._arena.capacity

    @property
    def used(self) -> int:
        """Bytes of the arena that somebody has, or that a transfer may still write to."""
        return self._arena.used

    @property
    def peers(self) -> int:
        """How many encoders are known."""
        return len(self._peers)

    def fetch(
        self, ticket: Ticket, embeddings: torch.Tensor | None = None
    ) -> Future[list[torch.Tensor]]:
        """See `triptych.handover.Fetcher`; ``embeddings`` has no meaning here."""
        fetch = Fetch(ticket, [], time.monotonic() + self._timeout_s)
        fetch.future.set_running_or_notify_cancel()  # nobody can cancel it
        try:
            fetch.parts = parts(ticket)
        except TriptychError as error:
            fetch.future.set_exception(error)
            return fetch.future
        with self._changed:
            if self._closing:
                fetch.future.set_exception(Unavailable("the stage is stopping"))
                return fetch.future
            self._sweep()
            ended = self._advance([fetch])
            if self._arena.memory == "cuda":
                until = time.monotonic() + AT_ONCE_S
                while not ended and time.monotonic() < until:
                    ended = self._advance([fetch])
            if not ended:
                self._active.append(fetch)
                self._changed.notify_all()
        self._finish(ended)
        return fetch.future

    def release(self, ticket: Ticket) -> None:
        """Tell the owners that nobody will read a ticket's embeddings.

        A ticket that is none of ours, or an owner that cannot be reached, is logged.
        """
        unread = []
        try:
            for part in parts(ticket):
                with self._changed:
                    if self._closing:
                        return
                    self._meet(part.first.agent, ticket)
                unread.append(part)
        except TriptychError as error:
            logger.warning("embeddings that nobody reads are not given back: %s", error)
        self._release(unread)

    def aside(self) -> AbstractContextManager[Any]:
        """In here, work on what was fetched does not wait for what else runs on the GPU."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def forget(self, name: str) -> None:
        """Drop what is known of an encoder; the next ticket that names it brings it back."""
        with self._changed:
            self._peers.drop(name)

    def close(self) -> None:
        """Fail what is under way, end the thread, and give the memory back."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            for fetch in self._active:
                self._fail(fetch, Unavailable("the stage is stopping"))
            self._active.clear()
            self._changed.notify_all()
        self._thread.join()
        self._agent.close()
        self._herald.agent.close()

    def _run(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            with self._changed:
                if not self._active:
                    wait = FIRST_WAIT_S
                    self._changed.wait_for(
                        lambda: self._active or self._closing or self._herald.pause == 0,
                        self._herald.pause,
                    )
                self._herald.work()
                if self._closing:
                    return
                ended = self._advance(self._active)
                self._active = [fetch for fetch in self._active if fetch not in ended]
                waiting = bool(self._active)
                if self._untold:
                    self._tell_transports()
            self._finish(ended)
            del ended  # and with it the embeddings, which are their reader's
            if waiting:
                time.sleep(wait)
                wait = min(2 * wait, LAST_WAIT_S)

    def _advance(self, fetches: Iterable[Fetch]) -> list[Fetch]:
        """Take each fetch as far as it goes; those that have come to an end, good or bad."""
        ended = []
        for fetch in list(fetches):
            if fetch.future.done():  # it failed with another one
                ended.append(fetch)
                continue
            for part in fetch.parts:
                try:
                    self._step(fetch, part)
                except TriptychError as error:
                    self._fail(fetch, error)
                    break
                except Exception as error:
                    self._lose(fetch, part, error)
                    break
            if fetch.future.done() or all(part.done for part in fetch.parts):
                ended.append(fetch)
        return ended

    def _step(self, fetch: Fetch, part: Part) -> None:
        if part.done:
            return
        span = part.first
        if part.handle is None:
            self._meet(span.agent, fetch.ticket)
            part.met = True
            if part.offset is None:
                part.offset = self._room(part.nbytes)
            if part.offset is not None:
                part.handle = self._agent.read(
                    span.agent,
                    (self._arena.memory, self._arena.device_id, self._arena.address + part.offset),
                    (span.memory, span.device, span.header),
                    part.nbytes,
                )
                self._peers.begin(span.agent)
        if part.handle is not None and self._agent.done(part.handle):
            part.done = True
            self._peers.end(span.agent)
            self._agent.release(part.handle)
            part.handle = None
        elif time.monotonic() > fetch.deadline:
            if part.handle is None:
                raise Overloaded(
                    f"no room to fetch {part.nbytes} bytes of embeddings into within "
                    f"{self._timeout_s:g} s (handover_buffer_mb)"
                )
            raise TimeoutError(f"no end of the transfer within {self._timeout_s:g} s")

    def _meet(self, name: str, ticket: Ticket) -> None:
        if self._peers.use(name, ticket.agents[name]):
            self._untold = True
            self._herald.greet()

    def _room(self, nbytes: int) -> int | None:
        if nbytes > self._arena.capacity:
            raise InvalidValue(
                f"the embeddings have {nbytes} bytes, at most {self._arena.capacity} can be "
                "fetched (handover_buffer_mb)"
            )
        return self._arena.take(nbytes)

    def _lose(self, fetch: Fetch, part: Part, cause: Exception) -> None:
        """A transfer has failed: its peer, and all else that comes from there, is given up."""
        name = part.first.agent
        self._agent.reaches()  # for UCX's complaints
        logger.warning("the way to %s is lost: %s: %s", name, type(cause).__name__, cause)
        for other in {fetch, *self._active}:
            if any(one.first.agent == name and not one.done for one in other.parts):
                for one in other.parts:
                    one.met = one.met and one.first.agent != name
                error = Unavailable(
                    f"the encoder {name}, which has the embeddings, cannot be reached ({cause}); "
                    "send the request again"
                )
                self._fail(other, error)
        self._peers.drop(name)

    def _fail(self, fetch: Fetch, error: TriptychError) -> None:
        """End a fetch; the memory of transfers that have not ended is kept out of use.

        The owners that can be told have no use for the leases either.
        """
        if fetch.future.done():
            return
        for part in fetch.parts:
            if part.handle is not None:
                self._peers.end(part.first.agent)
                until = time.monotonic() + QUARANTINE_S
                self._abandoned.append(Abandoned(part.handle, part.offset or 0, until))
            else:
                if part.offset is not None:
                    self._arena.give(part.offset)
                if part.met:
                    self._herald.add([part])
            part.handle = part.offset = None
        self._changed.notify_all()
        fetch.future.set_exception(error)

    def _sweep(self) -> None:
        """Take back the memory of what was given up long enough ago."""
        now = time.monotonic()
        while self._abandoned and self._abandoned[0].until <= now:
            handle, offset, _ = self._abandoned.popleft()
            try:
                self._agent.release(handle)
            except Exception as error:
                logger.warning("NIXL does not let go of a transfer yet: %s", error)
                self._abandoned.append(Abandoned(handle, offset, now + QUARANTINE_S))
                return
            self._arena.give(offset)

    def _finish(self, fetches: Iterable[Fetch]) -> None:
        """Verify what has arrived, release it, and answer; without the lock."""
        for fetch in fetches:
            if fetch.future.done():
                continue
            tensors: dict[int, torch.Tensor] = {}
            error: TriptychError | None = None
            read = []
            for part in fetch.parts:
                data = self._arena.lend(part.offset or 0, part.nbytes)
                try:
                    with self.aside():
                        tensors.update(verified(part, data))
                except TriptychError as found:
                    error = found
                except Exception:
                    logger.exception("embeddings from %s cannot be verified", part.first.agent)
                    error = InternalError("the embeddings of this request cannot be verified")
                if not isinstance(error, LeaseLost):
                    read.append(part)
                del data
            if error:
                fetch.future.set_exception(error)
            else:
                fetch.future.set_result([tensors[place] for place in range(len(tensors))])
            del tensors
            self._release(read)

    def _release(self, read: list[Part]) -> None:
        with self._changed:
            self._herald.add(read)
            self._changed.notify_all()

    def _tell_transports(self) -> None:
        """Log what UCX chose for a new peer; on one host TCP is a mistake of the setup."""
        for reach in self._agent.reaches():
            self._untold = False
            where = "on this host" if reach.same_host else "on another host"
            logger.info("embeddings come from an encoder %s by %s", where, reach.told)
            if reach.same_host and reach.transports <= {"tcp"}:
                logger.warning(
                    "UCX chose TCP for an encoder on this host, some 20 times slower than a copy: "
                    "containers must share the process namespace and allow ptrace for CMA, "
                    "and UCX_TLS must not exclude it"
                )
