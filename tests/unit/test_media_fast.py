"""How far fast mode moves what the vision tower makes of a picture."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from media_files import package_file
from triptych import families
from triptych.contract import Item
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


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
def test_embeddings_stay_where_they_are(package, path, family, tower):
    buffer = io.BytesIO()
    Image.open(package_file(package, path)).convert("RGB").save(buffer, "JPEG", quality=90)
    embeddings = []
    for mode in ("exact", "fast"):
        pixels, plan = image.load(buffer.getvalue(), family, max_pixels=10**8, mode=mode)
        item = Item("image", mode, "uint8", pixels.shape, 0, plan.tokens, plan.grid_thw)
        with torch.inference_mode():
            embeddings += tower.encode([item], [torch.from_numpy(pixels.copy())])
    exact, fast = (embedding.flatten() for embedding in embeddings)
    assert torch.cosine_similarity(exact, fast, dim=0) >= 0.999
