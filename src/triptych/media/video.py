"""Clips: some frames, evenly in time, upright, in RGB, at the size the family plans.

Two passes over the file in memory. The first demuxes without decoding, which gives every frame's
true time and every keyframe even where headers say nothing or lie. The second decodes only from
the keyframe before each chosen frame.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from triptych.contract import VideoPlan
from triptych.errors import InvalidValue, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media.base import MediaOptions, Pixels, Planner
from triptych.media.container import VIDEO_CODECS, open_media, reading
from triptych.media.image import fit
from triptych.settings import MediaSettings

MAX_PACKETS = 1_000_000
"""Of one stream: an hour at 240 frames a second is less."""


_UNTIMED = frozenset({"avi"})
"""AVI numbers packets in the order of decoding, so with B-frames its times are not true."""
_INDEXED = frozenset({"mov", "matroska"})
"""Where a seek lands on the keyframe that was asked for, and not near it."""


@dataclass(frozen=True, slots=True)
class Index:
    """When a clip's frames are shown; times in ticks of ``tick`` seconds."""

    times: tuple[int, ...]
    """Of every frame, in order."""
    keys: tuple[int, ...]
    """Of those that decoding can start from; empty where a seek cannot be relied on."""
    tick: Fraction
    timed: bool
    """Whether a decoded frame's own time is one of ``times``; else its number tells."""

    @property
    def seconds(self) -> float:
        """Length, the last frame's own time included."""
        count = len(self.times)
        span = float((self.times[-1] - self.times[0]) * self.tick)
        return span * count / (count - 1) if count > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """The chosen frames."""

    frames: Pixels
    """Shape (frames, height, width, 3)."""
    timestamps: tuple[float, ...]
    """Seconds from the clip's first frame."""
    plan: VideoPlan


def load(data: bytes, planner: Planner, settings: MediaSettings, options: MediaOptions) -> Clip:
    """Decode the chosen frames of a clip.

    Raises:
        MediaType: Not a video container or codec that is served.
        MediaTooLarge: Longer, larger or more to decode than the limits.
        MediaUnreadable: Truncated or broken.
        InvalidValue: ``num_frames`` or ``fps`` out of bounds.
    """
    with reading("video"):
        with open_media(data, "video") as container:
            index = _index(container, _stream(container, settings))
        if index.seconds > settings.max_video_seconds:
            raise MediaTooLarge(
                f"the video lasts {index.seconds:.1f} s, over the limit of "
                f"{settings.max_video_seconds:g} s"
            )
        chosen = choose(index, options, settings)
        with open_media(data, "video") as container:
            frames = _Frames(container, _stream(container, settings), index, settings)
            return _clip(frames, chosen, index, planner)


def choose(index: Index, options: MediaOptions, settings: MediaSettings) -> list[int]:
    """The numbers of the frames to take.

    As the reference does, ``linspace(0, frames - 1, n)`` rounded down, and all frames of a clip
    that has fewer; where frames are not evenly spaced it is their times that are divided.

    Raises:
        InvalidValue: Both or too much of ``num_frames`` and ``fps``.
    """
    count = len(index.times)
    wanted = _wanted(index, options, settings)
    if count <= wanted:
        return list(range(count))
    steps = np.diff(np.asarray(index.times, dtype=np.int64))
    if steps.max() - steps.min() <= 2:  # rounding to ticks moves each end by one
        return [int(number) for number in np.linspace(0, count - 1, wanted)]
    moments = np.linspace(index.times[0], index.times[-1], wanted)
    return [bisect_right(index.times, moment) - 1 for moment in moments]


def _wanted(index: Index, options: MediaOptions, settings: MediaSettings) -> int:
    """How many frames to take; a rate is kept within ``max_frames``, a number must be."""
    if options.num_frames is not None and options.fps is not None:
        raise InvalidValue("num_frames and fps exclude each other")
    if options.fps is not None:
        return max(1, min(settings.max_frames, round(index.seconds * options.fps)))
    number = options.num_frames or min(settings.num_frames, settings.max_frames)
    if number > settings.max_frames:
        raise InvalidValue(f"num_frames must be at most {settings.max_frames}, got {number}")
    return number


def _stream(container: InputContainer, settings: MediaSettings) -> VideoStream:
    """The moving picture of the file; cover art is none."""
    moving = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not moving:
        raise MediaUnreadable("the file holds no video")
    stream = moving[0]
    codec = stream.codec_context
    if codec is None or codec.name not in VIDEO_CODECS:
        raise MediaType(f"the video's codec {codec.name if codec else 'unknown'!r} is not served")
    _check_size(codec.width, codec.height, settings)
    codec.thread_count = 1
    return stream


