"""The work of the stage ``preprocess`` apart from Triton: REQUEST to PROMPT, MEDIA and ITEMS."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from triptych import contract
from triptych.chat.messages import MediaPart, TensorPlace
from triptych.chat.prompt import MediumSize, PromptBuilder, Rendered
from triptych.chat.request import ChatRequest, parse
from triptych.contract import Items, Prompt
from triptych.errors import InvalidRequest, InvalidValue, TriptychError
from triptych.families.base import Family
from triptych.media.base import PRIORITY, RECEIVED, Given, Loaded, MediaOptions
from triptych.media.loader import MediaLoader
from triptych.settings import PreprocessSettings
from triptych.stages.arrival import Arrival, check, within
from triptych.stages.leased import Leased

logger = logging.getLogger("triptych.stages.preprocess")

MIB = 1 << 20
_DATA = re.compile(rb"([A-Za-z0-9+/]{64})[A-Za-z0-9+/=]{64,}")

MediaBytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that was read and checked, and whose media are still to be loaded."""

    request: ChatRequest
    rendered: Rendered
    media: tuple[MediaPart, ...]
    tensors: MediaBytes | None = None
    """TENSORS, that parts may name pieces of; shape (bytes,), uint8."""
    arrival: Arrival = field(default_factory=Arrival)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The three outputs of ``preprocess``."""

    prompt: bytes
    media: MediaBytes
    """Shape (1, bytes), uint8."""
    items: bytes


NO_MEDIA: MediaBytes = np.empty((1, 0), np.uint8)
NO_ITEMS = contract.encode(Items([]))


class Preparer:
    """Prepares the requests of one checkpoint.

    `begin` is synchronous and quick; `load` waits for media. Both are safe to call for several
    requests at a time.

    Args:
        settings: The stage's settings.
        family: The checkpoint's model family.
        loader: Loads media; `close` closes it.

    Raises:
        ConfigurationError: The checkpoint's template, tokenizer or generation_config is broken.
    """

    def __init__(self, settings: PreprocessSettings, family: Family, loader: MediaLoader) -> None:
        self._settings = settings
        self._family = family
        self._loader = loader
        self._leased = Leased()
        self._builder = PromptBuilder(
            settings.model,
            {modality: family.placeholder(modality) for modality in family.modalities},
            max_model_len=settings.max_model_len or family.context_length,
            family=family.name,
            unserved=family.unserved,
            chat_template=settings.chat_template,
        )

    def begin(
        self,
        data: bytes,
        tensors: MediaBytes | None = None,
        arrival: Arrival | None = None,
        *,
        on_media: Callable[[], None] = lambda: None,
    ) -> Begun:
        """Read REQUEST, and check all of it that can be checked before its media are there.

        Args:
            data: REQUEST.
            tensors: TENSORS, of shape (bytes,); None: the request came without it.
            arrival: When it came, and how much time it has; None: now, and all.
            on_media: Called as soon as it is known that there are some; may refuse.

        Raises:
            DeadlineExceeded: It has no time left.
            InvalidRequest: Whatever is wrong with it.
        """
        arrival = arrival or Arrival()
        check(arrival.deadline, "before its turn came")
        limit = self._settings.max_request_mb * MIB
        if len(data) > limit:
            raise InvalidRequest(f"the request has {len(data)} bytes, the limit is {limit}")
        request = parse(data)
        media = tuple(request.media)
        if len(media) > self._settings.max_items:
            raise InvalidValue(
                f"{len(media)} media in one request, the limit is {self._settings.max_items}",
                where="messages",
            )
        _check_places(media, tensors)
        if media:
            on_media()
        if self._settings.log_content:
            logger.info("request %s", shortened(data))
        rendered = self._builder.render(request)
        return Begun(request, rendered, media, tensors, arrival)

    def without_media(self, begun: Begun) -> Prepared:
        """The outputs of a request of text alone.

        Raises:
            ContextTooLong: Prompt and answer do not fit the context.
        """
        prompt = self._builder.build(begun.request, begun.rendered)
        return Prepared(_encode(prompt, begun), NO_MEDIA, NO_ITEMS)

    async def load(
        self, begun: Begun, received: Callable[[int], None] = lambda nbytes: None
    ) -> Prepared:
        """The outputs of a request with media, all of which load at the same time.

        Args:
            begun: The request.
            received: Told how many bytes come besides those in REQUEST and TENSORS.

        Raises:
            MediaError: One cannot be loaded; the others are given up.
            ContextTooLong: Prompt and answer do not fit the context.
            DeadlineExceeded: They take longer than the request has time.
        """
        PRIORITY.set(begun.request.priority or 0)
        RECEIVED.set(received)
        async with within(begun.arrival.deadline, "while its media were loading"):
            loaded = await _all([self._load(part, begun.tensors) for part in begun.media])
        for part, medium in zip(begun.media, loaded, strict=True):
            if medium.lease:
                self._leased.remember(medium.lease, part, medium.hash)
        sizes = [self._size(part, medium) for part, medium in zip(begun.media, loaded, strict=True)]
        prompt = self._builder.build(begun.request, begun.rendered, sizes)
        media, items = assemble([loaded[slot.medium] for slot in begun.rendered.slots])
        items = msgspec.structs.replace(items, deadline=begun.arrival.deadline)
        return Prepared(_encode(prompt, begun, loaded), media, contract.encode(items))

    async def again(self, lost: str) -> str | None:
        """Another lease of the medium of one that was sent and is lost; None: there is no way."""
        given = self._leased.take(lost)
        if given is None:
            return None
        try:
            loaded = await self._load(given.part, None)
        except TriptychError as error:
            logger.warning("a medium whose lease was lost cannot be loaded again: %s", error)
            return None
        if not loaded.lease or loaded.hash != given.hash:
            return None
        self._leased.remember(loaded.lease, given.part, given.hash)
        return loaded.lease

    def _size(self, part: MediaPart, medium: Loaded) -> MediumSize:
        """What the prompt must know of a medium."""
        if medium.modality != "video":
            return MediumSize(medium.tokens, medium.hash, cached=medium.cached)
        grid, seconds = medium.grid_thw, medium.second_per_grid
        try:
            times = self._family.prompt_times(grid, medium.timestamps, seconds)
        except InvalidValue as error:
            raise error.at(part.where) from None
        text = self._family.prompt_text(grid, times)
        return MediumSize(medium.tokens, medium.hash, text, times, medium.cached)

    async def start(self) -> None:
        """Have the loader ready for the first medium.

        Raises:
            InternalError: Its workers do not start.
        """
        await self._loader.start()

    async def close(self) -> None:
        """Give the loader's connections and workers back."""
        await self._loader.close()

    async def _load(self, part: MediaPart, tensors: MediaBytes | None) -> Loaded:
        if part.tensor is not None and tensors is not None:
            given = _given(part.tensor, tensors)
            return await self._loader.take(part.modality, given, where=part.where)
        options = MediaOptions(
            detail=part.detail,
            num_frames=part.num_frames,
            fps=part.fps,
            sampling_rate=part.sampling_rate,
            embeds=part.embeds,
            uuid=part.uuid or "",
        )
        return await self._loader.load(part.modality, part.url, where=part.where, options=options)


