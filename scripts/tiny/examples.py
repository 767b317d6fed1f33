"""Pictures and questions by type, drawn so that every answer is about as likely."""

from __future__ import annotations

import random

from .questions import (
    IMAGE_TYPES,
    PAIR_TYPES,
    VIDEO_TYPES,
    Question,
    VideoScene,
    ask_count_colour,
    ask_count_kind,
    pair_questions,
    questions,
    video_questions,
)
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    KINDS,
    MAX_SHAPES,
    MOTIONS,
    Scene,
    random_scene,
)


def example(
    type_: str, rng: random.Random, *, unseen: bool = False
) -> tuple[list[Scene], Question]:
    """A picture, or two for PAIR_TYPES, and a question of this type.

    Args:
        type_: One of IMAGE_TYPES or PAIR_TYPES.
        rng: Where every choice comes from.
        unseen: Use pairs of kind and colour that were kept out of the training (HELD_OUT).
    """
    if type_ in PAIR_TYPES:
        scenes = _balanced_pair(type_, rng, unseen)
        asked = pair_questions(scenes[0], scenes[1], rng)
        return scenes, next(q for q in asked if q.type == type_)
    if type_ not in IMAGE_TYPES:
        raise ValueError(f"no such type of question about pictures: {type_!r}")
    while True:
        scene, fixed = _balanced_scene(type_, rng, unseen)
        found = fixed or next((q for q in questions(scene, rng) if q.type == type_), None)
        if found is not None:
            return [scene], found


def _balanced_scene(type_: str, rng: random.Random, unseen: bool) -> tuple[Scene, Question | None]:
    """A scene fit for this type, and the question where the scene was made for one."""
    if type_ == "count":
        return random_scene(rng, count=rng.randint(1, MAX_SHAPES), unseen=unseen), None
    if type_ in ("count_kind", "count_colour"):
        asked = rng.choice(KINDS if type_ == "count_kind" else COLOURS)
        matching = rng.randint(0, 4)
        count = rng.randint(max(matching, 1), MAX_SHAPES)
        if type_ == "count_kind":
            scene = random_scene(
                rng, count=count, kinds=[asked] * matching, avoid_kind=asked, unseen=unseen
            )
            return scene, ask_count_kind(scene, asked, rng)
        scene = random_scene(
            rng, count=count, colours=[asked] * matching, avoid_colour=asked, unseen=unseen
        )
        return scene, ask_count_colour(scene, asked, rng)
    if type_ in ("contents", "description"):
        return random_scene(rng, count=rng.choice((1, 1, 2, 2, 3, 3, 4, 5)), unseen=unseen), None
    if type_ in ("shape", "colour"):
        count = rng.choice((1, 1, 2, 3))
        if unseen:  # the pair asked about is the unseen one, which a lone shape makes sure of
            count = 1
        pair = rng.choice(sorted(HELD_OUT)) if unseen else (rng.choice(KINDS), rng.choice(COLOURS))
        if not unseen and pair in HELD_OUT:
            pair = (pair[0], "red") if type_ == "shape" else ("circle", pair[1])
            pair = pair if pair not in HELD_OUT else ("square", pair[1])
        return random_scene(
            rng, count=count, kinds=[pair[0]], colours=[pair[1]], unseen=unseen
        ), None
    return random_scene(rng, unseen=unseen), None


def _balanced_pair(type_: str, rng: random.Random, unseen: bool) -> list[Scene]:
    if type_ == "compare_count":
        outcome = rng.choice(("first", "second", "both"))
        many, few = rng.choice([(m, f) for m in range(2, MAX_SHAPES + 1) for f in range(1, m)])
        if outcome == "both":
            many = few = rng.randint(1, MAX_SHAPES)
        first = random_scene(rng, count=few if outcome == "second" else many, unseen=unseen)
        return [first, random_scene(rng, count=many if outcome == "second" else few, unseen=unseen)]
    if type_ == "compare_contents":
        counts = (rng.randint(1, 2), rng.randint(1, 2))
    elif type_ == "one_of_two":
        counts = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3)))
    else:
        counts = (1, 1)
    first = random_scene(rng, count=counts[0], unseen=unseen)
    same = rng.random() < 0.5
    shape = first.shapes[0]
    if type_ == "compare_colour":
        fixed = {"colours": [shape.colour]} if same else {"avoid_colour": shape.colour}
    elif type_ == "compare_shape":
        fixed = {"kinds": [shape.kind]} if same else {"avoid_kind": shape.kind}
    else:
        fixed = {}
    return [first, random_scene(rng, count=counts[1], unseen=unseen, **fixed)]


def video_example(
    type_: str, rng: random.Random, *, unseen: bool = False
) -> tuple[VideoScene, Question]:
    """A video of one shape and a question of this type, one of VIDEO_TYPES."""
    video = VideoScene(random_scene(rng, count=1, unseen=unseen), rng.choice(MOTIONS))
    return video, next(q for q in video_questions(video, rng) if q.type == type_)


def every_text() -> list[str]:
    """Sample questions and answers enough to hold every word: what the tokenizer is trained on."""
    rng = random.Random(0)
    texts = [f"on a {b} background" for b in BACKGROUNDS]
    for type_ in IMAGE_TYPES + PAIR_TYPES:
        for _ in range(150):
            asked = example(type_, rng)[1]
            texts += [asked.text, asked.answer]
    for type_ in VIDEO_TYPES:
        for _ in range(60):
            asked = video_example(type_, rng)[1]
            texts += [asked.text, asked.answer]
    return texts
