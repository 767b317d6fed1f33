"""Questions about one picture, two pictures or a video, and the only right answer to each."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .phrases import PHRASES
from .scenes import (
    COLOURS,
    KINDS,
    MAX_LISTED,
    Scene,
    Shape,
    move,
)

IMAGE_TYPES: tuple[str, ...] = (
    "shape",
    "colour",
    "size",
    "place",
    "count",
    "count_kind",
    "count_colour",
    "exists",
    "background",
    "contents",
    "description",
)
PAIR_TYPES: tuple[str, ...] = (
    "compare_count",
    "compare_colour",
    "compare_shape",
    "compare_contents",
    "one_of_two",
)
LLAVA_TYPES: tuple[str, ...] = (*IMAGE_TYPES, "compare_count", "compare_colour", "one_of_two")
"""What the tiny LLaVA-1.5 answers for combinations, too, that it never saw; see its card."""
VIDEO_TYPES: tuple[str, ...] = ("video_shape", "video_colour", "video_motion", "video_description")


@dataclass(frozen=True)
class Question:
    """A question and its only right answer."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class VideoScene:
    """One shape that moves, or stands still, on a plain background."""

    scene: Scene
    motion: str

    def frames(self, count: int) -> list[Scene]:
        """The scene at each of `count` moments."""
        return move(self.scene, self.motion, count)


def _ask(
    rng: random.Random, type_: str, answer: str, phrases: str | None = None, **fields: str
) -> Question:
    text = rng.choice(PHRASES[phrases or type_]).format(**fields)
    if rng.random() < 0.3:
        text = text.replace("picture", "image")
    return Question(type_, text, answer)


def _plural(kind: str) -> str:
    return "crosses" if kind == "cross" else kind + "s"


def _a(thing: str) -> str:
    return ("an " if thing[0] in "aeiou" else "a ") + thing


def _how_many(count: int, singular: str, plural: str) -> str:
    if count == 1:
        return f"There is 1 {singular}."
    return f"There are {count or 'no'} {plural}."


