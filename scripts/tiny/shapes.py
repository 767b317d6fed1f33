"""Pictures of drawn shapes, and questions about them with one right answer each.

Needs Pillow alone. Everything is deterministic: the same `random.Random` state gives the same
scenes and questions.

    rng = random.Random(7)
    scene = random_scene(rng)
    picture = draw(scene, (320, 240))
    for question in questions(scene, rng):
        print(question.type, question.text, question.answer)

    scenes, question = example("compare_count", rng)    # two scenes and a question about both
"""

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
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    KINDS,
    MAX_SHAPES,
    MOTIONS,
    PLACES,
    SIZES,
    Scene,
    Shape,
    draw,
    held_out,
    move,
    random_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT",
    "IMAGE_TYPES",
    "KINDS",
    "MAX_SHAPES",
    "MOTIONS",
    "PAIR_TYPES",
    "PLACES",
    "SIZES",
    "VIDEO_TYPES",
    "Question",
    "Scene",
    "Shape",
    "VideoScene",
    "draw",
    "example",
    "held_out",
    "move",
    "pair_questions",
    "questions",
    "random_scene",
    "video_example",
    "video_questions",
]
