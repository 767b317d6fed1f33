"""The matrix against what families do, and README against the matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import checkpoints
import qwen_checkpoints
from triptych import families, matrix
from triptych.cli import main
from triptych.contract import Modality
from triptych.engines.base import Engine
from triptych.engines.vllm import VllmEngine
from triptych.errors import InvalidValue, UnsupportedMedium
from triptych.families import Family

MAKERS: dict[str, Callable[[Path], Path]] = {
    "LLaVA-1.5": checkpoints.tiny_llava,
    "LLaVA-NeXT-Video": checkpoints.tiny_llava_next_video,
    "Qwen2-VL": qwen_checkpoints.tiny_qwen2_vl,
    "Qwen2.5-VL": qwen_checkpoints.tiny_qwen2_5_vl,
    "Qwen3-VL": qwen_checkpoints.tiny_qwen3_vl,
    "Qwen2-Audio": checkpoints.tiny_qwen2_audio,
}
CELLS = {(cell.family, cell.medium, cell.form): cell for cell in matrix.cells(engines=[VllmEngine])}


def plans(family: Family, medium: Modality) -> bool:
    """Whether the family plans a medium."""
    plan = {
        "image": lambda: family.plan_image(60, 60),
        "video": lambda: family.plan_video(4, 60, 60, 1.0),
        "audio": lambda: family.plan_audio(9_000),
    }
    try:
        return plan[medium]() is not None
    except UnsupportedMedium:
        return False


def takes_embeddings(family: Family, medium: Modality) -> bool:
    """Whether the family judges embeddings, and does not refuse them as such."""
    try:
        family.plan_embeddings(medium, (4, family.embedding_width), (1, 4, 4))
    except UnsupportedMedium:
        return False
    except InvalidValue:
        return True
    return True


def test_every_family_is_in_the_matrix() -> None:
    assert {family.name for family in families.FAMILIES} == set(MAKERS)
    assert {name for name, _, _ in CELLS} == set(MAKERS)
    assert len(CELLS) == len(MAKERS) * len(get_args(Modality)) * len(get_args(matrix.Form))


@pytest.mark.parametrize("name", MAKERS)
def test_the_matrix_is_what_the_family_does(name: str, tmp_path: Path) -> None:
    family = families.load(MAKERS[name](tmp_path / "model"))
    for medium in get_args(Modality):
        for form in ("url", "data", "file"):
            assert CELLS[name, medium, form].served == plans(family, medium)
        assert CELLS[name, medium, "embeddings"].served == takes_embeddings(family, medium)


def test_there_is_a_reason_for_every_no() -> None:
    assert all(bool(cell.why) != cell.served for cell in matrix.cells())


def test_an_engine_may_refuse_what_a_family_has() -> None:
    class Picky(Engine):
        name = "picky"
        caution = "untried"

        @classmethod
        def refuses(cls, family: type[Family], modality: Modality) -> str:
            return "no pictures here" if modality == "image" else ""

    found = matrix.cells(engines=[VllmEngine, Picky])
    reasons = {(cell.medium, cell.why) for cell in found if cell.engine == "picky" and cell.why}
    assert ("image", "no pictures here") in reasons
    header, *rows = matrix.table(found)
    assert header == ("family", "medium", "vllm", "picky (untried)", "why not")
    first = ("LLaVA-1.5", "image", "url, data, file, embeddings", "no", "no pictures here")
    assert rows[0] == first


def test_an_engine_that_has_never_run_is_shown_as_such() -> None:
    assert "trtllm (never run against the real engine)" in next(matrix.table(matrix.cells()))


def shown_in_readme(repository_root: Path, name: str) -> str:
    readme = (repository_root / "README.md").read_text()
    shown = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", readme, re.DOTALL)
    assert shown
    return shown[1]


def test_readme_shows_the_matrix(repository_root: Path) -> None:
    assert shown_in_readme(repository_root, "matrix") == matrix.markdown(
        matrix.table(matrix.cells())
    ), "`triptych matrix --markdown` prints it"


def test_the_command_prints_it_in_three_ways(capsys: Any) -> None:
    assert main(["matrix", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "family": "LLaVA-1.5",
        "medium": "image",
        "form": "url",
        "engine": "vllm",
        "served": True,
        "why": "",
        "caution": "",
    }
    assert main(["matrix", "--markdown"]) == 0
    assert capsys.readouterr().out == matrix.markdown(matrix.table(matrix.cells())) + "\n"
    assert main(["matrix"]) == 0
    assert "Qwen2-Audio" in capsys.readouterr().out


def test_readme_shows_what_sampling_means(repository_root: Path) -> None:
    assert shown_in_readme(repository_root, "sampling") == matrix.markdown(
        matrix.sampling_table(matrix.sampling())
    ), "`triptych matrix --sampling --markdown` prints it"


def test_the_command_prints_sampling_in_three_ways(capsys: Any) -> None:
    assert main(["matrix", "--sampling", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["field"] for row in rows} >= {"max_tokens", "logit_bias"}
    assert main(["matrix", "--sampling", "--markdown"]) == 0
    assert "| `max_tokens` | " in capsys.readouterr().out
    assert main(["matrix", "--sampling"]) == 0
    said = capsys.readouterr().out
    assert "`max_tokens`" in said
    assert "whatever the engine: " in said