def _listing(things: list[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def contents(scene: Scene) -> str:
    """What is there, such as "a red circle and a blue square", without a full stop."""
    if len(scene.shapes) > MAX_LISTED:
        return f"{len(scene.shapes)} shapes"
    return _listing([_a(s.name) for s in scene.shapes])


def description(scene: Scene) -> str:
    """What is where, of which size, and on what."""
    if len(scene.shapes) > MAX_LISTED:
        listed = f"{len(scene.shapes)} shapes"
    else:
        listed = _listing([f"{_a(s.size)} {s.name} at the {s.place}" for s in scene.shapes])
    return _capital(f"{listed} on a {scene.background} background.")


def _targets(scene: Scene, shape: Shape) -> list[str]:
    """Names that mean this shape and no other of the scene."""
    if len(scene.shapes) == 1:
        return ["the shape", f"the {shape.kind}", f"the {shape.name}"]
    names = []
    if scene.count(kind=shape.kind) == 1:
        names.append(f"the {shape.kind}")
    if scene.count(kind=shape.kind, colour=shape.colour) == 1:
        names.append(f"the {shape.name}")
    return names


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every type that has one right answer for this picture, phrased at random."""
    result = []
    alone = len(scene.shapes) == 1
    shape = rng.choice(scene.shapes)
    if alone:
        result.append(_ask(rng, "shape", f"It is {_a(shape.kind)}."))
    elif scene.count(colour=shape.colour) == 1:
        result.append(
            _ask(rng, "shape", f"It is {_a(shape.kind)}.", "shape_of", colour=shape.colour)
        )
    if alone and rng.random() < 0.3:
        result.append(_ask(rng, "colour", f"It is {shape.colour}.", "colour_alone"))
    elif alone or scene.count(kind=shape.kind) == 1:
        target = rng.choice(("the shape", f"the {shape.kind}")) if alone else f"the {shape.kind}"
        result.append(_ask(rng, "colour", f"It is {shape.colour}.", target=target))
    if names := _targets(scene, shape):
        result.append(_ask(rng, "size", f"It is {shape.size}.", target=rng.choice(names)))
        result.append(_ask(rng, "place", f"It is at the {shape.place}.", target=rng.choice(names)))
    result.append(_ask(rng, "count", _how_many(len(scene.shapes), "shape", "shapes")))
    result.append(ask_count_kind(scene, rng.choice((shape.kind, rng.choice(KINDS))), rng))
    result.append(ask_count_colour(scene, rng.choice((shape.colour, rng.choice(COLOURS))), rng))
    result.append(_exists(scene, rng))
    result.append(_ask(rng, "background", f"The background is {scene.background}."))
    result.append(_ask(rng, "contents", _capital(contents(scene)) + "."))
    result.append(_ask(rng, "description", description(scene)))
    return result


def ask_count_kind(scene: Scene, kind: str, rng: random.Random) -> Question:
    """How many shapes are of this kind."""
    answer = _how_many(scene.count(kind=kind), kind, _plural(kind))
    return _ask(rng, "count_kind", answer, kinds=_plural(kind))


def ask_count_colour(scene: Scene, colour: str, rng: random.Random) -> Question:
    """How many shapes are of this colour."""
    answer = _how_many(scene.count(colour=colour), f"{colour} shape", f"{colour} shapes")
    return _ask(rng, "count_colour", answer, colour=colour)


def _exists(scene: Scene, rng: random.Random) -> Question:
    """Yes and no are equally likely; a wrong thing differs in kind, or in kind or colour alone."""
    shape = rng.choice(scene.shapes)
    named = rng.random() < 0.5
    thing = shape.name if named else shape.kind
    if rng.random() < 0.5:
        present = {s.name for s in scene.shapes} | {s.kind for s in scene.shapes}
        others = (
            [f"{shape.colour} {k}" for k in KINDS] + [f"{c} {shape.kind}" for c in COLOURS]
            if named
            else KINDS
        )
        absent = [t for t in others if t not in present]
        if absent:
            thing = rng.choice(absent)
            return _ask(rng, "exists", f"No, there is no {thing}.", a_thing=_a(thing))
    return _ask(rng, "exists", f"Yes, there is {_a(thing)}.", a_thing=_a(thing))


def pair_questions(first: Scene, second: Scene, rng: random.Random) -> list[Question]:
    """One question of every type that has one right answer for these two pictures."""
    a, b = first.shapes, second.shapes
    if len(a) == len(b):
        more = "Both have the same number of shapes."
    else:
        more = f"The {'first' if len(a) > len(b) else 'second'} picture has more shapes."
    result = [_ask(rng, "compare_count", more)]
    if len(a) == len(b) == 1:
        one, two = a[0].colour, b[0].colour
        same = (
            f"Yes, both are {one}."
            if one == two
            else f"No, the first is {one} and the second is {two}."
        )
        result.append(_ask(rng, "compare_colour", same))
        one, two = a[0].kind, b[0].kind
        if one == two:
            same = f"Yes, both are {_plural(one)}."
        else:
            same = f"No, the first is {_a(one)} and the second is {_a(two)}."
        result.append(_ask(rng, "compare_shape", same))
    if max(len(a), len(b)) <= 2:
        both = f"The first shows {contents(first)}. The second shows {contents(second)}."
        result.append(_ask(rng, "compare_contents", both))
    result.append(_one_of_two(first, second, rng))
    return result


def _one_of_two(first: Scene, second: Scene, rng: random.Random) -> Question:
    """A question about one of two pictures, named by its order."""
    which, scene = rng.choice((("first", first), ("second", second)))
    asked = [f"How many shapes are in the {which} picture?"]
    answers = [_how_many(len(scene.shapes), "shape", "shapes")]
    if len(scene.shapes) == 1:
        shape = scene.shapes[0]
        asked += [
            f"What shape is in the {which} picture?",
            f"What colour is the shape in the {which} picture?",
        ]
        answers += [f"It is {_a(shape.kind)}.", f"It is {shape.colour}."]
    if len(scene.shapes) <= MAX_LISTED:
        asked.append(f"What is in the {which} picture?")
        answers.append(_capital(contents(scene)) + ".")
    index = rng.randrange(len(asked))
    text = asked[index] if rng.random() < 0.7 else asked[index].replace("picture", "image")
    return Question("one_of_two", text, answers[index])


def video_questions(video: VideoScene, rng: random.Random) -> list[Question]:
    """One question of each of VIDEO_TYPES."""
    shape = video.scene.shapes[0]
    way = {"left": "to the left", "right": "to the right"}.get(video.motion, video.motion)
    goes = "does not move" if video.motion == "still" else f"moves {way}"
    return [
        _ask(rng, "video_shape", f"It is {_a(shape.kind)}."),
        _ask(rng, "video_colour", f"It is {shape.colour}."),
        _ask(rng, "video_motion", f"It {goes}."),
        _ask(rng, "video_description", f"{_capital(_a(shape.name))} {goes}."),
    ]
