"""Questions about sounds, the only right answer to each, and conversations of them."""

from __future__ import annotations

import random

from .chats import (
    DEFAULT_SYSTEM,
    OTHER_ANSWER,
    OTHER_TOPICS,
    Chat,
    Turn,
    add_turn,
    count_aloud,
    loosely,
)
from .questions import Question
from .tones import MAX_TONES, PITCHES, Sound, random_sound

SOUND_TYPES: tuple[str, ...] = (
    "tone_pitch",
    "tone_count",
    "tone_order",
    "tone_nth",
    "tone_step",
    "tone_description",
)
SOUND_PAIR_TYPES: tuple[str, ...] = ("compare_tones",)
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NO_SOUND = "There is no sound."
ONLY_SOUNDS = OTHER_ANSWER.replace("pictures of shapes", "sounds of tones")
SYSTEMS = ("You listen to tones.", "Answer briefly.", "You are Triptych, a multimodal assistant.")

PHRASES: dict[str, tuple[str, ...]] = {
    "tone_pitch": (
        "Is the tone low, middle or high?",
        "How high is the tone?",
        "What is the pitch of the tone?",
        "Is the sound low, middle or high?",
    ),
    "tone_count": (
        "How many tones are there?",
        "How many tones do you hear?",
        "Count the tones.",
        "How many tones are in the sound?",
        "How many tones?",
    ),
    "tone_order": (
        "Which tones do you hear?",
        "In what order do the tones come?",
        "Name the tones in order.",
        "What are the tones?",
        "What is the order of the tones?",
    ),
    "tone_nth": (
        "Is the {nth} tone low, middle or high?",
        "How high is the {nth} tone?",
        "What is the pitch of the {nth} tone?",
        "What is the {nth} tone?",
    ),
    "tone_step": (
        "Is the {later} tone higher or lower than the {nth} tone?",
        "Is the {later} tone higher or lower than the {nth}?",
        "Compare the {later} tone with the {nth} tone.",
    ),
    "tone_description": (
        "Describe the sound.",
        "What do you hear?",
        "What is in the sound?",
        "What is this?",
        "Please describe what you hear.",
    ),
    "compare_tones": (
        "Which sound has more tones?",
        "Which of the two sounds has more tones?",
        "In which sound are there more tones?",
    ),
}
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning"), "Hello! Play me some tones."),
    (
        ("Who are you?", "What are you?", "Tell me about yourself."),
        "I am a tiny model that listens to tones.",
    ),
    (("What can you do?", "How can you help me?", "Help"), "I can tell you what tones I hear."),
    (("Thank you", "Thanks!", "Thanks", "Thank you!"), "You are welcome."),
    (("Bye", "Goodbye", "Bye!"), "Goodbye!"),
)


def sound_questions(sound: Sound, rng: random.Random) -> list[Question]:
    """One question of every type that has one right answer for this sound, phrased at random."""
    pitches = sound.pitches
    count = len(pitches)
    result = []
    if count == 1:
        result.append(_ask(rng, "tone_pitch", f"The tone is {pitches[0]}."))
    tones = "There is 1 tone." if count == 1 else f"There are {count} tones."
    result.append(_ask(rng, "tone_count", tones))
    listed = ", ".join(pitches)
    result.append(_ask(rng, "tone_order", listed[0].upper() + listed[1:] + "."))
    which = rng.randrange(count)
    nth = "last" if which == count - 1 and rng.random() < 0.4 else ORDINALS[which]
    result.append(_ask(rng, "tone_nth", f"The {nth} tone is {pitches[which]}.", nth=nth))
    if count > 1:
        result.append(_step(sound, rng))
    if count == 1:
        described = f"A {pitches[0]} tone."
    else:
        described = f"{count} tones: {', '.join(pitches[:-1])} and {pitches[-1]}."
    result.append(_ask(rng, "tone_description", described))
    return result


def sound_pair_question(first: Sound, second: Sound, rng: random.Random) -> Question:
    """The question of SOUND_PAIR_TYPES about these two."""
    a, b = len(first.tones), len(second.tones)
    answer = f"The {'first' if a > b else 'second'} sound has more tones."
    if a == b:
        answer = "Both have the same number of tones."
    return _ask(rng, "compare_tones", answer)


