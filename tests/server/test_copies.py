"""How often a road copies embeddings between the tower and the engine, as ARCHITECTURE.md says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import places
from conftest import ServerFactory
from ensembles import by_nixl
from pictures import noise
from triptych.server import Server
from triptych_client import Client, image, user

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places") / "notes"


@pytest.fixture(scope="module")
def server(
    notes: Path,
    start_server: ServerFactory,
    echo_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("watched") / "model_repository"
    shutil.copytree(echo_repository, repository)
    places.watch(repository, notes)
    other = by_nixl(repository, "chat_echo")
    options = {"model_repository": str(repository), "extra_args": (f"--load-model={other}",)}
    server = start_server("echo", options=options)
    yield server
    server.stop()


def stated(repository_root: Path) -> dict[str, int]:
    """The table's counts, by the road's name."""
    text = (repository_root / "ARCHITECTURE.md").read_text()
    section = text.partition("### Copies")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (\w+) \|.*\| (\d+) \|$", section, re.MULTILINE)
    return {road: int(count) for road, count in rows}


@pytest.mark.parametrize(
    ("road", "ensemble"), [("tensor", "chat_echo"), ("nixl", "chat_echo_by_nixl")]
)
def test_a_road_copies_as_often_as_is_said(
    server: Server, notes: Path, repository_root: Path, road: str, ensemble: str
) -> None:
    notes.unlink(missing_ok=True)
    with Client(f"localhost:{server.grpc_port}") as client:
        asked = user(image(noise(280, 280, seed=len(road))), "What is this?")
        client.chat([asked], model=ensemble, stream=False, max_tokens=1)
    seen = [json.loads(line) for line in notes.read_text().splitlines()]
    told = ["tower", "encoder", *(["decode"] if road == "tensor" else []), "engine"]
    assert [what for what, _ in seen] == told

    way = [place for _, place in seen]
    if road == "tensor":
        # Triton carries what neither side has there itself.
        assert not any(place.startswith(places.TRITON) for place in way)
        way.insert(2, places.TRITON)
    copies = sum(one != other for one, other in pairwise(way))
    assert copies == stated(repository_root)[road]
