"""Sounds: mono float32 at the rate the family hears.

Channels are averaged, as librosa does; resampling is soxr's HQ. Nothing is allocated by what a
header claims: samples are counted as they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import av
import numpy as np
import numpy.typing as npt
import soxr
from av.audio.stream import AudioStream
from av.container import InputContainer

from triptych.contract import AudioPlan
from triptych.errors import InvalidValue, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media.base import MediaOptions, Planner
from triptych.media.container import AUDIO_CODECS, open_media, reading
from triptych.settings import MediaSettings

Samples = npt.NDArray[np.float32]
"""Shape (samples,), mono, full scale at ±1."""

RATES = range(1_000, 384_001)
"""Samples a second that a file may have or a caller may ask for."""


def load(
    data: bytes, planner: Planner, settings: MediaSettings, options: MediaOptions
) -> tuple[Samples, AudioPlan]:
    """Decode a sound, or the sound of a video.

    ``sampling_rate`` is the rate that the caller wants heard; what the tower takes is the family's
    own, so a lower one leaves out what lies above half of it.

    Raises:
        MediaType: Not a container or codec that is served.
        MediaTooLarge: Longer, or of more channels, than the limits.
        MediaUnreadable: Empty, truncated or broken.
        InvalidValue: ``sampling_rate`` out of bounds.
    """
    asked = options.sampling_rate
    if asked is not None and asked not in RATES:
        raise InvalidValue(
            f"sampling_rate must be from {RATES.start} to {RATES.stop - 1}, got {asked}"
        )
    heard = planner.audio_rate
    with reading("audio"), open_media(data, "audio") as container:
        stream = _stream(container, settings)
        rate = stream.codec_context.sample_rate
        _check_seconds((container.duration or 0) / av.time_base, settings)
        sound = _resampled(_mono(container, stream, settings), rate, asked or rate)
        samples = np.concatenate(
            [*_resampled(sound, asked or rate, heard), np.empty(0, np.float32)]
        )
    if not samples.size:
        raise MediaUnreadable("the file holds no sound")
    if not math.isfinite(float(samples.sum(dtype=np.float64))):
        raise MediaUnreadable("the sound has samples that are not numbers")
    return samples, planner.plan_audio(samples.size)


def _stream(container: InputContainer, settings: MediaSettings) -> AudioStream:
    if not container.streams.audio:
        raise MediaUnreadable("the file holds no sound")
    stream = container.streams.audio[0]
    codec = stream.codec_context
    if codec is None or codec.name not in AUDIO_CODECS:
        raise MediaType(f"the sound's codec {codec.name if codec else 'unknown'!r} is not served")
    if codec.sample_rate not in RATES:
        raise MediaUnreadable(f"the sound has {codec.sample_rate} samples a second")
    if codec.channels > settings.max_audio_channels:
        raise MediaTooLarge(
            f"the sound has {codec.channels} channels, over the limit of "
            f"{settings.max_audio_channels}"
        )
    codec.thread_count = 1
    return stream


def _mono(
    container: InputContainer, stream: AudioStream, settings: MediaSettings
) -> Iterator[Samples]:
    """The samples as they come, channels averaged."""
    rate, count = stream.codec_context.sample_rate, 0
    planar = av.AudioResampler(format="fltp", rate=rate)
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise MediaUnreadable("the sound changes its sampling rate")
        for part in planar.resample(frame):
            mono = part.to_ndarray().mean(axis=0, dtype=np.float32)
            count += mono.size
            _check_seconds(count / rate, settings)
            yield mono


def _check_seconds(seconds: float, settings: MediaSettings) -> None:
    if seconds > settings.max_audio_seconds:
        raise MediaTooLarge(
            f"the sound lasts over {settings.max_audio_seconds:g} s, which is the limit"
        )


def _resampled(parts: Iterator[Samples], rate: int, wanted: int) -> Iterator[Samples]:
    """``parts`` at ``wanted`` samples a second, in parts."""
    if rate == wanted:
        yield from parts
        return
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    for part in parts:
        yield stream.resample_chunk(part)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)