def assemble(loaded: Sequence[Loaded]) -> tuple[MediaBytes, Items]:
    """MEDIA and ITEMS of media in prompt order; a single medium is not copied.

    Returns:
        The bytes, uint8 of shape (1, bytes), and what is where in them.
    """
    items, offset, end = [], 0, 0
    for medium in loaded:
        items.append(medium.item(offset))
        end = offset + medium.nbytes
        offset = contract.aligned(end)
    if len(loaded) == 1:
        return _octets(loaded[0]).reshape(1, -1), Items(items)
    media = np.zeros(end, np.uint8)
    for item, medium in zip(items, loaded, strict=True):
        media[item.offset : item.offset + medium.nbytes] = _octets(medium)
    return media.reshape(1, -1), Items(items)


def _encode(prompt: Prompt, begun: Begun, loaded: Sequence[Loaded] = ()) -> bytes:
    """PROMPT, with the times of the request."""
    decoded = max((medium.decoded for medium in loaded if medium.decoded), default=time.monotonic())
    # What was decoded for another request may have been there before this one came.
    arrival = begun.arrival
    decoded = max(decoded, arrival.at)
    timed = msgspec.structs.replace(
        prompt,
        arrived=arrival.at,
        deadline=arrival.deadline,
        decoded=decoded,
        traceparent=arrival.traceparent,
    )
    return contract.encode(timed)


def shortened(data: bytes) -> str:
    """A REQUEST for the log: of media that are in it, their beginning."""
    return _DATA.sub(rb"\1...", data).decode("utf-8", "replace")


def _octets(medium: Loaded) -> MediaBytes:
    return np.ascontiguousarray(medium.array).reshape(-1).view(np.uint8)


def _check_places(media: Sequence[MediaPart], tensors: MediaBytes | None) -> None:
    """Whether the pieces that parts name lie in TENSORS, and whether any does.

    Raises:
        InvalidValue: At the part that names too much, or at TENSORS if nothing names it.
    """
    have = 0 if tensors is None else tensors.size
    placed = [(part, part.tensor) for part in media if part.tensor is not None]
    for part, place in placed:
        end = place.offset + _size(place)
        if end > have:
            raise InvalidValue(
                f"names bytes {place.offset} to {end} of the input {contract.REQUEST_TENSORS}, "
                f"which has {have}",
                where=part.where,
            )
    if have and not placed:
        raise InvalidValue(
            f"{have} bytes came, and no part names them", where=contract.REQUEST_TENSORS
        )


def _given(place: TensorPlace, tensors: MediaBytes) -> Given:
    piece = tensors[place.offset : place.offset + _size(place)]
    return Given(piece.tobytes(), place.dtype, place.shape, place.grid_thw)


def _size(place: TensorPlace) -> int:
    tokens, width = place.shape
    return tokens * width * contract.ITEM_SIZE[place.dtype]


async def _all(loads: Sequence[Coroutine[None, None, Loaded]]) -> list[Loaded]:
    """Every result in order; at the first failure the rest are cancelled and waited for."""
    tasks = [asyncio.ensure_future(load) for load in loads]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
