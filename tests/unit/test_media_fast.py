"""How far fast mode moves what the vision tower makes of a picture."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from media_files import package_file
from triptych import families
from triptych.contract import ImagePlan, Item
from triptych.media import image

PHOTOS = [
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/astronaut.png"),
]


@pytest.fixture(scope="module")
def family(checkpoint):
    return families.load(checkpoint)


@pytest.fixture(scope="module")
def tower(family):
    return family.load_tower(torch.device("cpu"), torch.float32)


class Shrunk:
    """Plans a picture ``by`` times smaller, in whole patches of the model."""

    def __init__(self, by):
        self._by = by

    def plan_image(self, height, width):
        rows, columns = (max(28, round(side / self._by / 28) * 28) for side in (height, width))
        grid = (1, rows // 14, columns // 14)
        return ImagePlan((rows, columns), rows * columns // 28**2, grid_thw=grid)


def likeness(data, planner, tower):
    """The cosine of the embeddings of both modes."""
    embeddings = []
    for mode in ("exact", "fast"):
        pixels, plan = image.load(data, planner, max_pixels=10**8, mode=mode)
        item = Item("image", mode, "uint8", pixels.shape, 0, plan.tokens, plan.grid_thw)
        with torch.inference_mode():
            embeddings += tower.encode([item], [torch.from_numpy(pixels.copy())])
    exact, fast = (embedding.flatten() for embedding in embeddings)
    return torch.cosine_similarity(exact, fast, dim=0)


def as_jpeg(package, path, quality, side=None):
    """The middle of a photograph, ``side`` pixels high and wide at most."""
    picture = Image.open(package_file(package, path)).convert("RGB")
    width, height = (min(extent, side or extent) for extent in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    buffer = io.BytesIO()
    picture.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
@pytest.mark.parametrize("quality", [75, 90])
def test_embeddings_stay_where_they_are(package, path, quality, family, tower):
    assert likeness(as_jpeg(package, path, quality), family, tower) >= 0.999


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
@pytest.mark.parametrize("shrinks", [0.8, 1.05, 1.4, 2, 2.9, 3, 3.57, 5, 6, 8])
def test_however_much_they_shrink(package, path, shrinks, tower):
    """To 420 pixels a side at most: the tower's attention costs the square of its tokens."""
    picture = as_jpeg(package, path, 90, side=int(420 * shrinks))
    assert likeness(picture, Shrunk(shrinks), tower) >= 0.999
