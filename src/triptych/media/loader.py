"""All media behind one call: `MediaLoader.load`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import blake3
import msgspec

from triptych.contract import Modality
from triptych.errors import (
    InternalError,
    MediaForbidden,
    MediaTimeout,
    MediaTooLarge,
    MediaType,
    MediaUnreachable,
    MediaUnreadable,
    TriptychError,
)
from triptych.media import datauri, embeddings
from triptych.media.base import RECEIVED, Given, Holder, Loaded, MediaOptions, Planner
from triptych.media.cache import Counters, Flights, MediaCache, Origin
from triptych.media.fetch import Fetched, Fetcher
from triptych.media.policy import Policy
from triptych.media.pool import WorkerPool
from triptych.media.sniff import describe, sniff
from triptych.media.worker import Job, Start
from triptych.settings import MediaSettings

logger = logging.getLogger("triptych.media")

MIB = 1 << 20
INLINE_BYTES = 1 * MIB
"""Up to this size hashing and base64 cost less than a thread does."""
MAX_WORKERS = 4
"""Decoding processes when the settings name no number."""

TYPES: dict[Modality, tuple[str, ...]] = {
    "image": ("image/",),
    "video": ("video/", "application/mp4", "application/ogg"),
    "audio": ("audio/", "video/", "application/mp4", "application/ogg"),
}
"""Declared media types that are believed, apart from plain binary; a sound may be a video's."""
_BINARY = ("application/octet-stream", "application/x-safetensors")


class Content(msgspec.Struct, frozen=True):
    """One file, as it came, and where its decoded form may be kept."""

    data: bytes
    hash: str
    storable: bool = True


