from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from media_files import image_file, jpeg, package_file, pixels
from media_planner import FilePlanner
from triptych.contract import ImagePlan
from triptych.errors import MediaTooLarge, MediaType, MediaUnreadable
from triptych.media import MediaOptions, image

PLANNER = FilePlanner()
LIMIT = 50_000_000


class Fixed:
    """Wants one plan, whatever the picture."""

    def __init__(self, plan):
        self.plan = plan
        self.asked = None

    def plan_image(self, height, width):
        self.asked = (height, width)
        return self.plan


def load(data, planner=PLANNER, **options):
    return image.load(data, planner, max_pixels=LIMIT, **options)[0]


def expected(data, size):
    """What Hugging Face's load_image and PIL-backed resize make of it."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


PHOTOS = [
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/camera.png"),
]


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
@pytest.mark.parametrize("size", [(308, 224), (1204, 812), (28, 28)], ids=str)
def test_photographs_have_the_pixels_of_hugging_face(package, path, size):
    data = package_file(package, path).read_bytes()
    got = load(data, Fixed(ImagePlan((size[1], size[0]), 1)))
    assert got.flags.c_contiguous
    assert np.array_equal(got, expected(data, size))


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "worst": {"quality": 1},
    "restarts": {"restart_marker_blocks": 2},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("shape", [(40, 60), (37, 51), (1, 300), (8, 8)], ids=str)
def test_every_jpeg_has_the_pixels_of_hugging_face(options, shape):
    data = jpeg(*shape, **options)
    got = load(data, Fixed(ImagePlan((56, 84), 1)))
    assert np.array_equal(got, expected(data, (84, 56)))


ENCODINGS = {
    **{name: {"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "grey": {},
    "quality 75": {"quality": 75},
    "quality 100": {"quality": 100},
}


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_libjpeg_turbo_decodes_as_pillow_does(package, path, encoding):
    photograph = Image.open(package_file(package, path)).convert(
        "L" if encoding == "grey" else "RGB"
    )
    for crop in ((0, 0), (1, 1), (3, 14)):  # odd sizes, and blocks that are cut
        size = (photograph.width - crop[0], photograph.height - crop[1])
        data = image_file(photograph.crop((0, 0, *size)), "JPEG", **ENCODINGS[encoding])
        opened = Image.open(io.BytesIO(data))
        pixels = image._turbo(data, opened)
        assert pixels is not None
        assert np.array_equal(pixels[..., :3], np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(form, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(Image.fromarray(pixels(40, 60)), form, exif=exif, quality=95)
    planner = Fixed(ImagePlan((60, 40) if orientation > 4 else (40, 60), 1))
    got = load(data, planner, mode=mode)
    upright = expected(data, (40, 60) if orientation > 4 else (60, 40))
    assert planner.asked == upright.shape[:2]
    assert np.abs(got.astype(int) - upright).mean() < (0.001 if mode == "exact" else 3)


def test_a_broken_exif_block_is_passed_over():
    data = image_file(
        Image.fromarray(pixels(40, 60)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
    )
    assert load(data).shape == (40, 60, 3)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_lies_over_white(form, mode):
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[:, 30:] = (200, 100, 50, 255)
    rgba[:20, 30:, 3] = 128
    got = load(image_file(Image.fromarray(rgba), form, lossless=True), mode=mode)
    assert got[5, 5].tolist() == [255, 255, 255]
    assert got[35, 50].tolist() == [200, 100, 50]
    assert np.allclose(got[5, 50], [227, 177, 152], atol=2)


def test_grey_with_alpha_lies_over_white():
    la = np.zeros((40, 60, 2), np.uint8)
    la[:, 30:] = (90, 255)
    got = load(image_file(Image.fromarray(la, "LA")))
    assert got[5, 5].tolist() == [255] * 3
    assert got[5, 50].tolist() == [90] * 3


def test_a_palette_with_a_transparent_colour():
    picture = Image.new("P", (60, 40), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (30, 0, 60, 40))
    got = load(image_file(picture, transparency=0))
    assert got[5, 5].tolist() == [255] * 3
    assert got[5, 50].tolist() == [0, 0, 255]
    assert load(image_file(picture))[5, 5].tolist() == [255, 0, 0]


def test_a_colour_key_in_an_rgb_png():
    picture = Image.new("RGB", (60, 40), (1, 2, 3))
    assert load(image_file(picture, transparency=(1, 2, 3)))[5, 5].tolist() == [255] * 3


def test_one_bit():
    picture = Image.new("1", (60, 40), 1)
    assert load(image_file(picture)).min() == 255


def test_sixteen_bit_grey_is_scaled():
    wide = np.full((40, 60), 0x8080, np.uint16)
    wide[:, :30] = 0xFFFF
    got = load(image_file(Image.fromarray(wide)))
    assert got[5, 5].tolist() == [255] * 3
    assert got[5, 50].tolist() == [128] * 3


@pytest.mark.parametrize("quality", [75, 95])
def test_cmyk_as_adobe_writes_it(quality):
    colours = Image.new("CMYK", (60, 40), (0, 255, 255, 0))
    got = load(image_file(colours, "JPEG", quality=quality))
    assert np.allclose(got[20, 30], [255, 0, 0], atol=4)


def test_a_colour_profile_does_no_harm():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load(jpeg(icc_profile=profile)).shape == (40, 60, 3)


@pytest.mark.parametrize("size", [(20, 30), (40, 60), (200, 300), (33, 47)], ids=str)
def test_centre_crop_is_hugging_faces(size):
    data = jpeg(*size)
    got = load(data, Fixed(ImagePlan(size, 1, crop=(41, 37))))
    assert np.array_equal(got, center_crop(expected(data, size[::-1]), 41, 37))


def center_crop(pixels, height, width):
    """`transformers.image_transforms.center_crop`, which needs torch to import, in numpy."""
    rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    if top >= 0 and top + height <= rows and left >= 0 and left + width <= columns:
        return pixels[top : top + height, left : left + width]
    canvas = np.zeros((max(height, rows), max(width, columns), 3), np.uint8)
    pad_top, pad_left = (
        int(np.ceil((canvas.shape[0] - rows) / 2)),
        int(np.ceil((canvas.shape[1] - columns) / 2)),
    )
    canvas[pad_top : pad_top + rows, pad_left : pad_left + columns] = pixels
    top, left = top + pad_top, left + pad_left
    return canvas[max(0, top) : top + height, max(0, left) : left + width]


@pytest.mark.parametrize(("package", "path"), PHOTOS, ids=lambda value: value.split("/")[-1])
@pytest.mark.parametrize("size", [(112, 84), (308, 224), (588, 420)], ids=str)
def test_fast_mode_is_close(package, path, size):
    data = package_file(package, path).read_bytes()
    planner = Fixed(ImagePlan((size[1], size[0]), 1))
    exact = load(data, planner).astype(float)
    fast = load(data, planner, mode="fast").astype(float)
    assert fast.shape == exact.shape
    assert np.corrcoef(exact.ravel(), fast.ravel())[0, 1] > 0.99
    assert abs(exact.mean() - fast.mean()) < 1


def test_detail_low_plans_a_small_picture():
    planner = Fixed(ImagePlan((56, 56), 1))
    load(jpeg(600, 1200), planner, options=MediaOptions(detail="low"))
    assert planner.asked == (256, 512)
    load(jpeg(100, 120), planner, options=MediaOptions(detail="low"))
    assert planner.asked == (100, 120)


def test_pixels_are_counted_before_decoding():
    with pytest.raises(MediaTooLarge, match=r"60×40 = 2400 pixels, over the limit of 2399"):
        image.load(jpeg(), PLANNER, max_pixels=2399)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated(form, part, mode):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = image_file(Image.fromarray(noise), form)
    with pytest.raises(MediaUnreadable):
        load(data[: int(len(data) * part)], mode=mode)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "nothing"),
        (b"hello, this is text", "text"),
        (b"GIF89a" + bytes(20), "GIF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"%PDF-1.7 and so on", "PDF"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "AVIF"),
        (b"\xde\xad\xbe\xef" * 8, "deadbeef"),
    ],
)
def test_other_files_are_named(data, name):
    with pytest.raises(MediaType, match=name):
        load(data)


def test_moving_pictures_are_not_stills():
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    data = image_file(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(MediaType, match="animated"):
        load(data)
