"""Clips in which a shape moves and may change its colour, and questions about them.

rng = random.Random(7)
clip = random_clip(rng)                            # or any VideoScene
frames = [draw(scene, (160, 120)) for scene in clip.frames(8)]
clip, question = clip_example("video_change", rng)
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from .chats import DEFAULT_SYSTEM, Chat, Turn, add_turn, no_picture, small_talk
from .questions import Question, VideoScene, video_questions
from .scenes import COLOURS, MOTIONS, PLACES, Rgb, Scene, random_scene, shade

CLIP_TYPES: tuple[str, ...] = (
    "video_shape",
    "video_colour",
    "video_motion",
    "video_change",
    "video_description",
)
CHANGE_PHRASES = (
    "How does the colour change?",
    "How does the color change?",
    "Does the colour change?",
    "Does the shape change its colour?",
    "What happens to the colour?",
)


@dataclass(frozen=True)
class Clip(VideoScene):
    """A shape that moves, or stands still, and may change its colour on the way.

    Attributes:
        becomes: The colour it has at the end; its own where it does not change.
        becomes_rgb: The exact shade.
        change: When it changes: the share of the frames that still have the first colour.
    """

    becomes: str
    becomes_rgb: Rgb
    change: float = 0.5

    @property
    def changes(self) -> bool:
        """Whether the colour at the end is another."""
        return self.becomes != self.scene.shapes[0].colour

    def frames(self, count: int) -> list[Scene]:
        """The scene at each of `count` moments, 2 at least."""
        last = min(max(round(self.change * count), 1), count - 1)
        result = []
        for index, scene in enumerate(super().frames(count)):
            shape = scene.shapes[0]
            x, y = shape.centre
            shape = dataclasses.replace(shape, place=PLACES[int(y * 3) * 3 + int(x * 3)])
            if self.changes and index >= last:
                shape = dataclasses.replace(shape, colour=self.becomes, rgb=self.becomes_rgb)
            result.append(dataclasses.replace(scene, shapes=(shape,)))
        return result


def random_clip(rng: random.Random, *, changes: bool | None = None) -> Clip:
    """A random clip; no pair of kind and colour is kept out of the training.

    A clip has one shape, so that a model learns at once what it is never shown, and names another.

    Args:
        rng: Where every choice comes from.
        changes: Whether the colour changes; by default at random.
    """
    scene = random_scene(rng, count=1, unseen=rng.random() < 0.25)
    shape = scene.shapes[0]
    becomes, rgb = shape.colour, shape.rgb
    if changes if changes is not None else rng.random() < 0.4:
        becomes = rng.choice([colour for colour in COLOURS if colour != becomes])
        rgb = shade(rng, becomes)
    return Clip(scene, rng.choice(MOTIONS), becomes, rgb, rng.uniform(0.3, 0.7))


def clip_questions(clip: Clip, rng: random.Random) -> list[Question]:
    """One question of every type that has one right answer for this clip."""
    shape, colour, motion, description = video_questions(clip, rng)
    was = clip.scene.shapes[0].colour
    text = rng.choice(CHANGE_PHRASES)
    if not clip.changes:
        stays = Question("video_change", text, f"It stays {was}.")
        return [shape, colour, motion, stays, description]
    turns = Question("video_change", text, f"It changes from {was} to {clip.becomes}.")
    answer = description.answer.removesuffix(".") + f" and turns {clip.becomes}."
    return [shape, motion, turns, Question("video_description", description.text, answer)]


def clip_example(type_: str, rng: random.Random) -> tuple[Clip, Question]:
    """A clip and a question of this type, one of CLIP_TYPES."""
    if type_ not in CLIP_TYPES:
        raise ValueError(f"no such type of question about clips: {type_!r}")
    changes = {"video_colour": False, "video_change": rng.random() < 0.7}.get(type_)
    clip = random_clip(rng, changes=changes)
    return clip, next(q for q in clip_questions(clip, rng) if q.type == type_)


def random_clip_chat(rng: random.Random) -> Chat:
    """A conversation of the training's mixture, about a clip or, rarely, about none."""
    roll = rng.random()
    chat = Chat(DEFAULT_SYSTEM if roll < 0.85 else None)
    if rng.random() < 0.05:
        turn: Turn = rng.choice((small_talk, no_picture))(rng)
        chat.turns.append(turn)
        return chat
    clip, first = clip_example(rng.choice(CLIP_TYPES), rng)
    add_turn(chat, [clip], first, rng)
    for asked in rng.sample(clip_questions(clip, rng), rng.choice((0, 1, 2, 3))):
        add_turn(chat, [], asked, rng)
    return chat
