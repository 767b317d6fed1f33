"""Scenes of coloured shapes and their drawing.

A scene says nothing about pixels, so one scene can be drawn at any size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
SIZES: tuple[str, ...] = ("small", "large")
PLACES: tuple[str, ...] = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "still")
MAX_SHAPES = 6
"""Shapes in one scene, at most."""
MAX_LISTED = 4
"""A scene of more shapes than this is described by its count alone."""

# A shade is a random mixture of its colour's anchors, among them the CSS colour of that name, so
# that a picture drawn elsewhere with fill="green" is as familiar as our own.
SHADES: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (215, 35, 40), (190, 10, 20)),
    "orange": ((255, 165, 0), (250, 125, 15), (255, 140, 0)),
    "yellow": ((255, 255, 0), (245, 220, 40), (255, 230, 80)),
    "green": ((0, 128, 0), (50, 190, 70), (0, 255, 0)),
    "cyan": ((0, 255, 255), (40, 205, 215), (90, 220, 235)),
    "blue": ((0, 0, 255), (40, 75, 220), (30, 60, 170)),
    "purple": ((128, 0, 128), (135, 45, 175), (110, 30, 150)),
    "pink": ((255, 192, 203), (250, 130, 190), (255, 105, 180)),
}
COLOURS: tuple[str, ...] = tuple(SHADES)
BACKGROUND_SHADES: dict[str, tuple[Rgb, ...]] = {
    "white": ((255, 255, 255), (240, 240, 240), (250, 248, 240)),
    "black": ((0, 0, 0), (28, 28, 28), (12, 14, 20)),
    "grey": ((128, 128, 128), (100, 100, 100), (160, 160, 160)),
}
BACKGROUNDS: tuple[str, ...] = tuple(BACKGROUND_SHADES)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "cyan"),
        ("star", "pink"),
        ("cross", "yellow"),
    }
)
"""Pairs of kind and colour that no training picture contains."""


@dataclass(frozen=True)
class Shape:
    """One filled shape.

    Attributes:
        kind: One of KINDS.
        colour: One of COLOURS.
        size: "small" (at most 0.21 of the picture's short side) or "large" (at least 0.27).
        place: One of PLACES, the ninth of the picture that holds the centre.
        centre: x and y as fractions of the picture's width and height.
        extent: Side of the bounding box as a fraction of the picture's short side.
        rgb: The exact shade.
    """

    kind: str
    colour: str
    size: str
    place: str
    centre: tuple[float, float]
    extent: float
    rgb: Rgb

    @property
    def name(self) -> str:
        """Colour and kind, such as "red circle"."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order (row by row, left to right) on a plain background."""

    shapes: tuple[Shape, ...]
    background: str
    background_rgb: Rgb

    def count(self, kind: str | None = None, colour: str | None = None) -> int:
        """How many shapes have this kind and this colour; None stands for any."""
        return sum(kind in (None, s.kind) and colour in (None, s.colour) for s in self.shapes)


def held_out(scene: Scene) -> bool:
    """Whether the scene holds a pair of kind and colour that was kept out of the training."""
    return any((s.kind, s.colour) in HELD_OUT for s in scene.shapes)


def random_scene(
    rng: random.Random,
    *,
    count: int | None = None,
    kinds: Sequence[str | None] | None = None,
    colours: Sequence[str | None] | None = None,
    avoid_kind: str | None = None,
    avoid_colour: str | None = None,
    unseen: bool = False,
) -> Scene:
    """A random scene.

    Args:
        rng: Where every choice comes from.
        count: Number of shapes, 1 to MAX_SHAPES; by default random, one shape being the likeliest.
        kinds: The first shapes' kinds; None, and shapes beyond the list, are drawn at random.
        colours: The same for colours.
        avoid_kind: A kind that only the list `kinds` may bring in.
        avoid_colour: A colour that only the list `colours` may bring in.
        unseen: Let pairs of HELD_OUT in, and put at least one in where kinds and colours allow.
    """
    kinds, colours = list(kinds or ()), list(colours or ())
    if count is None:
        count = rng.choice((1, 1, 1, 2, 2, 3, 3, 4, 5, 6))
    if not 1 <= count <= MAX_SHAPES:
        raise ValueError(f"a scene has 1 to {MAX_SHAPES} shapes, got {count = }")
    pairs: list[tuple[str, str]] = []
    for index in range(count):
        kind = kinds[index] if index < len(kinds) else None
        colour = colours[index] if index < len(colours) else None
        fitting = [
            (k, c)
            for k in KINDS
            for c in COLOURS
            if (k == kind or (kind is None and k != avoid_kind))
            and (c == colour or (colour is None and c != avoid_colour))
        ]
        seen = [pair for pair in fitting if pair not in HELD_OUT]
        fresh = [pair for pair in fitting if pair in HELD_OUT]
        if unseen and fresh and (not any(p in HELD_OUT for p in pairs) or rng.random() < 0.4):
            pairs.append(rng.choice(fresh))
        else:
            pairs.append(rng.choice(seen or fitting))
    cells = rng.sample(range(9), count)
    shapes = [
        _random_shape(rng, kind, colour, cell, alone=count == 1)
        for (kind, colour), cell in zip(pairs, cells, strict=True)
    ]
    shapes.sort(key=lambda shape: PLACES.index(shape.place))
    background = rng.choice(BACKGROUNDS)
    return Scene(tuple(shapes), background, _mixture(rng, BACKGROUND_SHADES[background]))


def shade(rng: random.Random, colour: str) -> Rgb:
    """A random shade of one of COLOURS."""
    return _mixture(rng, SHADES[colour])


def _mixture(rng: random.Random, anchors: tuple[Rgb, ...]) -> Rgb:
    """A point between the anchors, or in one case of three an anchor itself."""
    if rng.random() < 1 / 3:
        return rng.choice(anchors)
    weights = [rng.random() for _ in anchors]
    r, g, b = (
        round(sum(w * a[i] for w, a in zip(weights, anchors, strict=True)) / sum(weights))
        for i in range(3)
    )
    return r, g, b


def _random_shape(rng: random.Random, kind: str, colour: str, cell: int, *, alone: bool) -> Shape:
    size = rng.choice(SIZES)
    if size == "small":
        extent = rng.uniform(0.16, 0.21)
    elif alone:
        extent = rng.choice((rng.uniform(0.27, 0.48), rng.uniform(0.4, 0.75)))
        cell = 4 if extent > 0.48 else cell  # a shape this wide fits nowhere but the centre
    else:
        extent = rng.uniform(0.27, 0.31)
    row, column = divmod(cell, 3)
    # Within its ninth of the picture, and with that clear of its neighbours; alone it may roam.
    slack = 0.09 if alone else (1 / 3 - extent) / 2 - 0.008
    x, y = ((i + 0.5) / 3 + rng.uniform(-slack, slack) for i in (column, row))
    return Shape(kind, colour, size, PLACES[cell], (x, y), extent, shade(rng, colour))


def outline(shape: Shape, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The corners in pixels in a picture of size (width, height); a circle's bounding box."""
    width, height = size
    half = shape.extent * min(size) / 2
    x, y = (
        min(max(c * side, half + 1), side - half - 1)
        for c, side in zip(shape.centre, (width, height), strict=True)
    )
    if shape.kind in ("circle", "square"):
        unit = [(-1.0, -1.0), (1.0, 1.0)]
    elif shape.kind == "triangle":
        unit = [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
    elif shape.kind == "star":
        turns = [(math.pi * i / 5, 1.05 if i % 2 == 0 else 0.42) for i in range(10)]
        unit = [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]
    else:
        arm = 0.32
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        unit = [p for _ in range(4) for p in quarter]
        for turn in range(1, 4):
            for i in range(turn * 3, 12):
                unit[i] = (-unit[i][1], unit[i][0])
    return [(x + half * u, y + half * v) for u, v in unit]


def paint(
    canvas: ImageDraw.ImageDraw, shape: Shape, size: tuple[int, int], fill: Rgb | int
) -> None:
    """Fill the shape on a canvas of size (width, height)."""
    points = outline(shape, size)
    if shape.kind == "circle":
        canvas.ellipse(points, fill=fill)
    elif shape.kind == "square":
        canvas.rectangle(points, fill=fill)
    else:
        canvas.polygon(points, fill=fill)


def draw(scene: Scene, size: tuple[int, int] = (224, 224), *, smooth: int = 2) -> Image.Image:
    """The scene as an RGB picture of size (width, height), in pixels.

    Args:
        scene: What to draw.
        size: Width and height, each at least 56 for shapes that can be told apart.
        smooth: Drawn this many times larger and averaged down; 1 leaves jagged edges.
    """
    large = (size[0] * smooth, size[1] * smooth)
    picture = Image.new("RGB", large, scene.background_rgb)
    canvas = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        paint(canvas, shape, large, shape.rgb)
    return picture.reduce(smooth) if smooth > 1 else picture


def move(scene: Scene, motion: str, frames: int) -> list[Scene]:
    """A video: the scene's first shape travels across the picture, one scene a frame.

    Args:
        scene: A scene of one shape; where it stands across the motion's direction is kept.
        motion: One of MOTIONS.
        frames: Number of frames, at least 2.
    """
    shape = scene.shapes[0]
    result = []
    for index in range(frames):
        way = 0.2 + 0.6 * index / (frames - 1)
        x, y = shape.centre
        if motion in ("left", "right"):
            x = way if motion == "right" else 1 - way
        elif motion in ("up", "down"):
            y = way if motion == "down" else 1 - way
        moved = Shape(
            shape.kind, shape.colour, shape.size, shape.place, (x, y), shape.extent, shape.rgb
        )
        result.append(Scene((moved,), scene.background, scene.background_rgb))
    return result
