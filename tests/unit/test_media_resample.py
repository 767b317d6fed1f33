"""The compiled scaling against Pillow's, whose pixels it must give, and what stands in for it."""

from __future__ import annotations

import platform
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from media_files import jpeg, package_file
from triptych.contract import ImagePlan
from triptych.media import image, resample

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or (not resample.available() and not shutil.which("cc")),
    reason="the kernel is built where there is a C compiler and an x86-64 processor",
)
SIDES = st.integers(1, 90)
FILTERS = st.sampled_from(sorted(resample.FILTERS))


def noise(height, width, seed=0, values=(0, 255)):
    """Extremes next to each other, where bicubic overshoots and every rounding shows."""
    random = np.random.default_rng(seed)
    return random.choice(np.array(values, np.uint8), (height, width, 4))


def pillow(pixels, height, width, name, box=None):
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    return np.asarray(picture.resize((width, height), resample.FILTERS[name], box))


def test_it_is_there():
    assert resample.available()
    assert resample.describe().endswith("so, AVX2")


def test_one_that_gives_other_pixels_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(resample, "_agrees", lambda kernel: False)
    kernel, why = resample._load.__wrapped__()
    assert kernel is None
    assert re.fullmatch(
        r"Pillow, about .*: _resample\S*\.so does not give this Pillow's pixels", why
    )
    assert "is left out" in caplog.text


@given(height=SIDES, width=SIDES, target=st.tuples(SIDES, SIDES), name=FILTERS, seed=SIDES)
def test_pixels_are_pillows(height, width, target, name, seed):
    pixels = noise(height, width, seed, values=(0, 3, 128, 254, 255))
    scaled = resample.resize(pixels, (height, width), target, name)
    if scaled is None:  # of the shapes that Pillow takes the other way round
        assert height - target[0] > 2 * (width - target[1]) or height >= 100 * width
    else:
        assert scaled.flags.c_contiguous
        assert np.array_equal(scaled, pillow(pixels, *target, name))


@given(height=SIDES, width=SIDES, target=st.tuples(SIDES, SIDES), name=FILTERS)
def test_part_of_the_last_pixels_is_pillows_box(height, width, target, name):
    pixels, size = noise(height, width), (height - 0.5, width - 0.75)
    scaled = resample.resize(pixels, size, target, name)
    if scaled is not None:
        assert np.array_equal(scaled, pillow(pixels, *target, name, (0, 0, size[1], size[0])))


@pytest.mark.parametrize("name", resample.FILTERS)
@pytest.mark.parametrize("source", [(1080, 1920), (1024, 1024), (511, 2049), (33, 4000)], ids=str)
@pytest.mark.parametrize("target", [(728, 1316), (980, 980), (511, 1024), (28, 4000)], ids=str)
def test_large_pictures(source, target, name):
    pixels = noise(*source)
    scaled = resample.resize(pixels, source, target, name)
    assert scaled is None or np.array_equal(scaled, pillow(pixels, *target, name))


def test_usual_shapes_are_not_left_to_pillow():
    for source, target in [((1080, 1920), (728, 1316)), ((4000, 3000), (1148, 840))]:
        assert resample.resize(noise(*source), source, target, "bicubic") is not None


def test_a_filter_it_does_not_know_is_pillows():
    assert resample.resize(noise(9, 9), (9, 9), (4, 4), "lanczos") is None


class Fixed:
    def __init__(self, *size):
        self.plan = ImagePlan(size, 1)

    def plan_image(self, height, width):
        return self.plan


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [(224, 308), (84, 112), (600, 700)], ids=str)
def test_without_it_pictures_are_the_same(mode, size, monkeypatch):
    photograph = package_file("sklearn", "datasets/images/china.jpg").read_bytes()
    for data in (photograph, jpeg(301, 203, quality=90)):
        kernel = image.load(data, Fixed(*size), max_pixels=10**8, mode=mode)[0]
        monkeypatch.setattr(resample, "available", lambda: False)
        alone = image.load(data, Fixed(*size), max_pixels=10**8, mode=mode)[0]
        monkeypatch.undo()
        assert np.array_equal(kernel, alone)
