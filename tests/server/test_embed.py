"""``triptych embed``: what the encoder made is taken in the medium's place, to the same answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from media_files import clip, sound
from pictures import asked, encoded, noise
from triptych.cli import main
from triptych.cli.media import part_of
from triptych.gateway import Gateway, GatewayOptions
from triptych.server import Server
from triptych_client import AsyncClient, Client, MediaUnreadable, image, user

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
ECHO = ["--model", "chat_echo"]


def address(server: Server) -> str:
    return f"localhost:{server.grpc_port}"


def said(server: Server, path: Path, model: str, question: str = "What?") -> str:
    """The answer to a question about a file."""
    with Client(address(server)) as client:
        message = [user(part_of(str(path)), question)]
        return client.chat(message, model=model, temperature=0).text


def seen(answer: str) -> list[str]:
    """The lines in which the echo says what embeddings it was given, with their checksum."""
    return [line for line in answer.splitlines() if "crc32" in line and "prompt:" not in line]


def embed(server: Server, source: Path, *flags: str) -> Path:
    target = source.with_suffix(".safetensors")
    command = ["embed", str(source), "-o", str(target), "--server", address(server), *flags]
    assert main(command) == 0
    return target


def test_a_pictures_embeddings_are_the_same_bytes(
    echo_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "noise.png"
    picture.write_bytes(encoded(noise(200, 150, seed=5), "png"))
    file = embed(echo_server, picture, *ECHO, "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["file"] == str(file)
    assert row["bytes"] == file.stat().st_size
    assert row["modality"] == "image"
    assert row["tokens"] * 4 == row["grid_thw"][1] * row["grid_thw"][2]
    of_picture, of_file = (seen(said(echo_server, path, "chat_echo")) for path in (picture, file))
    assert of_picture == of_file
    assert len(of_file) == 1


def test_a_clips_embeddings_are_the_same_bytes(echo_server: Server, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip())
    file = embed(echo_server, path, *ECHO)
    of_clip, of_file = (said(echo_server, each, "chat_echo") for each in (path, file))
    assert seen(of_clip) == seen(of_file)
    assert seen(of_file)[0].startswith("video 0: ")


def test_a_sounds_embeddings_are_the_same_bytes(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    options = {"model": str(ROOT / "models" / "tiny-qwen2-audio")}
    server = start_server("echo", options=options)
    path = tmp_path / "tone.wav"
    path.write_bytes(sound())
    file = embed(server, path, *ECHO)
    of_sound, of_file = (said(server, each, "chat_echo") for each in (path, file))
    server.stop()
    assert seen(of_sound) == seen(of_file)
    assert seen(of_file)[0].startswith("audio 0: ")


def test_the_answer_is_the_same_and_true(vllm_server: Server, tmp_path: Path) -> None:
    [question] = asked(["contents"], 1, seed=11)
    picture = tmp_path / "shapes.png"
    picture.write_bytes(encoded(question.pictures[0], "png"))
    file = embed(vllm_server, picture)
    for path in (picture, file):
        assert said(vllm_server, path, "chat_vllm", question.question) == question.answer

    url = f"data:application/octet-stream;base64,{base64.b64encode(file.read_bytes()).decode()}"
    part = {"type": "image_embeds", "image_embeds": {"url": url}}
    text = {"type": "text", "text": question.question}
    options = GatewayOptions(triton=address(vllm_server), port=0)
    with Gateway(options) as gateway:
        answer = httpx.post(
            f"{gateway.url}/v1/chat/completions",
            json={
                "model": "chat_vllm",
                "messages": [{"role": "user", "content": [part, text]}],
                "temperature": 0,
            },
            trust_env=False,
        ).json()
    assert answer["choices"][0]["message"]["content"] == question.answer


async def test_asynchronously(echo_server: Server) -> None:
    data = encoded(noise(64, 48, seed=6), "png")
    with Client(address(echo_server)) as client:
        blocking = client.embed(image(data), model="chat_echo")
    async with AsyncClient(address(echo_server)) as client:
        assert await client.embed(image(data), model="chat_echo") == blocking
        with pytest.raises(MediaUnreadable):
            await client.embed(image(data[:100]), model="chat_echo")


# The command line.


def test_several_go_into_a_directory(
    echo_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = []
    for name in ("a.png", "b.png"):
        sources.append(str(tmp_path / name))
        Path(sources[-1]).write_bytes(encoded(noise(64, 64, seed=len(sources)), "png"))
    target = tmp_path / "out"
    target.mkdir()
    command = ["embed", *sources, "-o", str(target), "--server", address(echo_server), *ECHO]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *(str(target / "a.safetensors"), str(target / "b.safetensors"))
    ]
    assert main(command) == 2
    assert "a.safetensors is there already; --force overwrites it" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["nothing.png"], 2, "there is no file nothing.png"),
        (["PICTURE", "-o", "nowhere/x.safetensors"], 2, "there is no directory nowhere"),
        (["PICTURE", "PICTURE", "-o", "x.safetensors"], 2, "2 media go into a directory"),
        (["PICTURE", "PICTURE"], 2, "two media would become"),
        (["PICTURE", "--server", "nowhere"], 2, "nowhere"),
        (["PICTURE", "--server", "localhost:1"], 1, "no server at localhost:1"),
        (["PICTURE", "--server", "http://SERVER", *ECHO], 1, "tensors go over gRPC"),
        (["PICTURE", "--server", "SERVER", "--model", "chat_nothing"], 1, "(not_found)"),
        (["PICTURE", "--server", "SERVER", "--model", "encoder"], 1, "no ensemble with an encoder"),
        (["BROKEN", "--server", "SERVER", *ECHO], 1, "(media_unreadable)"),
    ],
)
def test_what_is_wrong_is_one_line(
    echo_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = encoded(noise(32, 32), "png")
    Path("a.png").write_bytes(whole)
    Path("broken.png").write_bytes(whole[:60])
    port = echo_server.http_port if "http://SERVER" in flags else echo_server.grpc_port
    names = {"PICTURE": "a.png", "BROKEN": "broken.png", "SERVER": f"localhost:{port}"}
    for name, value in names.items():
        flags = [flag.replace(name, value) for flag in flags]
    assert main(["embed", *flags]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.safetensors"))