class MediaLoader:
    """Fetches, checks and decodes what callers name.

    It belongs to one event loop. `close` ends its processes and connections.

    Args:
        settings: The limits.
        planner: The model family, which says what size each medium must have.
        fetcher: The HTTP client; one made from the settings unless given.
        holder: Who may need no pixels of what it had before; `close` closes it.
        on_step: Told the seconds of each ``fetch`` over the network and each ``decode``, the
            waiting for a worker included.
    """

    def __init__(
        self,
        settings: MediaSettings,
        planner: Planner,
        *,
        fetcher: Fetcher | None = None,
        holder: Holder | None = None,
        on_step: Callable[[str, float], None] = lambda step, seconds: None,
    ) -> None:
        self.settings = settings
        self._planner = planner
        self._holder = holder
        self._on_step = on_step
        self._policy = Policy(settings)
        self._fetcher = fetcher or Fetcher(settings, self._policy)
        self._cache = MediaCache(settings.media_cache_mb * MIB, settings.media_cache_urls)
        self._fetches: Flights[Content | None] = Flights(self._joined)
        self._decodes: Flights[Loaded] = Flights(self._joined)
        memory = settings.media_worker_memory_mb * MIB
        self._pool = WorkerPool(
            Start(planner, settings, memory, ("triptych.media.image",)),
            size=settings.media_workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))),
            max_queued=settings.max_queued_media,
            timeout_s=settings.decode_timeout_s,
        )
        self._pickles = WorkerPool(
            Start(planner, settings, memory, ("torch", "triptych.media.embeddings")),
            size=1,
            max_queued=settings.max_queued_media,
            timeout_s=settings.decode_timeout_s,
            recycle_after=1,
            must_confine=True,
        )

    @property
    def counters(self) -> Counters:
        """What the caches of this process did so far."""
        return self._cache.counters

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the decoding workers."""
        return self._pool.pids

    async def start(self) -> None:
        """Have a worker ready before the first medium comes; `load` works without it.

        Raises:
            InternalError: Workers do not start here, and no medium could be decoded.
        """
        await self._pool.warm()

    async def load(
        self, modality: Modality, url: str, *, where: str, options: MediaOptions | None = None
    ) -> Loaded:
        """One medium, ready for MEDIA.

        A cancelled load stops its fetch and gives its worker back, unless another load waits
        for the same.

        Args:
            modality: What the caller says it is.
            url: ``http:``, ``https:``, ``data:`` or ``file:``.
            where: JSON path of the part, for errors.
            options: What the caller asks of it.

        Raises:
            MediaError: Whatever is wrong with it, at ``where``.
            UnsupportedMedium: The family does not take it.
            Overloaded: Too many wait to be decoded.
        """
        try:
            return await self._load(modality, url, options or MediaOptions())
        except TriptychError as error:
            raise type(error)(error.what, where=error.where or where) from error
        except Exception as error:
            logger.exception("loading %s at %s failed", modality, where)
            raise InternalError(f"loading the {modality} failed", where=where) from error

    async def take(self, modality: Modality, given: Given, *, where: str) -> Loaded:
        """Embeddings that came beside the request; checked as those in a file are.

        Args:
            modality: What they are embeddings of.
            given: Their bytes, and what the caller says of them.
            where: JSON path of the part, for errors.

        Raises:
            MediaTooLarge: More bytes or tokens than the limit.
            InvalidValue: Shape, grid or values that the model does not take.
            UnsupportedMedium: The family does not take them.
        """
        limit = self._limit(modality, MediaOptions(embeds=True))
        if len(given.data) > limit:
            raise MediaTooLarge(
                f"the embeddings have {len(given.data)} bytes, over the limit of {limit}",
                where=where,
            )

        def read() -> tuple[embeddings.Embeddings, str]:
            most = self.settings.max_embedding_tokens
            found = embeddings.check(given, modality, self._planner, max_tokens=most)
            return found, blake3.blake3(given.data).hexdigest()

        try:
            small = len(given.data) <= INLINE_BYTES
            found, content = read() if small else await asyncio.to_thread(read)
        except TriptychError as error:
            raise type(error)(error.what, where=where) from error
        stamp = msgspec.json.encode((given.dtype, given.shape, given.grid_thw)).decode()
        return Loaded(
            modality=modality,
            array=found.array,
            hash=blake3.blake3(f"{content} {modality} tensor {stamp}".encode()).hexdigest(),
            tokens=found.array.shape[0],
            grid_thw=found.grid_thw,
            precomputed=True,
            dtype=found.dtype,
        )

    async def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._holder:
            await self._holder.close()
        await self._fetcher.close()
        await self._pool.close()
        await self._pickles.close()

    async def _load(self, modality: Modality, url: str, options: MediaOptions) -> Loaded:
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        if scheme in ("http", "https"):
            return await self._remote(modality, url, options)
        if scheme == "data":
            content = await self._data_uri(modality, url, options)
        elif scheme == "file":
            content = await self._file(modality, url, options)
        else:
            raise MediaForbidden(
                f"media is served from http, https, data and file URLs, got {url[:40]!r}"
            )
        return await self._decoded(modality, content, options)

    async def _remote(self, modality: Modality, url: str, options: MediaOptions) -> Loaded:
        """By http or https; the cache may spare the fetch, the decoding or both."""
        self._policy.check_url(url)
        known = self._cache.origin(url)
        key = _key(modality, known.hash, options) if known else ""
        kept = await self._kept(key) if known else None
        if known and kept:
            named = self._cache.named(options.uuid, url) == known.hash
            if named or known.fresh_until > time.monotonic():
                self.counters.hits += 1
                return await self._brought(key, kept)
        validators = known.validators if known and kept else {}
        limit = self._limit(modality, options)

        async def fetch() -> Content | None:
            began = time.monotonic()
            fetched = await self._fetcher.fetch(
                url,
                types=TYPES[modality],
                max_bytes=limit,
                timeout_s=self._fetch_timeout(modality),
                validators=validators,
            )
            self._on_step("fetch", time.monotonic() - began)
            return self._received(url, fetched, known if validators else None)

        content = await self._fetches.run(f"{modality}:{limit}:{validators}:{url}", fetch)
        self._cache.name(options.uuid, url)
        if content is None and kept is not None:
            self.counters.hits += 1
            return await self._brought(key, kept)
        if content is None:
            raise MediaUnreachable("the host says that nothing has changed, which was not asked")
        return await self._decoded(modality, content, options)

    def _received(self, url: str, fetched: Fetched, known: Origin | None) -> Content | None:
        """The content of an answer, None when it is the one known; the cache learns of it."""
        self.counters.fetched_bytes += len(fetched.data)
        if fetched.not_modified:
            if known is not None:
                self.counters.revalidated += 1
                self._cache.remember(url, known.renewed(fetched.headers))
            return None
        origin = Origin.read(fetched.hash, fetched.headers)
        self._cache.remember(url, origin)
        return Content(fetched.data, fetched.hash, storable=origin is not None)

    async def _data_uri(self, modality: Modality, url: str, options: MediaOptions) -> Content:
        def read() -> tuple[Content, str]:
            data, media_type = datauri.decode(url, max_bytes=self._limit(modality, options))
            return Content(data, blake3.blake3(data).hexdigest()), media_type

        small = len(url) <= INLINE_BYTES
        content, media_type = read() if small else await asyncio.to_thread(read)
        if media_type not in _BINARY and not media_type.startswith(TYPES[modality]):
            raise MediaType(
                f"the data: URI of this {modality} must be {TYPES[modality][0]}* or "
                f"{_BINARY[0]}, got {media_type[:100]!r}"
            )
        return content

    async def _file(self, modality: Modality, url: str, options: MediaOptions) -> Content:
        limit, timeout_s = self._limit(modality, options), self._fetch_timeout(modality)

        def read() -> Content:
            with (
                self._policy.open_file(url, max_bytes=limit) as handle,
                open(handle, "rb", closefd=False) as file,
            ):
                data = file.read(min(limit, os.fstat(handle).st_size) + 1)
            if len(data) > limit:
                raise MediaTooLarge(f"the file holds more than the limit of {limit} bytes")
            return Content(data, blake3.blake3(data).hexdigest())

        try:
            async with asyncio.timeout(timeout_s):
                content = await asyncio.to_thread(read)
        except TimeoutError:
            raise MediaTimeout(f"the file was not read within {timeout_s:g} s") from None
        except OSError as error:
            raise MediaUnreadable(f"the file cannot be read: {error.strerror}") from error
        RECEIVED.get()(len(content.data))
        return content

    async def _decoded(self, modality: Modality, content: Content, options: MediaOptions) -> Loaded:
        """From who holds it, the cache, a decode under way, or a worker."""
        key = _key(modality, content.hash, options)
        if content.storable and (kept := await self._kept(key)):
            self.counters.hits += 1
            return await self._brought(key, kept)
        return await self._shared(key, lambda: self._decode(key, modality, content, options))

    async def _kept(self, key: str) -> Loaded | None:
        """What was decoded before: a lease of its embeddings, or its pixels."""
        held = await self._holder.find(key) if self._holder else None
        return held or self._cache.get(key)

    async def _brought(self, key: str, kept: Loaded) -> Loaded:
        """A lease in place of pixels, if there is who holds them."""

        async def same() -> Loaded:
            return kept

        if kept.lease or not self._holder:
            return kept
        return await self._shared(key, same)

    async def _shared(self, key: str, load: Callable[[], Awaitable[Loaded]]) -> Loaded:
        """What ``load`` gives, brought to who holds it; done once for all who want it now."""
        own: Loaded | None = None

        async def work() -> Loaded:
            nonlocal own
            loaded = replace(await load(), decoded=time.monotonic())
            own = await self._holder.bring(key, loaded) if self._holder else None
            return loaded

        loaded = await self._decodes.run(key, work)
        if own or not self._holder or not loaded.keep:
            return own or loaded
        # A lease is good for one use: whoever has joined asks for another.
        found = await self._holder.find(key)
        return replace(found, decoded=loaded.decoded, cached=False) if found else loaded

    async def _decode(
        self, key: str, modality: Modality, content: Content, options: MediaOptions
    ) -> Loaded:
        self.counters.misses += 1
        kind = self._kind(modality, content.data, options)
        pool = self._pickles if kind == "pickle" else self._pool
        job = Job(modality, kind, len(content.data), options)
        began = time.monotonic()
        array, answer = await pool.run(job, content.data)
        self._on_step("decode", time.monotonic() - began)
        digest = blake3.blake3(f"{content.hash} {modality} {kind} {answer.stamp}".encode())
        loaded = Loaded(
            modality=modality,
            array=array,
            hash=digest.hexdigest(),
            tokens=answer.tokens,
            grid_thw=answer.grid_thw,
            second_per_grid=answer.second_per_grid,
            precomputed=answer.precomputed,
            dtype=answer.dtype,
            timestamps=answer.timestamps,
            keep=content.storable,
        )
        if content.storable:
            self._cache.put(key, loaded)
        return loaded

    def _kind(self, modality: Modality, data: bytes, options: MediaOptions) -> str:
        """The decoder for these bytes.

        Raises:
            MediaType: Embeddings were announced, and these are none.
            MediaForbidden: A pickle, and they are not allowed.
        """
        found = sniff(data)
        if found and found.kind == "embeddings":
            return "embeddings"
        if found and found.kind == "pickle":
            if not self.settings.allow_pickle_embeddings:
                raise MediaForbidden(
                    "pickled embeddings (.pt, .pth, .bin) are not served; send safetensors, "
                    "or have allow_pickle_embeddings set"
                )
            return "pickle"
        if options.embeds:
            got = found.name if found else describe(data)
            raise MediaType(f"embeddings must be safetensors, got {got}")
        return modality

    def _limit(self, modality: Modality, options: MediaOptions) -> int:
        """Bytes that a file may have."""
        kind = "embeddings" if options.embeds else modality
        override: int = getattr(self.settings, f"{kind}_max_file_size_mb")
        return (override or self.settings.max_file_size_mb) * MIB

    def _fetch_timeout(self, modality: Modality) -> float:
        video = modality == "video"
        return self.settings.video_fetch_timeout_s if video else self.settings.fetch_timeout_s

    def _joined(self) -> None:
        self.counters.joined += 1


def _key(modality: Modality, content_hash: str, options: MediaOptions) -> str:
    """What a decoded medium is kept under: the content and all that a caller may ask of it."""
    asked = msgspec.json.encode(msgspec.structs.replace(options, uuid="")).decode()
    return f"{content_hash}:{modality}:{asked}"
