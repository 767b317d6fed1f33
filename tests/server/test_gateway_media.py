"""Every kind of content part through the gateway, by the official SDK.

The echo tells the checksum of the embeddings that reached it: two ways to name one medium are the
same if these are.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateways import MODEL, before, picture, text
from media_files import clip, data_uri, sound
from triptych.server import Server
from triptych_client import Client

pytestmark = pytest.mark.server

MP4 = data_uri(clip(frames=20), "video/mp4")


@pytest.fixture(scope="module")
def hearing(start_server: Callable[..., Server], repository_root: Path) -> Iterator[openai.OpenAI]:
    """The SDK before a model that hears."""
    model = str(repository_root / "models" / "tiny-qwen2-audio")
    server = start_server("echo", options={"model": model})
    with (
        before(server) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    server.stop()


def ask(client: openai.OpenAI, *parts: dict[str, Any]) -> tuple[list[str], Any]:
    """What the echo says of each medium, and the details of the usage."""
    messages = [{"role": "user", "content": [*parts, text("What is it?")]}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    said = answer.choices[0].message.content or ""
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return re.findall(
        r"^((?:image|video|audio) \d+: .*)$", said, re.MULTILINE
    ), usage.prompt_tokens_details


def rows(line: str) -> int:
    """Embeddings of a medium."""
    return int(line.partition(": ")[2].partition("×")[0])


def part(kind: str, **medium: Any) -> dict[str, Any]:
    return {"type": kind, kind: medium}


def test_pictures_and_clips_in_one_message(sdk: openai.OpenAI) -> None:
    """Each stands where its placeholder does, and counts as what it is."""
    (first, second, third), details = ask(
        sdk, picture(), part("video_url", url=MP4, num_frames=4), picture("jpeg", seed=1)
    )
    assert [line.split()[0] for line in (first, second, third)] == ["image", "video", "image"]
    assert details.image_tokens == rows(first) + rows(third)
    assert details.video_tokens == rows(second)
    assert details.audio_tokens == 0


def test_frames_of_a_clip(sdk: openai.OpenAI) -> None:
    def tokens(**options: Any) -> int:
        return int(ask(sdk, part("video_url", url=MP4, **options))[1].video_tokens)

    assert tokens(num_frames=8) == 2 * tokens(num_frames=4)
    assert tokens(fps=2) == tokens(num_frames=4)  # the clip has two seconds
    with pytest.raises(openai.BadRequestError) as error:
        tokens(num_frames=4, fps=2)
    assert error.value.param == "messages[0].content[0].video_url.fps"


def test_embeddings_in_the_place_of_their_picture(sdk: openai.OpenAI, echo_server: Server) -> None:
    shown = picture(seed=5)
    [pixels], details = ask(sdk, shown)
    with Client(f"localhost:{echo_server.grpc_port}") as client:
        encoded = client.embed(shown, model=MODEL)
    file = data_uri(encoded.safetensors())
    [given], again = ask(sdk, part("image_embeds", url=file))
    assert given == pixels
    assert again.image_tokens == details.image_tokens
    [given], _ = ask(sdk, part("image_url", url=file))
    assert given == pixels


def test_a_tensor_beside_the_request_is_not_there_over_http(sdk: openai.OpenAI) -> None:
    place = {"offset": 0, "shape": [4, 64], "dtype": "float32"}
    with pytest.raises(openai.BadRequestError, match="TENSORS, which has 0") as error:
        ask(sdk, part("image_embeds", tensor=place, image_grid_thw=[1, 4, 4]))
    assert error.value.param == "messages[0].content[0].image_embeds.tensor"


def test_a_name_of_the_callers_own(sdk: openai.OpenAI) -> None:
    named = {**picture(seed=6), "uuid": "picture-6"}
    assert ask(sdk, named)[0] == ask(sdk, picture(seed=6))[0]
    with pytest.raises(openai.BadRequestError) as error:
        ask(sdk, {**named, "uuid": "x" * 257})
    assert error.value.param == "messages[0].content[0].uuid"


def test_sounds_by_both_kinds_of_part(hearing: openai.OpenAI) -> None:
    wav, mp3 = sound(), sound("libmp3lame", "mp3")
    given = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    [first], details = ask(hearing, part("input_audio", **given))
    [second], again = ask(hearing, part("audio_url", url=data_uri(wav, "audio/wav")))
    assert first == second
    assert details.audio_tokens == again.audio_tokens == rows(first)
    given = {"data": base64.b64encode(mp3).decode(), "format": "mp3"}
    [third], _ = ask(hearing, part("input_audio", **given))
    assert third.startswith("audio 0")
    both, details = ask(hearing, part("input_audio", **given), part("audio_url", url=data_uri(wav)))
    assert [line.partition(": ")[2] for line in both] == [
        line.partition(": ")[2] for line in (third, first)
    ]
    assert details.audio_tokens == sum(map(rows, both))


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_does_not_take_is_refused(
    sdk: openai.OpenAI, hearing: openai.OpenAI, stream: bool
) -> None:
    heard = part("audio_url", url=data_uri(sound(), "audio/wav"))
    for client, given in ((sdk, heard), (hearing, picture())):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": [text("a"), given]}],
                stream=stream,
            )
        assert error.value.code == "unsupported_medium"
        assert error.value.param.startswith("messages[0].content[1]")


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        (part("video_url", url=data_uri(clip()[:2000], "video/mp4")), 422, "media_unreadable"),
        (part("video_url", url=picture()["image_url"]["url"]), 415, "media_type"),
        (part("image_embeds", url=data_uri(b"no tensors")), 415, "media_type"),
        (part("image_url", url=data_uri(b"")), 415, "media_type"),
        (part("image_url", url="http://[::1]/a.png"), 403, "media_forbidden"),
    ],
    ids=["cut", "a picture", "no file", "empty", "private"],
)
def test_every_fault_of_a_medium_has_its_status(
    sdk: openai.OpenAI, given: dict[str, Any], status: int, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        ask(sdk, given)
    assert (error.value.status_code, error.value.code) == (status, code)
    if status == 422:
        assert isinstance(error.value, openai.UnprocessableEntityError)