def sound_example(
    type_: str, rng: random.Random, *, unseen: bool = False
) -> tuple[list[Sound], Question]:
    """A sound, or two for SOUND_PAIR_TYPES, and a question of this type.

    Args:
        type_: One of SOUND_TYPES or SOUND_PAIR_TYPES.
        rng: Where every choice comes from.
        unseen: Use orders of tones that were kept out of the training; "tone_pitch" has none.
    """
    if type_ in SOUND_PAIR_TYPES:
        counts = [rng.randint(3 if unseen else 1, MAX_TONES) for _ in range(2)]
        if rng.random() < 0.25:
            counts[1] = counts[0]
        first, second = (random_sound(rng, count=n, unseen=unseen) for n in counts)
        return [first, second], sound_pair_question(first, second, rng)
    if type_ not in SOUND_TYPES:
        raise ValueError(f"no such type of question about sounds: {type_!r}")
    if type_ == "tone_pitch":
        sound = random_sound(rng, count=1)
    else:
        least = 3 if unseen else 2 if type_ == "tone_step" else 1
        sound = random_sound(rng, count=rng.randint(least, MAX_TONES), unseen=unseen)
    return [sound], next(q for q in sound_questions(sound, rng) if q.type == type_)


def random_sound_chat(rng: random.Random) -> Chat:
    """A conversation of the training's mixture, about one sound, two, or none."""
    roll = rng.random()
    chat = Chat(DEFAULT_SYSTEM if roll < 0.8 else None if roll < 0.87 else rng.choice(SYSTEMS))
    roll = rng.random()
    if roll < 0.06:
        chat.turns.append(_no_sound(rng))
        return chat
    type_ = rng.choice(SOUND_TYPES if roll < 0.85 else SOUND_PAIR_TYPES)
    sounds, first = sound_example(type_, rng)
    add_turn(chat, sounds, first, rng)
    others = sound_questions(sounds[0], rng) if len(sounds) == 1 else []
    for asked in rng.sample(others, min(len(others), rng.choice((0, 1, 2, 3)))):
        add_turn(chat, [], asked, rng)
    return chat


def every_sound_text() -> list[str]:
    """Texts that hold every word: what the tokenizer is trained on."""
    rng = random.Random(0)
    texts = [DEFAULT_SYSTEM, *SYSTEMS, NO_SOUND, ONLY_SOUNDS, *OTHER_TOPICS]
    texts += ["system", "user", "assistant", "Audio 1: ", *PITCHES, *ORDINALS]
    for asked, answer in SMALL_TALK:
        texts += [*asked, answer]
    for type_ in SOUND_TYPES + SOUND_PAIR_TYPES:
        for _ in range(100):
            question = sound_example(type_, rng)[1]
            texts += [question.text, question.answer]
    return texts + [f"{n}, " for n in range(10)] + ["Count to 10.", "Please count from 1 to 20."]


def _ask(rng: random.Random, type_: str, answer: str, **fields: str) -> Question:
    return Question(type_, rng.choice(PHRASES[type_]).format(**fields), answer)


def _step(sound: Sound, rng: random.Random) -> Question:
    """Two neighbouring tones, of different pitch where there are such, mostly."""
    pitches = [PITCHES.index(pitch) for pitch in sound.pitches]
    places = list(range(len(pitches) - 1))
    differing = [i for i in places if pitches[i] != pitches[i + 1]]
    at = rng.choice(differing if differing and rng.random() < 0.5 else places)
    answer = "It is lower." if pitches[at + 1] < pitches[at] else "It is higher."
    if pitches[at + 1] == pitches[at]:
        answer = f"Both are {sound.pitches[at]}."
    return _ask(rng, "tone_step", answer, nth=ORDINALS[at], later=ORDINALS[at + 1])


def _no_sound(rng: random.Random) -> Turn:
    roll = rng.random()
    if roll < 0.3:
        return count_aloud(rng)
    if roll < 0.5:
        return Turn([loosely(rng, rng.choice(OTHER_TOPICS))], ONLY_SOUNDS, "text")
    if roll < 0.75:
        asked = sound_example(rng.choice(SOUND_TYPES), rng)[1]
        return Turn([loosely(rng, asked.text)], NO_SOUND, "text")
    greetings, answer = rng.choice(SMALL_TALK)
    return Turn([loosely(rng, rng.choice(greetings))], answer, "text")
