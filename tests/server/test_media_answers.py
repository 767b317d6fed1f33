"""True answers about pictures, clips and sounds from every trained model, through the server."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pictures import encoded
from tiny.clips import CLIP_TYPES, clip_example
from tiny.questions import LLAVA_TYPES
from tiny.shapes import draw, example
from tiny.tone_questions import SOUND_TYPES, sound_example
from tiny.tones import synthesise, wav
from triptych.server import Server
from triptych_client import Client, TriptychClientError, audio, image, user, video

pytestmark = pytest.mark.server

FRAMES = 8
"""Of a clip; as many as a request gets that does not say."""


@dataclass(frozen=True)
class Asked:
    """A message with media, and the only right answer."""

    message: Any
    answer: str


def pictures(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    found = []
    for kind in LLAVA_TYPES * 2:
        scenes, question = example(kind, rng)
        shown = [image(encoded(draw(scene, (224, 224)), "PNG")) for scene in scenes]
        found.append(Asked(user(*shown, question.text), question.answer))
    return found


def clips(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    found = []
    for kind in CLIP_TYPES * 5:
        clip, question = clip_example(kind, rng)
        shown = video(mp4([np.asarray(draw(scene, (160, 128))) for scene in clip.frames(FRAMES)]))
        found.append(Asked(user(shown, question.text), question.answer))
    return found


def sounds(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    found = []
    for kind in SOUND_TYPES * 5:
        [sound], question = sound_example(kind, rng)
        found.append(Asked(user(audio(wav(synthesise(sound))), question.text), question.answer))
    return found


def mp4(frames: list[np.ndarray]) -> bytes:
    """H.264 at 4 frames a second, hardly compressed."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


REFUSED = {
    "tiny-llava-1.5": ("audio", r"LLaVA-1\.5 takes no audio; it takes image"),
    "tiny-llava-next-video": (
        "image",
        "LLaVA-NeXT-Video takes no image; it takes video: vLLM's model of the family serves no",
    ),
    "tiny-qwen2-audio": ("video", "Qwen2-Audio takes no video; it takes audio"),
}
"""A medium that the model does not take, and what is said of it."""


@pytest.mark.parametrize(
    ("engine", "model", "cases"),
    [
        ("vllm", "tiny-llava-1.5", pictures),
        ("vllm", "tiny-llava-next-video", clips),
        ("vllm", "tiny-qwen2-audio", sounds),
        ("sglang", "tiny-llava-1.5", pictures),
        ("sglang", "tiny-qwen2-audio", sounds),
    ],
)
def test_answers_are_true_while_the_cache_evicts(
    start_server: Callable[..., Server],
    repository_root: Path,
    engine: str,
    model: str,
    cases: Callable[[int], list[Asked]],
) -> None:
    """One at a time, then all at once with a cache that holds a few of them."""
    server = start_server(
        engine,
        options={"model": str(repository_root / "models" / model)},
        encoder_cache_mb=1,
    )
    asked = cases(40_000)
    untaken, refusal = REFUSED[model]
    ensemble = f"chat_{engine}"
    try:
        with Client(f"localhost:{server.grpc_port}") as client:

            def answer(case: Asked) -> str:
                return client.chat([case.message], model=ensemble, stream=False, temperature=0).text

            assert_true(asked, [answer(case) for case in asked])
            with ThreadPoolExecutor(16) as pool:
                assert_true(asked, list(pool.map(answer, asked)))
            part = {"type": f"{untaken}_url", f"{untaken}_url": {"url": "data:,"}}
            with pytest.raises(TriptychClientError, match=refusal) as refused:
                client.chat([{"role": "user", "content": [part]}], model=ensemble, stream=False)
            assert refused.value.code == "unsupported_medium"
    finally:
        server.stop()


def assert_true(asked: list[Asked], said: list[str]) -> None:
    """The tiny models err seldom; answers to somebody else's medium would nearly all be wrong."""
    wrong = [
        f"{text!r}, right is {case.answer!r}"
        for text, case in zip(said, asked, strict=True)
        if text != case.answer
    ]
    assert len(wrong) <= 0.15 * len(asked), "\n".join(wrong)
