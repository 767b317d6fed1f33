"""Positions of Qwen-VL's tokens against transformers'."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from triptych.contract import GridTHW, Prompt, PromptItem, Sampling, TicketItem
from triptych.engines.torchvision_ops import define_missing
from triptych.errors import InvalidValue
from triptych.families import mrope

TEXT, START, PAD, END = 7, 1, 2, 3
MERGE = 2


def prompt(*parts: int | GridTHW) -> tuple[Prompt, list[TicketItem]]:
    """So many tokens of text, and pictures of these grids."""
    ids: list[int] = []
    places, items = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
            continue
        tokens = part[0] * part[1] * part[2] // MERGE**2
        ids.append(START)
        places.append(PromptItem("image", len(ids), tokens, "00"))
        items.append(TicketItem("image", "00", "float32", (tokens, 8), 0, grid_thw=part))
        ids += [PAD, END]
    return Prompt("id", 0, "m", ids, places, Sampling(max_tokens=1)), items


@pytest.fixture(scope="module", params=["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def rope(request: pytest.FixtureRequest) -> Any:
    define_missing()
    import transformers

    config = getattr(transformers, f"{request.param}Config")()
    config.text_config.num_hidden_layers = config.vision_config.depth = 1
    config.vision_config.spatial_merge_size = MERGE
    with torch.device("meta"):
        return getattr(transformers, f"{request.param}Model")(config).get_rope_index


@pytest.mark.parametrize(
    "parts",
    [
        (5,),
        (5, (1, 4, 6), 3),
        ((1, 2, 2),),
        (1, (1, 8, 2), (1, 2, 8), 2, (1, 4, 4)),
        (20, (1, 4, 4), 9),
    ],
)
def test_positions_are_those_of_transformers(rope: Any, parts: Any) -> None:
    asked, items = prompt(*parts)
    positions, delta = mrope.positions(asked, items)
    ids = torch.tensor([asked.expanded()])
    grids = torch.tensor([item.grid_thw for item in items]) if items else None
    expected, deltas = rope(
        input_ids=ids, image_grid_thw=grids, mm_token_type_ids=(ids == PAD).int()
    )
    assert torch.equal(positions.long(), expected)
    assert delta.tolist() == deltas.flatten().tolist()
    assert positions.dtype == delta.dtype == torch.int32


@pytest.mark.parametrize("fields", [{"modality": "video"}, {"grid_thw": None}])
def test_only_pictures_with_a_grid_are_served(fields: dict[str, Any]) -> None:
    asked, [item] = prompt(2, (1, 4, 4))
    with pytest.raises(InvalidValue, match="grid") as error:
        mrope.positions(asked, [msgspec.structs.replace(item, **fields)])
    assert error.value.where == "items[0]"
