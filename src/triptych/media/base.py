"""What goes into the loader and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from triptych.contract import AudioPlan, DType, GridTHW, ImagePlan, Item, Modality, VideoPlan

PRIORITY: ContextVar[int] = ContextVar("priority", default=0)
"""Of the request that loads, the lower goes first: a loader knows media, and not what for."""
RECEIVED: ContextVar[Callable[[int], None]] = ContextVar("received", default=lambda nbytes: None)
"""Told how many bytes came for that request over the network or out of a file."""

Array = npt.NDArray[np.generic]
Pixels = npt.NDArray[np.uint8]
"""Shape (height, width, 3) or (frames, height, width, 3)."""


class Given(NamedTuple):
    """Embeddings that a caller sent as bare bytes."""

    data: bytes
    dtype: DType
    shape: tuple[int, int]
    """(tokens, width)."""
    grid_thw: GridTHW | None = None


class Room(Protocol):
    """Where a decoder puts its pixels."""

    def __call__(self, shape: tuple[int, int, int]) -> Pixels:
        """An array of ``shape``, uint8, C-contiguous, whose values mean nothing."""
        ...


def fresh(shape: tuple[int, int, int]) -> Pixels:
    """A `Room` in memory of its own."""
    return np.empty(shape, np.uint8)


class Planner(Protocol):
    """What a model family tells the loader; a `triptych.families.base.Family` is one.

    It is pickled into the worker processes, so it is light and imports no torch.
    """

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """The size for a picture of ``height`` × ``width`` pixels."""
        ...

    def plan_video(self, frames: int, height: int, width: int, fps: float) -> VideoPlan:
        """The size for ``frames`` sampled pictures of a clip, ``fps`` of them a second."""
        ...

    def plan_audio(self, samples: int) -> AudioPlan:
        """What ``samples`` at `audio_rate` become."""
        ...

    @property
    def audio_rate(self) -> int:
        """Samples a second that the audio tower hears, mono."""
        ...

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        """Check precomputed embeddings of ``shape`` (tokens, width) against the model."""
        ...


class MediaOptions(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a caller may ask of one medium."""

    detail: Literal["auto", "low", "high"] = "auto"
    """OpenAI's: ``low`` plans a picture as if it were no larger than 512 × 512."""
    num_frames: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Frames of a video, evenly over the clip."""
    fps: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Frames a second of a video; not together with ``num_frames``."""
    sampling_rate: Annotated[int, msgspec.Meta(gt=0)] | None = None
    """Samples a second that a sound is resampled to; None: what the family hears."""
    embeds: bool = False
    """The medium must be precomputed embeddings (OpenAI part ``image_embeds``)."""
    uuid: str = ""
    """The caller's name for a content: the same name and URL spare asking the origin again."""


class Holder(Protocol):
    """Who may have the embeddings of a medium already, so that its pixels are not needed."""

    async def find(self, key: str) -> Loaded | None:
        """The medium called ``key`` without its array; None: it is not held.

        Args:
            key: The loader's name for a content and all that was asked of it.
        """
        ...

    async def bring(self, key: str, loaded: Loaded) -> Loaded | None:
        """Have the medium called ``key`` held; None: it is not, and its array must be sent."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Loaded:
    """One medium, decoded, at the size that the planner asked for."""

    modality: Modality
    array: Array
    """C-contiguous. image: (height, width, 3) uint8 · video: (frames, height, width, 3) uint8 ·
    audio: (samples,) float32 · embeddings: (tokens, width), bfloat16 held as uint16."""
    hash: str
    """blake3, hex: the content and all that changed the array."""
    tokens: int
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    """Seconds from one temporal patch of a video to the next."""
    precomputed: bool = False
    dtype: DType = "uint8"
    timestamps: tuple[float, ...] = field(default=())
    """Seconds from the start of a video, one a frame."""
    lease: str = ""
    """The `Holder`'s word to keep the embeddings; ``array`` is empty then."""
    leased_shape: tuple[int, ...] = ()
    """Of the array that there is none of."""
    keep: bool = True
    """False: its origin forbids that anything made of it is stored (RFC 9111)."""
    cached: bool = False
    """The `Holder` had it."""
    decoded: float = 0.0
    """When its array was there, `time.monotonic` seconds; 0: there was no need of one."""

    @property
    def nbytes(self) -> int:
        """Length in MEDIA, bytes."""
        return self.array.nbytes

    def item(self, offset: int) -> Item:
        """The entry in ITEMS of this medium when its bytes start at ``offset``."""
        return Item(
            modality=self.modality,
            hash=self.hash,
            dtype=self.dtype,
            shape=self.leased_shape or tuple(int(extent) for extent in self.array.shape),
            offset=offset,
            tokens=self.tokens,
            grid_thw=self.grid_thw,
            second_per_grid=self.second_per_grid,
            precomputed=self.precomputed,
            lease=self.lease,
            keep=self.keep,
        )

    def __repr__(self) -> str:
        return (
            f"Loaded({self.modality}, {self.dtype} {self.array.shape}, tokens={self.tokens}, "
            f"hash={self.hash[:12]}…)"
        )
