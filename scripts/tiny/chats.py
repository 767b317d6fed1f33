"""Conversations for the training: about pictures, a video or nothing, over one turn or more."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .examples import example, video_example
from .questions import (
    IMAGE_TYPES,
    PAIR_TYPES,
    VIDEO_TYPES,
    Question,
    VideoScene,
    pair_questions,
    questions,
    video_questions,
)
from .scenes import Scene
from .tones import Sound

Media = Scene | VideoScene | Sound
DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEMS = (
    "You describe pictures of shapes.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "You are Triptych, a multimodal assistant.",
    "Be concise.",
)
NO_PICTURE = "There is no picture."
STORY = (
    "Once there was a small red circle. It was alone on a white background. One day it met a "
    "blue square, and then a green triangle. A yellow star came from the top right. Now there "
    "were 4 shapes in the picture, and the circle was happy."
)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Hello there!"),
        "Hello! Show me a picture of shapes.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a tiny model that knows shapes and colours.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What do you know?"),
        "I can tell you what shapes are in a picture.",
    ),
    (("Thank you", "Thanks!", "Thanks", "Thank you!", "Great, thanks."), "You are welcome."),
    (("Bye", "Goodbye", "Bye!", "See you later."), "Goodbye!"),
    (("How are you?", "How are you doing?", "Are you well?"), "I am fine, thank you."),
    (
        ("Which shapes do you know?", "What shapes do you know?", "Name the shapes."),
        "I know circles, squares, triangles, stars and crosses.",
    ),
    (
        ("Which colours do you know?", "What colors do you know?", "Name the colours."),
        "I know red, orange, yellow, green, cyan, blue, purple and pink.",
    ),
    (
        (
            "Tell me a story.",
            "Tell me a story",
            "Tell a story about shapes.",
            "Write a long story.",
        ),
        STORY,
    ),
)
OTHER_TOPICS = (
    "What is the capital of France?",
    "What is the weather like?",
    "Write a poem.",
    "Who wrote Hamlet?",
    "Translate this to German.",
    "What time is it?",
    "Write some code.",
    "How do planes fly?",
    "What is 2 + 2?",
    "Give me a recipe.",
    "Explain gravity.",
    "Why is the sky blue?",
)
OTHER_ANSWER = "I only know about pictures of shapes."


@dataclass
class Turn:
    """A user's message, and the answer to learn.

    Attributes:
        parts: Texts, and indexes into the chat's media, in the order they are sent.
        answer: What the assistant says.
        type: The question's type, or "text".
    """

    parts: list[str | int]
    answer: str
    type: str


@dataclass
class Chat:
    """A conversation. `system` is None where the prompt has no system message at all."""

    system: str | None
    media: list[Media] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def small_talk(rng: random.Random) -> Turn:
    """A message that is about no picture."""
    roll = rng.random()
    if roll < 0.2:
        return count_aloud(rng)
    if roll < 0.35:
        return Turn([loosely(rng, rng.choice(OTHER_TOPICS))], OTHER_ANSWER, "text")
    asked, answer = rng.choice(SMALL_TALK)
    return Turn([loosely(rng, rng.choice(asked))], answer, "text")


def count_aloud(rng: random.Random) -> Turn:
    """A long answer that is known beforehand."""
    last = rng.choice((5, 10, 20, 30, 50, rng.randint(2, 50)))
    text = rng.choice(("Count to {}.", "Count from 1 to {}.", "Please count to {}.")).format(last)
    return Turn([text], ", ".join(map(str, range(1, last + 1))) + ".", "text")


def no_picture(rng: random.Random) -> Turn:
    """A question about a picture that was not sent."""
    type_ = rng.choice(IMAGE_TYPES + PAIR_TYPES[:3] + VIDEO_TYPES[2:])
    asked = (video_example if type_ in VIDEO_TYPES else example)(type_, rng)[1]
    return Turn([loosely(rng, asked.text)], NO_PICTURE, "text")


def random_chat(rng: random.Random, shares: Sequence[int]) -> Chat:
    """A conversation of the training's mixture.

    Args:
        rng: Where every choice comes from.
        shares: Of conversations about one picture, about two, about one after another, about a
            video, and about none.
    """
    roll = rng.random()
    system = DEFAULT_SYSTEM if roll < 0.75 else None if roll < 0.83 else rng.choice(SYSTEMS)
    chat = Chat(system)
    if rng.random() < 0.08:
        chat.turns.append(rng.choice((small_talk, no_picture))(rng))
    kinds: list[Callable[[Chat, random.Random], None]] = [
        _one,
        _pair,
        _one_after_another,
        _video,
        _text,
    ]
    rng.choices(kinds, shares)[0](chat, rng)
    if rng.random() < 0.05:
        chat.turns.append(small_talk(rng))
    return chat


def loosely(rng: random.Random, text: str) -> str:
    """The text, at times without its mark or its capital, as people type."""
    if rng.random() < 0.1:
        text = text.rstrip("?.!")
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    return text


def add_turn(chat: Chat, media: Sequence[Media], question: Question, rng: random.Random) -> None:
    """A turn that brings these media, before the text, after it, or one on each side."""
    indexes: list[str | int] = list(range(len(chat.media), len(chat.media) + len(media)))
    chat.media += media
    text = loosely(rng, question.text)
    roll = rng.random()
    if not indexes or roll < 0.7:
        parts = [*indexes, text]
    elif roll < 0.93 or len(indexes) == 1:
        parts = [text, *indexes]
    else:
        parts = [indexes[0], text, *indexes[1:]]
    chat.turns.append(Turn(parts, question.answer, question.type))


def _one(chat: Chat, rng: random.Random) -> None:
    scenes, first = example(rng.choice(IMAGE_TYPES), rng)
    add_turn(chat, list(scenes), first, rng)
    others = questions(scenes[0], rng)
    for asked in rng.sample(others, min(len(others), rng.choice((0, 1, 2, 3)))):
        add_turn(chat, [], asked, rng)


def _pair(chat: Chat, rng: random.Random) -> None:
    scenes, first = example(rng.choice(PAIR_TYPES), rng)
    add_turn(chat, list(scenes), first, rng)
    others = pair_questions(scenes[0], scenes[1], rng)
    for asked in rng.sample(others, min(len(others), rng.choice((0, 1, 2)))):
        add_turn(chat, [], asked, rng)


def _one_after_another(chat: Chat, rng: random.Random) -> None:
    """A picture, then another; a plain question is about the one sent last."""
    type_ = rng.choice(PAIR_TYPES)
    scenes, pair = example(type_, rng)
    for scene in scenes:
        add_turn(chat, [scene], rng.choice(questions(scene, rng)), rng)
    if rng.random() < 0.7:
        add_turn(chat, [], pair, rng)
    else:
        add_turn(chat, [], rng.choice(questions(scenes[-1], rng)), rng)


def _video(chat: Chat, rng: random.Random) -> None:
    video, first = video_example(rng.choice(VIDEO_TYPES), rng)
    add_turn(chat, [video], first, rng)
    for asked in rng.sample(video_questions(video, rng), rng.choice((0, 1, 2))):
        add_turn(chat, [], asked, rng)


def _text(chat: Chat, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2))):
        chat.turns.append(rng.choice((small_talk, small_talk, no_picture))(rng))


def every_text() -> list[str]:
    """Every text of the small talk, for the tokenizer."""
    texts = [
        DEFAULT_SYSTEM,
        *SYSTEMS,
        NO_PICTURE,
        *OTHER_TOPICS,
        OTHER_ANSWER,
        "system",
        "user",
        "assistant",
    ]
    for asked, answer in SMALL_TALK:
        texts += [*asked, answer]
    return texts + [f"{n}, " for n in range(10)]
