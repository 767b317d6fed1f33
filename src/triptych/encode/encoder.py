"""The encoder: media of several requests in, embeddings and a ticket for each request out."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from triptych.contract import DType, Item, Ticket, TicketItem, aligned
from triptych.encode.cache import EmbeddingCache, Entry
from triptych.encode.jobs import Job, Jobs, batches
from triptych.encode.keys import revision
from triptych.encode.peers import Peers
from triptych.encode.replay import replayed
from triptych.errors import Cancelled, InternalError, TriptychError
from triptych.families import Family
from triptych.settings import EncoderSettings

logger = logging.getLogger("triptych.encode")

MIB = 1 << 20

Room = Callable[[int], torch.Tensor]
"""Gives so many bytes of memory on the encoder's device for a request's embeddings: uint8, shape
(bytes,). May raise a `TriptychError`."""


@dataclass(frozen=True)
class Encoded:
    """The answer to one request."""

    embeddings: torch.Tensor
    """uint8, shape (bytes,), contiguous, on the encoder's device: every item's embeddings."""
    ticket: Ticket
    keys: tuple[str, ...] = ()
    """What the cache knows each item by; empty where it does not have it."""

    def __repr__(self) -> str:
        return f"Encoded({self.embeddings.numel()} bytes, {len(self.ticket.items)} items)"


class Encoder:
    """A family's tower on a device.

    Args:
        family: Whose tower.
        settings: The stage's.
        device: Where the tower goes and the embeddings are left.
        on_batch: Called after every forward pass with its numbers of items and of embeddings.
        name: Of this instance among those of its server.

    Raises:
        ConfigurationError: The checkpoint's weights are missing or of the wrong shape.
    """

    def __init__(
        self,
        family: Family,
        settings: EncoderSettings,
        device: torch.device,
        on_batch: Callable[[int, int], None] = lambda items, tokens: None,
        name: str = "encoder",
    ) -> None:
        self.family = family
        self.device = device
        self.dtype = choose_dtype(settings.encoder_dtype, device)
        self._max_tokens = settings.max_encoder_tokens
        self._on_batch = on_batch
        self._peers: Peers | None = None
        self._one_pass = threading.Lock()
        self.cache = EmbeddingCache(
            device,
            settings.encoder_cache_mb * MIB,
            settings.encoder_host_cache_mb * MIB,
            lease_s=settings.encoder_lease_s,
            name=name,
        )
        """What was encoded before."""
        # Before the weights are read: a file that changes meanwhile is not taken for the old one.
        self.revision = revision(
            family.checkpoint, (family.name, device.type, str(self.dtype), str(torch.__version__))
        )
        """Of all that decides what embeddings come out, apart from the item."""
        start = time.perf_counter()
        tower = family.load_tower(device, self.dtype)
        self._tower = replayed(tower, device, settings.encoder_graph_tokens)
        logger.info(
            "tower of %s from %s on %s in %s: %s, %.2f s",
            family.name,
            family.checkpoint.path,
            device,
            str(self.dtype).removeprefix("torch."),
            _size(tower),
            time.perf_counter() - start,
        )

    def share(self, peers: Peers) -> None:
        """Serve leases of other instances too."""
        self._peers = peers

    def encode(
        self,
        requests: Sequence[tuple[Sequence[Item], torch.Tensor]],
        rooms: Sequence[Room] | None = None,
    ) -> list[Encoded | TriptychError]:
        """Encode the media of several requests together.

        Args:
            requests: Each request's ITEMS and its MEDIA, uint8 of shape (bytes,), on any device.
            rooms: Where each request's embeddings go; None: into tensors of their own.

        Returns:
            One answer a request, in order. A request with a faulty item has the error in its
            place; the others are none the worse for it.
        """
        planned: list[list[Job] | TriptychError] = []
        with torch.inference_mode(), Jobs(self.family, self.cache, self._peers) as jobs:
            for items, media in requests:
                try:
                    planned.append(jobs.of(items, media))
                except TriptychError as error:
                    planned.append(error)
            for batch in batches(jobs, self._max_tokens):
                self._run(batch)
            answers = [
                self._answer(items, plan, room) if isinstance(plan, list) else plan
                for (items, _), plan, room in zip(
                    requests, planned, rooms or [self._room] * len(requests), strict=True
                )
            ]
            if self.device.type == "cuda":
                # What the answers are copied from may be evicted once it is unpinned.
                torch.cuda.current_stream(self.device).synchronize()
            return answers

    def encode_ahead(
        self,
        media: Sequence[tuple[str, Item, torch.Tensor]],
        go_on: Callable[[], bool] = lambda: True,
    ) -> list[Entry | None]:
        """Encode media whose requests are still to come, and keep what comes of it.

        Args:
            media: Each one's `content_key`, its item, which has been checked, and its array.
            go_on: Called between two parts of a large medium, and may do other things meanwhile;
                False: it is given up.

        Returns:
            One entry a medium, pinned until `EmbeddingCache.release`; None: it failed, or there
            is no room for it.
        """
        with torch.inference_mode(), Jobs(self.family, self.cache) as jobs:
            planned = [jobs.job(*each) for each in media]
            for batch in batches(jobs, self._max_tokens):
                self._run(batch, go_on)
            return [self.cache.use(job.key) if job.entry else None for job in planned]

    def promise(self, items: Sequence[Item], keys: Sequence[str]) -> list[Item] | None:
        """ITEMS that ask once more for what was encoded, as long as the cache has it.

        Args:
            items: Of the request.
            keys: `Encoded.keys` of the answer.

        Returns:
            The items with leases in place of pixels; None: one was not kept.
        """
        if not all(keys):
            return None
        # Preprocess knows a lease by its token, also when this process knows it no longer.
        return [
            msgspec.structs.replace(item, offset=0, lease=self.cache.promise(key, item.lease))
            for item, key in zip(items, keys, strict=True)
        ]

    def room_for(self, item: Item) -> bool:
        """Whether the embeddings of ``item`` would be kept."""
        size = self.family.embedding_width * self.dtype.itemsize
        return item.keep and self.cache.could_keep(item.tokens * size)

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """For a thread that encodes while others answer: on a GPU, a stream of its own."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[object] = torch.cuda.stream(
            torch.cuda.Stream(self.device)
        )
        return context

    def _run(self, batch: list[Job], go_on: Callable[[], bool] = lambda: True) -> None:
        """Put a result into every job; if the pass fails, find out alone whose fault it is."""
        try:
            embeddings, seconds = self._encoded(batch, go_on)
        except Cancelled as error:
            batch[0].result = error
            return
        except Exception:
            logger.exception("encoding %d items failed on %s", len(batch), self.device)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                batch[0].result = InternalError("the encoder failed on this item")
                return
            for job in batch:
                self._run([job])
            return
        tokens = sum(job.item.tokens for job in batch)
        each = seconds / tokens
        for job, embedding in zip(batch, embeddings, strict=True):
            job.result = embedding
            if job.item.keep:
                seconds = each * job.item.tokens
                job.entry = self.cache.put(job.key, job.item, embedding, seconds)
        self.cache.count_misses(len(batch))
        self._on_batch(len(batch), tokens)

    def _encoded(
        self, batch: list[Job], go_on: Callable[[], bool]
    ) -> tuple[list[torch.Tensor], float]:
        """Embeddings of a batch, and the seconds that they took.

        Raises:
            Cancelled: ``go_on`` says no.
        """
        media = [job.media.to(self.device, non_blocking=True) for job in batch]
        items = [job.item for job in batch]
        parts = self.family.parts(items[0], self._max_tokens) if len(batch) == 1 else items[:1]
        if len(parts) == 1:
            return self._forward(items, media)
        pieces: list[torch.Tensor] = []
        spent = 0.0
        for part, piece in zip(parts, media[0].split([p.shape[0] for p in parts]), strict=True):
            if pieces and not go_on():
                raise Cancelled("nobody waits for this item any more")
            embeddings, seconds = self._forward([part], [piece])
            pieces += embeddings
            spent += seconds
        return [torch.cat(pieces)], spent

    def _forward(
        self, items: list[Item], media: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], float]:
        """One pass through the tower, and the seconds that it took."""
        with self._one_pass:  # two would share the device's memory, and each take twice as long
            start = time.perf_counter()
            embeddings = self._tower.encode(items, media)
            if self.device.type == "cuda":
                # Faults of kernels come out here, and readers need not know our stream.
                torch.cuda.current_stream(self.device).synchronize()
            seconds = time.perf_counter() - start
        expected = [(item.tokens, self.family.embedding_width) for item in items]
        got = [tuple(embedding.shape) for embedding in embeddings]
        if got != expected:
            raise InternalError(f"the tower made {got}, expected {expected}")
        return embeddings, seconds

    def _room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _answer(
        self, items: Sequence[Item], jobs: list[Job], room: Room
    ) -> Encoded | TriptychError:
        parts: list[torch.Tensor] = []
        entries: list[TicketItem] = []
        offset = 0
        for index, (item, job) in enumerate(zip(items, jobs, strict=True)):
            if not isinstance(job.result, torch.Tensor):
                error = job.result or InternalError("the item was not encoded")
                return type(error)(error.what, where=f"items[{index}]")
            parts.append(job.result)
            entries.append(_entry(item, job.result, offset))
            offset = aligned(offset + entries[-1].nbytes)
        try:
            whole = room(entries[-1].offset + entries[-1].nbytes if entries else 0)
        except TriptychError as error:
            return error
        _join(parts, entries, whole)
        keys = tuple(job.entry.key if job.entry else "" for job in jobs)
        return Encoded(whole, Ticket(entries), keys)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`EncoderSettings.encoder_dtype` as torch has it."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _join(parts: list[torch.Tensor], entries: list[TicketItem], whole: torch.Tensor) -> None:
    """Put each part at its entry's offset."""
    at = 0
    for part, entry in zip(parts, entries, strict=True):
        whole[at : entry.offset] = 0
        at = entry.offset + entry.nbytes
        whole[entry.offset : at].view(part.dtype).view(part.shape).copy_(part)


def _entry(item: Item, embeddings: torch.Tensor, offset: int) -> TicketItem:
    dtype: DType = str(embeddings.dtype).removeprefix("torch.")  # type: ignore[assignment]
    return TicketItem(
        modality=item.modality,
        hash=item.hash,
        dtype=dtype,
        shape=(embeddings.shape[0], embeddings.shape[1]),
        offset=offset,
        grid_thw=item.grid_thw,
        second_per_grid=item.second_per_grid,
    )


def _size(tower: object) -> str:
    if not isinstance(tower, torch.nn.Module):
        return type(tower).__name__
    return f"{sum(weight.numel() for weight in tower.parameters()) / 1e6:.2f} M parameters"
