"""Requests sent at a pace, and what was seen of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median, quantiles

import msgspec

from benches._peers import Peer, StreamError


class Sample(msgspec.Struct):
    """One request."""

    sent: float
    """`time.perf_counter`, like the next two; of an error, ``last`` is when it came."""
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str = ""
    refused: bool = False
    """The server had enough to do."""

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.first - self.sent


class Measured(msgspec.Struct):
    """One load on one peer in one round."""

    samples: list[Sample]
    seconds: float
    cpu_seconds: float
    memory: int
    """Bytes after the load."""

    @property
    def good(self) -> list[Sample]:
        """Those that were answered."""
        return [sample for sample in self.samples if not sample.error]

    @property
    def errors(self) -> int:
        """Requests that failed, in the stream or before it."""
        return len(self.samples) - len(self.good)

    @property
    def ttft(self) -> float:
        """Seconds to the first text, median."""
        return median(sample.ttft for sample in self.good)

    @property
    def ttft_p99(self) -> float:
        """Seconds to the first text, 99th percentile."""
        return quantiles([sample.ttft for sample in self.good], n=100, method="inclusive")[-1]

    @property
    def itl(self) -> float:
        """Seconds between two tokens of an answer, median over the answers."""
        spent = [(one.last - one.first) / (one.tokens - 1) for one in self.good if one.tokens > 1]
        return median(spent) if spent else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers a second."""
        return sum(sample.tokens for sample in self.good) / self.seconds

    @property
    def requests_per_s(self) -> float:
        """Answers a second."""
        return len(self.good) / self.seconds

    @property
    def cpu_per_request(self) -> float:
        """CPU seconds of the server's processes for each answer."""
        return self.cpu_seconds / max(len(self.good), 1)


async def closed(peer: Peer, bodies: Sequence[bytes], streams: int) -> Measured:
    """``streams`` callers, each of whom asks anew as soon as it is answered."""
    left = iter(bodies)

    async def call() -> list[Sample]:
        return [await _ask(peer, body) for body in left]

    async def all_of_them() -> list[Sample]:
        found = await asyncio.gather(*(call() for _ in range(streams)))
        return [sample for samples in found for sample in samples]

    return await _measured(peer, all_of_them)


async def opened(peer: Peer, bodies: Sequence[bytes], rate: float) -> Measured:
    """Requests at ``rate`` a second, whether those before are answered or not."""

    async def call(body: bytes, due: float) -> Sample:
        await asyncio.sleep(due - time.perf_counter())
        return await _ask(peer, body)

    async def all_of_them() -> list[Sample]:
        start = time.perf_counter() + 0.05
        calls = (call(body, start + number / rate) for number, body in enumerate(bodies))
        return list(await asyncio.gather(*calls))

    return await _measured(peer, all_of_them)


async def _measured(peer: Peer, work: Callable[[], Awaitable[list[Sample]]]) -> Measured:
    cpu, start = peer.processes.cpu_seconds(), time.perf_counter()
    samples = await work()
    seconds = time.perf_counter() - start
    cpu = peer.processes.cpu_seconds() - cpu
    return Measured(samples, seconds, cpu, peer.processes.memory())


async def _ask(peer: Peer, body: bytes) -> Sample:
    sample = Sample(time.perf_counter())
    texts = []
    try:
        async for text, tokens in peer.ask(body):
            if text:
                texts.append(text)
                sample.last = time.perf_counter()
                sample.first = sample.first or sample.last
            sample.tokens = tokens or sample.tokens
    except (TimeoutError, StreamError, OSError) as error:
        sample.error = f"{type(error).__name__}: {error}"
        sample.refused = isinstance(error, StreamError) and error.refused
        sample.last = time.perf_counter()
    sample.text = "".join(texts)
    if not sample.error and not sample.first:
        sample.error = "an answer without text"
    return sample
