"""Exact mode, from a file through the workers to the array, against Hugging Face's processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from media_files import data_uri, image_file, package_file, settings
from triptych import families
from triptych.media import MediaLoader

PHOTOS = [
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/camera.png"),
]
FORMS = {
    "JPEG": {"quality": 90},
    "progressive JPEG": {"progressive": True},
    "PNG": {"compress_level": 1},
    "WEBP": {"quality": 80, "method": 0},
    "lossless WEBP": {"lossless": True, "method": 0, "quality": 0},
}
SIZES = [(640, 427), (1920, 1080), (1000, 1000), (333, 517), (40, 31), (300, 2000)]
"""(width, height)."""


@pytest.fixture(scope="module")
def family(checkpoint):
    return families.load(checkpoint)


@pytest.fixture(scope="module")
def processor(hf, checkpoint):
    return hf.ImageProcessor.from_pretrained(checkpoint)


@pytest.fixture
async def loader(family):
    loader = MediaLoader(settings(image_mode="exact"), family)
    yield loader
    await loader.close()


def unpatched(found, patch=14, merge=2):
    """The pixels (height, width, 3) in the flat patches of Qwen2-VL's processor."""
    _, rows, columns = (int(extent) for extent in found["image_grid_thw"][0])
    blocks = np.asarray(found["pixel_values"]).reshape(
        rows // merge, columns // merge, merge, merge, 3, -1, patch, patch
    )
    still = blocks[:, :, :, :, :, 0]  # a still picture is the same twice in time
    assert np.array_equal(still, blocks[:, :, :, :, :, 1])
    return still.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)


@pytest.mark.parametrize("form", FORMS)
async def test_pixels_are_those_of_hugging_faces_processor(form, loader, processor):
    for package, path in PHOTOS:
        photograph = Image.open(package_file(package, path)).convert("RGB")
        for size in SIZES:
            picture = photograph.resize(size)
            data = image_file(picture, form.split()[-1], **FORMS[form])
            loaded = await loader.load("image", data_uri(data), where="here")
            found = processor(
                images=[Image.open(io.BytesIO(data))],
                do_rescale=False,
                do_normalize=False,
                return_tensors="np",
            )
            assert loaded.grid_thw == tuple(found["image_grid_thw"][0]), size
            assert np.array_equal(loaded.array, unpatched(found)), (path, size)
