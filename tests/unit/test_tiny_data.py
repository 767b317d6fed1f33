"""The drawn shapes, clips and tones: what is asked of them is what they show."""

from __future__ import annotations

import io
import random
import wave

import numpy as np
import pytest

from tiny.clips import CLIP_TYPES, clip_example, random_clip
from tiny.examples import example
from tiny.questions import IMAGE_TYPES, PAIR_TYPES
from tiny.scenes import HELD_OUT, draw, held_out
from tiny.tone_questions import SOUND_PAIR_TYPES, SOUND_TYPES, sound_example
from tiny.tones import HERTZ, PITCHES, RATE, Sound, random_sound, synthesise, wav
from tiny.tones import held_out as held_out_order


def loudest_hertz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax()) * RATE / len(samples)


@pytest.mark.parametrize("type_", [*IMAGE_TYPES, *PAIR_TYPES])
def test_pictures_are_of_known_combinations_unless_asked_for_others(type_: str) -> None:
    rng = random.Random(type_)
    for _ in range(20):
        scenes, question = example(type_, rng)
        assert question.type == type_
        assert len(scenes) == 1 + (type_ in PAIR_TYPES)
        assert not any(map(held_out, scenes))
    unseen = [example(type_, rng, unseen=True)[0] for _ in range(10)]
    assert sum(any(map(held_out, scenes)) for scenes in unseen) >= 8


def test_a_seed_says_what_is_drawn() -> None:
    def drawn() -> bytes:
        return draw(example("contents", random.Random(3))[0][0]).tobytes()

    assert drawn() == drawn()


@pytest.mark.parametrize("type_", CLIP_TYPES)
def test_answers_about_clips_are_what_the_frames_show(type_: str) -> None:
    rng = random.Random(type_)
    for _ in range(20):
        clip, question = clip_example(type_, rng)
        shown = [scene.shapes[0] for scene in clip.frames(8)]
        first, last = shown[0], shown[-1]
        assert question.type == type_
        if type_ == "video_shape":
            assert first.kind in question.answer
        elif type_ == "video_colour":
            assert {shape.colour for shape in shown} == {first.colour}
            assert first.colour in question.answer
        elif type_ == "video_change":
            changed = f"from {first.colour} to {last.colour}."
            assert question.answer.endswith((changed, f"stays {first.colour}."))
            assert ("changes" in question.answer) == (first.colour != last.colour)
        elif type_ == "video_motion":
            step = np.sign(np.round(np.subtract(last.centre, first.centre), 9))
            way = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up"}
            assert way.get(tuple(map(int, step)), "does not move") in question.answer


def test_clips_show_every_pair_of_kind_and_colour() -> None:
    rng = random.Random(0)
    shapes = [random_clip(rng).scene.shapes[0] for _ in range(200)]
    assert {(shape.kind, shape.colour) for shape in shapes} >= HELD_OUT


@pytest.mark.parametrize("type_", [*SOUND_TYPES, *SOUND_PAIR_TYPES])
def test_answers_about_sounds_name_their_tones(type_: str) -> None:
    rng = random.Random(type_)
    for _ in range(30):
        sounds, question = sound_example(type_, rng)
        pitches = sounds[0].pitches
        expected = {
            "tone_pitch": f"The tone is {pitches[0]}.",
            "tone_order": ", ".join(pitches).capitalize() + ".",
            "tone_count": f"There are {len(pitches)} tones.".replace("are 1 tones", "is 1 tone"),
        }
        assert question.type == type_
        assert len(sounds) == 1 + (type_ in SOUND_PAIR_TYPES)
        assert question.answer == expected.get(type_, question.answer)
        assert not any(held_out_order(sound.pitches) for sound in sounds)
    if type_ != "tone_pitch":
        sounds, _ = sound_example(type_, rng, unseen=True)
        assert all(held_out_order(sound.pitches) for sound in sounds)


def test_tones_sound_as_high_as_they_are_named() -> None:
    rng = random.Random(1)
    for _ in range(20):
        sound = random_sound(rng)
        samples = synthesise(sound)
        assert samples.dtype == np.float32
        assert np.abs(samples).max() <= 1.0
        for tone in sound.tones:
            part = samples[round(tone.start * RATE) : round(tone.end * RATE)]
            low, high = HERTZ[tone.pitch]
            assert low - 10 <= loudest_hertz(part) <= high + 10


def test_silence_fills_a_sound_up_and_a_cut_ends_it() -> None:
    sound = Sound.of(PITCHES)
    whole = synthesise(sound)
    longer = synthesise(sound, sound.seconds + 1.0)
    assert len(longer) == len(whole) + RATE
    assert not longer[len(whole) :].any()
    assert np.array_equal(longer[: len(whole)], whole)
    assert np.array_equal(synthesise(sound, 0.3), whole[: round(0.3 * RATE)])


def test_a_wav_file_holds_the_samples() -> None:
    samples = synthesise(Sound.of(["low", "high"]))
    with wave.open(io.BytesIO(wav(samples))) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (RATE, 1, 2)
        read = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
    assert np.abs(read / 32767 - samples).max() <= 1 / 32767