def _check_size(width: int, height: int, settings: MediaSettings) -> None:
    if width * height > settings.max_video_pixels:
        raise MediaTooLarge(
            f"the video has {width}×{height} = {width * height} pixels a frame, over the limit "
            f"of {settings.max_video_pixels}"
        )


def _index(container: InputContainer, stream: VideoStream) -> Index:
    """Every frame's time, without decoding one."""
    times: list[int | None] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        if len(times) > MAX_PACKETS:
            raise MediaTooLarge(f"the video has more than {MAX_PACKETS} frames")
    if not times:
        raise MediaUnreadable("the video holds no frames")
    known = sorted({time for time in times if time is not None})
    name = container.format.name
    if len(known) == len(times) and stream.time_base and name not in _UNTIMED:
        indexed = any(part in _INDEXED for part in name.split(","))
        return Index(tuple(known), tuple(sorted(keys)) if indexed else (), stream.time_base, True)
    # Frames without true times of their own are told apart by their order alone.
    rate = stream.average_rate or Fraction(25)
    return Index(tuple(range(len(times))), (), 1 / rate, timed=False)


class _Frames:
    """The decoder, walking forward and jumping where that is shorter."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        index: Index,
        settings: MediaSettings,
    ) -> None:
        self._container = container
        self._stream = stream
        self._index = index
        self._settings = settings
        self._decoded = 0
        self._number = 0
        self._source: Iterator[VideoFrame] = container.decode(stream)
        self._last: tuple[int, VideoFrame] | None = None
        self._ahead: tuple[int, VideoFrame] | None = None

    def at(self, time: int) -> VideoFrame:
        """The frame shown at ``time``; times must not fall from call to call.

        Raises:
            MediaUnreadable: The clip has none.
            MediaTooLarge: Too many frames had to be decoded.
        """
        self._jump(time)
        while self._last is None or self._last[0] < time:
            following = self._ahead or self._next()
            self._ahead = None
            if following is None:
                break
            if following[0] > time and self._last is not None:
                self._ahead = following
                break
            self._last = following
        if self._last is None:
            raise MediaUnreadable("no frame of the video can be decoded")
        return self._last[1]

    def _jump(self, time: int) -> None:
        """Go on from the last keyframe before ``time``, if that skips any."""
        keys = self._index.keys
        position = self._ahead or self._last
        here = position[0] if position else self._index.times[0]
        before = bisect_right(keys, time)
        if not before or keys[before - 1] <= here:
            return
        self._container.seek(keys[before - 1], stream=self._stream, backward=True)
        self._source = self._container.decode(self._stream)
        self._last = self._ahead = None

    def _next(self) -> tuple[int, VideoFrame] | None:
        frame = next(self._source, None)
        if frame is None:
            return None
        self._decoded += 1
        if self._decoded > self._settings.max_decoded_frames:
            raise MediaTooLarge(
                f"more than {self._settings.max_decoded_frames} frames of the video would have to "
                "be decoded"
            )
        number, self._number = self._number, self._number + 1
        if self._index.timed and frame.pts is not None:
            return frame.pts, frame
        return self._index.times[min(number, len(self._index.times) - 1)], frame


def _clip(frames: _Frames, chosen: Sequence[int], index: Index, planner: Planner) -> Clip:
    times = [index.times[number] for number in chosen]
    first = _upright(frames.at(times[0]))
    rate = len(chosen) / index.seconds if index.seconds else 1.0
    plan = planner.plan_video(len(chosen), first.height, first.width, rate)
    height, width = plan.crop or plan.resize
    pixels = np.empty((len(chosen), height, width, 3), np.uint8)
    pixels[0] = fit(first, plan)
    for place, time in enumerate(times[1:], 1):
        again = time == times[place - 1]
        pixels[place] = pixels[place - 1] if again else fit(_upright(frames.at(time)), plan)
    stamps = tuple(float((time - index.times[0]) * index.tick) for time in times)
    return Clip(pixels, stamps, plan)


def _upright(frame: VideoFrame) -> Image.Image:
    """In RGB, turned as the container's display matrix says."""
    picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    quarter = round(frame.rotation / 90) % 4
    turns = (
        None,
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_180,
        Image.Transpose.ROTATE_270,
    )
    turn = turns[quarter]
    return picture if turn is None else picture.transpose(turn)
