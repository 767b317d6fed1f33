"""README's ways to ask, run as they are written: but for the ports, which must be free ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateways import before
from pictures import asked
from triptych.gateway import Gateway
from triptych.server import Server

pytestmark = [pytest.mark.server, pytest.mark.engine]

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMS = ("curl", "SDK", "tritonclient")
QUESTION = "How many circles?"


def blocks(readme: str, heading: str) -> list[tuple[str, str]]:
    """Language and text of each block that is to be run under a heading."""
    _, _, section = readme.partition(f"\n{heading}\n")
    assert section, f"README has no section {heading}"
    return BLOCK.findall(re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0])


@pytest.fixture(scope="module")
def readme(repository_root: Path) -> str:
    return (repository_root / "README.md").read_text()


@pytest.fixture(scope="module")
def gateway(vllm_server: Server) -> Iterator[Gateway]:
    with before(vllm_server) as gateway:
        yield gateway


@pytest.fixture
def circles(tmp_path: Path) -> str:
    """Puts ``picture.png`` into the folder; the answer to the question about it."""
    found = next(one for one in asked(["count_kind"], 100, seed=5) if one.question == QUESTION)
    found.pictures[0].save(tmp_path / "picture.png")
    return found.answer


def run(language: str, block: str, folder: Path, server: Server, gateway: Gateway) -> str:
    ports = {8080: gateway.port, 8001: server.grpc_port, 8000: server.http_port}
    for written, free in ports.items():
        block = block.replace(f"localhost:{written}", f"localhost:{free}")
    command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, block], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_asks_in_three_ways(readme: str) -> None:
    found = blocks(readme, "### Ask in three ways")
    assert [language for language, _ in found] == ["bash", "python", "python"]
    for (_, block), named in zip(found, ("curl", "openai", "tritonclient"), strict=True):
        assert named in block
        assert QUESTION in block


@pytest.mark.parametrize("form", FORMS)
def test_each_way_gets_the_answer(
    form: str, readme: str, tmp_path: Path, circles: str, vllm_server: Server, gateway: Gateway
) -> None:
    language, block = blocks(readme, "### Ask in three ways")[FORMS.index(form)]
    said = run(language, block, tmp_path, vllm_server, gateway)
    if form == "curl":
        said = json.loads(said)["choices"][0]["message"]["content"]
    assert said == circles


def test_the_library_and_tritons_own_http(
    readme: str, tmp_path: Path, circles: str, vllm_server: Server, gateway: Gateway
) -> None:
    (library, first), (shell, second) = blocks(readme, "## Ask")
    assert run(library, first, tmp_path, vllm_server, gateway) == circles
    answer = json.loads(run(shell, second, tmp_path, vllm_server, gateway))
    assert answer["TEXT"]
    assert json.loads(answer["CHUNK"])["object"] == "chat.completion.chunk"
