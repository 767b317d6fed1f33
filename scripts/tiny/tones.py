"""Sounds of a few tones, and their synthesis. Needs numpy alone.

rng = random.Random(7)
sound = random_sound(rng)                 # or Sound.of(["low", "high", "middle"])
samples = synthesise(sound)               # float32, mono, RATE samples a second
Path("tones.wav").write_bytes(wav(samples))
"""

from __future__ import annotations

import io
import random
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

RATE = 16_000
"""Samples a second."""
HERTZ: dict[str, tuple[float, float]] = {
    "low": (150.0, 320.0),
    "middle": (550.0, 900.0),
    "high": (1500.0, 2800.0),
}
PITCHES: tuple[str, ...] = tuple(HERTZ)
TIMBRES: dict[str, tuple[float, ...]] = {"sine": (1.0,), "soft": (1.0, 0.25, 0.1)}
"""Amplitudes of the fundamental and its harmonics."""
MAX_TONES = 5
FADE = 0.012
"""Seconds in which a tone comes and goes."""


@dataclass(frozen=True)
class Tone:
    """One tone.

    Attributes:
        pitch: One of PITCHES.
        hertz: Its frequency, within HERTZ[pitch].
        start: Seconds from the beginning of the sound.
        seconds: How long it lasts, 0.16 at least.
    """

    pitch: str
    hertz: float
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """Seconds from the beginning of the sound."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Sound:
    """Tones one after another, with silence between.

    Attributes:
        tones: In the order in which they are heard.
        seconds: How long the sound lasts.
        timbre: One of TIMBRES.
        level: Amplitude of the tones, at most 1.
        noise: Amplitude of the noise under them, 0 for none.
        seed: Of the noise.
    """

    tones: tuple[Tone, ...]
    seconds: float
    timbre: str = "sine"
    level: float = 0.5
    noise: float = 0.0
    seed: int = 0

    @property
    def pitches(self) -> tuple[str, ...]:
        """In order."""
        return tuple(tone.pitch for tone in self.tones)

    @classmethod
    def of(cls, pitches: Sequence[str], *, seconds: float = 0.25, gap: float = 0.2) -> Sound:
        """Plain tones of these pitches, equally long and equally far apart."""
        tones = tuple(
            Tone(pitch, round((HERTZ[pitch][0] * HERTZ[pitch][1]) ** 0.5), start, seconds)
            for pitch, start in (
                (pitch, 0.2 + index * (seconds + gap)) for index, pitch in enumerate(pitches)
            )
        )
        return cls(tones, tones[-1].end + 0.2)


def held_out(pitches: Sequence[str]) -> bool:
    """Whether this order of three tones or more is kept out of the training: one in seven is."""
    number = sum((PITCHES.index(pitch) + 1) * 4**index for index, pitch in enumerate(pitches))
    return len(pitches) >= 3 and number % 7 == 3


def random_sound(
    rng: random.Random,
    *,
    count: int | None = None,
    pitches: Sequence[str] | None = None,
    unseen: bool = False,
) -> Sound:
    """A random sound.

    Args:
        rng: Where every choice comes from.
        count: Number of tones, 1 to MAX_TONES; by default random.
        pitches: Their pitches, in place of `count`.
        unseen: Use an order that was kept out of the training (see `held_out`); of three tones or
            more then, unless `count` or `pitches` says otherwise.
    """
    while pitches is None:
        number = count or rng.randint(3 if unseen else 1, MAX_TONES)
        drawn = [rng.choice(PITCHES) for _ in range(number)]
        if number < 3 or held_out(drawn) == unseen:
            pitches = drawn
    tones = []
    start = rng.choice((0.0, rng.uniform(0.0, 0.5)))
    for pitch in pitches:
        low, high = HERTZ[pitch]
        tone = Tone(pitch, low * (high / low) ** rng.random(), start, rng.uniform(0.16, 0.36))
        tones.append(tone)
        start = tone.end + rng.uniform(0.12, 0.28)
    return Sound(
        tuple(tones),
        max(0.5, tones[-1].end + rng.uniform(0.03, 0.5)),
        rng.choice(tuple(TIMBRES)),
        rng.uniform(0.15, 0.9),
        rng.choice((0.0, 10 ** rng.uniform(-4.0, -2.0))),
        rng.getrandbits(32),
    )


def synthesise(sound: Sound, seconds: float | None = None) -> Samples:
    """The samples, float32 from -1 to 1, RATE a second, shape (samples,).

    Args:
        sound: What to play.
        seconds: How much of it, with silence (and the sound's noise) after its end.
    """
    samples = np.zeros(round((sound.seconds if seconds is None else seconds) * RATE), np.float32)
    amplitudes = TIMBRES[sound.timbre]
    for tone in sound.tones:
        start, length = round(tone.start * RATE), round(tone.seconds * RATE)
        time = np.arange(length, dtype=np.float32) / RATE
        played = sum(
            amplitude * np.sin(2 * np.pi * tone.hertz * harmonic * time)
            for harmonic, amplitude in enumerate(amplitudes, 1)
        )
        envelope = np.minimum(1.0, np.minimum(time, time[::-1]) / FADE)
        part = samples[start : start + length]
        part += (sound.level / sum(amplitudes) * played * envelope)[: len(part)]
    if sound.noise:
        noise = np.random.default_rng(sound.seed).standard_normal(len(samples), np.float32)
        samples += sound.noise * noise
    return np.clip(samples, -1.0, 1.0)


def wav(samples: Samples) -> bytes:
    """A WAV file: 16 bits, mono, RATE samples a second."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(integers(samples).astype("<i2").tobytes())
    return file.getvalue()


def integers(samples: Samples) -> NDArray[np.int16]:
    """From -1…1 to 16 bits."""
    rounded: NDArray[np.int16] = np.round(samples * 32767).astype(np.int16)
    return rounded
