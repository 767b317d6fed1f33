"""Passes of a tower on a GPU, replayed as CUDA graphs where they come again.

A picture of 360p is some thousand kernels of microseconds each, which Python hands out more slowly
than the GPU does them: on an H200 LLaVA-1.5's tower takes 10 ms launched and 2.0 ms replayed,
Qwen3-VL's 11 and 4.4, the same kernels with the same results. From some thousand embeddings on the
GPU is the slower one, and nothing is gained.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from triptych.contract import Item
from triptych.families.base import StaticTower, Tower

logger = logging.getLogger("triptych.encode")

AFTER = 3
"""Times that a pass has to come, alike to the last extent, before it is recorded: that takes some
50 ms."""
KEPT = 32
"""Graphs at a time; they share their working memory."""
REMEMBERED = 512
"""Kinds of passes that are counted."""

Key = tuple[object, ...]


class Replay:
    """A tower whose passes are recorded and replayed; in place of it, for one thread at a time.

    Args:
        tower: On a GPU.
        max_tokens: Embeddings of the largest pass that is.
    """

    def __init__(self, tower: StaticTower, max_tokens: int) -> None:
        self._tower = tower
        self._max_tokens = max_tokens
        self._seen: OrderedDict[Key, int] = OrderedDict()
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._pool: Any = None
        self.replayed = 0
        """Passes so far."""

    def encode(self, items: Sequence[Item], media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Tower`."""
        if sum(item.tokens for item in items) > self._max_tokens:
            return self._tower.encode(items, media)
        key = tuple((item.modality, item.shape, item.grid_thw) for item in items)
        if (graph := self._graphs.get(key)) is None:
            if not self._comes_again(key):
                return self._tower.encode(items, media)
            graph = self._record(key, items, media)
        if graph is None:
            return self._tower.encode(items, media)
        self._graphs.move_to_end(key)
        self.replayed += 1
        return graph.replay(media)

    def _comes_again(self, key: Key) -> bool:
        count = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return count >= AFTER

    def _record(
        self, key: Key, items: Sequence[Item], media: Sequence[torch.Tensor]
    ) -> _Graph | None:
        begun = time.perf_counter()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            graph = _Graph(self._tower, items, media, self._pool)
        except RuntimeError as error:
            logger.warning("passes are not replayed any more: %s", str(error).partition("\n")[0])
            self._max_tokens = 0
            self._graphs.clear()
            return None
        self._seen.pop(key)
        self._graphs[key] = graph
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        spent = (time.perf_counter() - begun) * 1e3
        logger.info("recorded a pass of %d items in %.0f ms", len(items), spent)
        return graph


class _Graph:
    """One recorded pass, with all that it reads and writes."""

    def __init__(
        self,
        tower: StaticTower,
        items: Sequence[Item],
        media: Sequence[torch.Tensor],
        pool: Any,
    ) -> None:
        self._layout = tower.layout(items)
        self._media = [medium.clone() for medium in media]
        stream = torch.cuda.Stream(media[0].device)
        stream.wait_stream(torch.cuda.current_stream(media[0].device))
        with torch.cuda.stream(stream):
            tower.run(self._layout, self._media)  # what is made on first use is not recorded
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Of the other threads, what they do on the device does not concern this one.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode=mode):
            self._embeddings = tower.run(self._layout, self._media)

    def replay(self, media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The pass over other media of the same shapes."""
        for place, medium in zip(self._media, media, strict=True):
            place.copy_(medium)
        self._graph.replay()
        # The next graph writes where this one has.
        return [embedding.clone() for embedding in self._embeddings]


def replayed(tower: Tower, device: torch.device, max_tokens: int) -> Tower:
    """``tower``, or one in its place that replays its passes, where that can be."""
    if device.type != "cuda" or not max_tokens or not isinstance(tower, StaticTower):
        return tower
    return Replay(tower, max_tokens)
