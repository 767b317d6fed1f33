"""The Qwen-VL families held against transformers: clips, towers, and what goes to the engine."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import qwen_checkpoints as tiny
from triptych import families
from triptych.chat.prompt import MediumSize, PromptBuilder
from triptych.chat.request import parse
from triptych.contract import PromptItem, TicketItem
from triptych.errors import ConfigurationError, InvalidValue, MediaError
from triptych.families.qwen3_vl import Qwen3VideoProcessor
from triptych.families.qwen_processors import PixelSize, VideoProcessor
from triptych.families.qwen_vl import QwenVL
from triptych.families.towers.patches import video_normalisation_table
from triptych.media.image import fit
from unit.qwen import picture

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Of the largest value, float32: the order of the sums differs, nothing else."""
MAKERS = {
    "Qwen2-VL": tiny.tiny_qwen2_vl,
    "Qwen2.5-VL": tiny.tiny_qwen2_5_vl,
    "Qwen3-VL": tiny.tiny_qwen3_vl,
    "Qwen3-VL MoE": tiny.tiny_qwen3_vl_moe,
}
HF_VIDEO = "Qwen2VLVideoProcessor"
WITH_VIDEO = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")
PROCESSORS = {"Qwen2-VL": VideoProcessor, "Qwen3-VL": Qwen3VideoProcessor}
# transformers says that its default will change; ours is what the checkpoint says.
pytestmark = pytest.mark.filterwarnings("ignore:.*cap_pixels_per_frame:FutureWarning")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("qwen")
    return {name: make(base / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]


@pytest.fixture(scope="module")
def family(directory: Path) -> QwenVL:
    return families.load(directory)


@pytest.fixture(scope="module")
def tower(family: QwenVL) -> Any:
    return family.load_tower(CPU, torch.float32)


@pytest.fixture(scope="module")
def hf_tower(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.eval().model.visual


@pytest.fixture(scope="module", params=WITH_VIDEO)
def with_video(request: pytest.FixtureRequest, directories: dict[str, Path]) -> QwenVL:
    return families.load(directories[request.param])


def hf_video_processor(name: str) -> Any:
    import transformers

    return getattr(transformers, {"Qwen3-VL": "Qwen3VLVideoProcessor"}.get(name, HF_VIDEO))


def their_processor(family: QwenVL) -> Any:
    return hf_video_processor(family.name).from_pretrained(family.checkpoint.path)


def clip(family: QwenVL, frames: int, rows: int, columns: int, seed: int = 1) -> Any:
    """A clip of noise and its grid; rows and columns of tokens."""
    from triptych.contract import Item

    side = family.processor.factor
    shape = (frames, rows * side, columns * side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    grid = (-(-frames // 2), 2 * rows, 2 * columns)
    return Item("video", f"clip{seed}", "uint8", shape, 0, grid[0] * rows * columns, grid), pixels


def run(tower: Any, *media: Any) -> list[torch.Tensor]:
    items, arrays = zip(*media, strict=True)
    with torch.inference_mode():
        return tower.encode(items, [torch.from_numpy(array) for array in arrays])


def run_hf(hf_tower: Any, tower: Any, *media: Any) -> list[torch.Tensor]:
    """transformers' tower on our patches: main embeddings, then deepstack ones, side by side."""
    patches = torch.cat([tower.patchify(torch.from_numpy(array)) for _, array in media])
    grids = torch.tensor([item.grid_thw for item, _ in media])
    with torch.inference_mode():
        out = hf_tower(patches, grids)
    both = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1)
    return list(both.split([item.tokens for item, _ in media]))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE * theirs.abs().max().item(), rtol=0)


# --- towers --------------------------------------------------------------------------------------


def test_tower_is_transformers_tower(family: QwenVL, tower: Any, hf_tower: Any) -> None:
    """Alone and mixed, pictures and clips, squares and one line of tokens."""
    media = [picture(family, *size) for size in [(300, 200), (56, 56), (448, 420), (28, 2000)]]
    media += [clip(family, 5, 2, 5), clip(family, 1, 5, 2), picture(family, 300, 200, seed=9)]
    theirs = run_hf(hf_tower, tower, *media)
    for medium, ours, expected in zip(media, run(tower, *media), theirs, strict=True):
        assert ours.shape == (medium[0].tokens, family.embedding_width)
        assert_close(ours, expected)
        assert_close(run(tower, medium)[0], expected)


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("max_tokens", [1, 10, 25, 1000])
def test_a_clip_in_parts_is_the_clip(
    family: QwenVL, tower: Any, frames: int, max_tokens: int
) -> None:
    item, pixels = clip(family, frames, 2, 5)
    parts = family.parts(item, max_tokens)
    for part in parts:
        family.check_item(part)
        assert part.tokens <= max(max_tokens, 10), "a step is not cut"
    assert len(parts) == -(-item.tokens // max(10, max_tokens // 10 * 10))
    pieces = np.split(pixels, np.cumsum([part.shape[0] for part in parts])[:-1])
    found = [run(tower, (part, piece))[0] for part, piece in zip(parts, pieces, strict=True)]
    assert_close(torch.cat(found), run(tower, (item, pixels))[0])


def test_a_picture_has_no_parts(family: QwenVL) -> None:
    item, _ = picture(family, 300, 200)
    assert family.parts(item, 1) == [item]


def test_positions_are_stretched_over_the_frame(directories: dict[str, Path]) -> None:
    """Grids smaller and larger than the 6 × 6 that are learned."""
    family = families.load(directories["Qwen3-VL"])
    tower = family.load_tower(CPU, torch.float32)
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights as theirs

    from triptych.families.towers.segments import WHOLE_FRAME, WindowLayout

    grids = [(1, 2, 2), (2, 4, 6), (1, 6, 6), (1, 2, 20)]
    layout = WindowLayout.of(grids, merge=2, window=WHOLE_FRAME, device=CPU)
    ours = tower._positions(layout.positions, layout.sizes)
    indices, weights = theirs(torch.tensor(grids), 6, align_corners=True, spatial_merge_size=2)
    expected = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)[layout.patch_order]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


# --- FP8 -----------------------------------------------------------------------------------------


BLOCK = (48, 40)


def quantise(path: Path) -> dict[str, torch.Tensor]:
    """Write the tower's matrices in FP8 with scales, by blocks that do not fit; their values."""
    weights = load_file(path / "model.safetensors")
    values = {}
    for name, weight in list(weights.items()):
        if ".visual.blocks." not in name or weight.ndim != 2:
            continue
        blocks = [-(-extent // size) for extent, size in zip(weight.shape, BLOCK, strict=True)]
        scale = torch.rand(blocks) * 0.01 + 0.001
        spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        weights[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        weights[name + "_scale_inv"] = scale
        values[name] = weights[name].float() * spread
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": BLOCK}
    (path / "config.json").write_text(json.dumps(config))
    return values


def test_weights_of_an_fp8_checkpoint_are_scaled_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = quantise(tiny.tiny_qwen3_vl(tmp_path / "model"))
    tower = families.load(tmp_path / "model").load_tower(CPU, torch.float32)
    assert len(values) == 4 * 4
    assert not caplog.text, "scales are no unused weights"
    for name, weight in tower.state_dict().items():
        if "model.visual." + name in values:
            assert torch.equal(weight, values["model.visual." + name])


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_faulty_scales_are_named(tmp_path: Path, fault: str) -> None:
    path = tiny.tiny_qwen3_vl(tmp_path / "model")
    quantise(path)
    weights = load_file(path / "model.safetensors")
    name = "model.visual.blocks.2.attn.qkv.weight"
    scales = weights.pop(name + "_scale_inv")
    if fault == "shape":
        weights[name + "_scale_inv"] = scales[1:].clone()
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=f"{name}_scale_inv"):
        families.load(path).load_tower(CPU, torch.float32)


# --- clips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
@given(
    st.integers(1, 40),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.booleans(),
    st.sampled_from([None, PixelSize(4 * 28 * 28, 300 * 28 * 28)]),
)
def test_size_of_a_clip_is_transformers_size(
    name: str, frames: int, height: int, width: int, cap: bool, size: PixelSize | None
) -> None:
    """Their resize is run on a device without memory."""
    from transformers.image_utils import SizeDict

    kind, theirs = PROCESSORS[name], hf_video_processor(name)
    ours = kind(cap_pixels_per_frame=cap, **({"size": size} if size else {}))
    if name == "Qwen3-VL":
        frames = max(frames, 2)  # theirs refuses fewer, ours fills up
    least, most = ours.area
    clip = torch.empty((1, frames, 3, height, width), dtype=torch.uint8, device="meta")
    options = {"resample": 3, "factor": ours.factor, "temporal_factor": 2}
    try:
        expected = theirs().resize(
            clip,
            size=SizeDict(shortest_edge=least, longest_edge=most),
            cap_pixels_per_frame=cap,
            **options,
        )
    except ValueError:
        with pytest.raises(MediaError):
            ours.fit(frames, height, width)
    else:
        assert ours.fit(frames, height, width) == tuple(expected.shape[-2:])


def test_clip_is_planned_as_transformers_processes_it(with_video: QwenVL) -> None:
    """From the checkpoint's own files; 90×120 grows to the least area, 900×700 shrinks."""
    theirs = their_processor(with_video)
    for frames, height, width in [(4, 90, 120), (3, 900, 700), (2, 300, 300), (9, 57, 56)]:
        video = torch.zeros((frames, 3, height, width), dtype=torch.uint8)
        expected = theirs([video], return_tensors="pt", do_sample_frames=False)
        plan = with_video.plan_video(frames, height, width, fps=2.0)
        assert plan.grid_thw == tuple(expected["video_grid_thw"][0].tolist())
        assert plan.tokens == expected["pixel_values_videos"].shape[0] // 4
        assert plan.second_per_grid == 1.0
        assert plan.resample == "bicubic"


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_pixels_of_a_clip_are_transformers_pixels_bit_for_bit(
    with_video: QwenVL, frames: int
) -> None:
    """Where nothing is scaled: normalised, filled up and cut into patches."""
    tower = with_video.load_tower(CPU, torch.float32)
    item, pixels = clip(with_video, frames, 3, 5)
    video = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    theirs = their_processor(with_video)(
        [video], return_tensors="pt", do_resize=False, do_sample_frames=False
    )
    assert torch.equal(tower.patchify(torch.from_numpy(pixels)), theirs["pixel_values_videos"])
    assert item.grid_thw == tuple(theirs["video_grid_thw"][0].tolist())


@pytest.mark.parametrize(
    "flags", [(True, True), (True, False), (False, True), (False, False)], ids=str
)
def test_table_of_a_clip_is_transformers_normalisation(flags: tuple[bool, bool]) -> None:
    rescale, normalise = flags
    processor = VideoProcessor(do_rescale=rescale, do_normalize=normalise)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).repeat(3, 1, 1)
    theirs = hf_video_processor("Qwen2-VL")().rescale_and_normalize(
        values, rescale, 1 / 255, normalise, processor.image_mean, processor.image_std
    )
    assert torch.equal(video_normalisation_table(processor), theirs[:, 0].float())


@pytest.mark.parametrize("size", [(90, 120), (900, 700), (640, 900)])
def test_scaled_frames_are_nearly_transformers_frames(
    with_video: QwenVL, size: tuple[int, int]
) -> None:
    """Pillow and torchvision round differently: by one of 256 in few places, by two in hardly any.

    Not so where one side grows and the other shrinks, and torchvision scales them in another
    order: in noise a few values in a hundred are further off, in a soft picture by two at most.
    """
    shape = (2, *size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plan = with_video.plan_video(*shape[:3], fps=1.0)
    ours = np.stack([fit(Image.fromarray(frame), plan) for frame in frames])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    theirs = their_processor(with_video)(
        [video], return_tensors="pt", do_sample_frames=False, do_rescale=False, do_normalize=False
    )["pixel_values_videos"]
    raw = video.new_tensor(ours).permute(0, 3, 1, 2)
    expected = their_processor(with_video)(
        [raw],
        return_tensors="pt",
        do_sample_frames=False,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )["pixel_values_videos"]
    off = (expected.float() - theirs.float()).abs()
    assert off.max() <= 2
    assert (off > 1).float().mean() < 1e-4
    assert (off > 0).float().mean() < 0.02


# --- configuration and engine --------------------------------------------------------------------


def test_fields_of_a_video_processor_are_read(directories: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.tiny_qwen2_5_vl(tmp_path / "model")
    file = path / "video_preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_pixels": 28 * 28 * 9}))
    plan = families.load(path).plan_video(2, 1000, 1000, 1.0)
    assert plan.tokens == 9
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": 16}))
    with pytest.raises(ConfigurationError, match="patch_size is 16, but the vision tower has 14"):
        families.load(path)


@pytest.mark.parametrize(
    ("vision", "what"),
    [
        ({"num_position_embeddings": 37}, "num_position_embeddings is 37, not a square"),
        ({"deepstack_visual_indexes": [2, 0]}, "must rise within the 4 blocks"),
        ({"deepstack_visual_indexes": [4]}, "must rise within the 4 blocks"),
    ],
    ids=str,
)
def test_faulty_deepstack_is_refused(tmp_path: Path, vision: dict[str, Any], what: str) -> None:
    path = tiny.tiny_qwen3_vl(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= vision
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=what):
        families.load(path)


def entry(family: QwenVL, seconds: float | None) -> TicketItem:
    shape = (4, family.embedding_width)
    return TicketItem(
        "video", "h", "float32", shape, 0, grid_thw=(2, 2, 4), second_per_grid=seconds
    )


def test_clips_go_to_the_engine_with_their_timing(directories: dict[str, Path]) -> None:
    """Embeddings that come without have 1 s a step, as in transformers."""
    family = families.load(directories["Qwen2.5-VL"])
    items = [entry(family, 0.5), entry(family, None)]
    embeddings = [torch.rand(4, family.embedding_width) for _ in items]
    inputs = family.embedding_inputs(items, embeddings)["video"]
    assert torch.equal(inputs["video_embeds"], torch.cat(embeddings))
    assert inputs["video_grid_thw"].tolist() == [[2, 2, 4], [2, 2, 4]]
    assert inputs["second_per_grid_ts"].tolist() == [0.5, 1.0]


def test_qwen2_vl_counts_steps_alone(directories: dict[str, Path]) -> None:
    family = families.load(directories["Qwen2-VL"])
    inputs = family.embedding_inputs([entry(family, 0.5)], [torch.rand(4, family.embedding_width)])
    assert inputs["video"].keys() == {"video_embeds", "video_grid_thw"}


def test_deepstack_makes_embeddings_wider(directories: dict[str, Path]) -> None:
    family = families.load(directories["Qwen3-VL"])
    assert family.embedding_width == 3 * tiny.WIDTH
    item = TicketItem("image", "h", "float32", (4, tiny.WIDTH), 0, grid_thw=(1, 4, 4))
    with pytest.raises(InvalidValue, match=r"must be of shape \(4, 384\), got \(4, 128\)"):
        family.embedding_inputs([item], [torch.rand(4, tiny.WIDTH)])


# --- what stands in the prompt -------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "fps"), [(4, 2.0), (5, 1.0), (2, 0.3), (1, 1.0)])
def test_text_of_a_clip_is_transformers_text(
    directories: dict[str, Path], frames: int, fps: float
) -> None:
    """Token by token, from the processor's metadata on their side and the frames' times on ours."""
    import transformers
    from transformers.video_utils import VideoMetadata

    directory = directories["Qwen3-VL"]
    family = families.load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessorPil.from_pretrained(directory),
        tokenizer,
        their_processor(family),
    )
    body = {"type": "video_url", "video_url": {"url": "data:,"}}
    request = parse(msgspec.json.encode({"messages": [{"role": "user", "content": [body]}]}))
    builder = PromptBuilder(directory, {"video": "<|video_pad|>"}, max_model_len=1024)
    rendered = builder.render(request)

    plan = family.plan_video(frames, 100, 160, fps)
    times = family.prompt_times(plan.grid_thw, [frame / fps for frame in range(frames)], None)
    size = MediumSize(plan.tokens, "h", family.prompt_text(plan.grid_thw, times), times)
    prompt = builder.build(request, rendered, [size])

    # Theirs refuses one frame, and says that it fills an odd number up with the last.
    shown = max(frames, 2)
    indices = [min(frame, frames - 1) for frame in range(shown)]
    theirs = processor(
        text=[tokenizer.decode(rendered.token_ids)],
        videos=[torch.zeros((shown, 3, 100, 160), dtype=torch.uint8)],
        video_metadata=[VideoMetadata(frames, fps, frames_indices=indices)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert prompt.expanded() == theirs["input_ids"][0].tolist()
    assert prompt.length == len(prompt.expanded())
    assert plan.tokens == prompt.expanded().count(family.checkpoint.added_tokens["<|video_pad|>"])


def test_times_of_embeddings_are_those_of_evenly_spaced_frames(
    directories: dict[str, Path],
) -> None:
    family = families.load(directories["Qwen3-VL"])
    even = family.prompt_times((3, 2, 2), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], 1.0)
    assert family.prompt_times((3, 2, 2), [], 1.0) == even == (0.25, 1.25, 2.25)
    with pytest.raises(InvalidValue, match="needs second_per_grid_ts"):
        family.prompt_times((3, 2, 2), [], None)


def test_other_families_tell_no_times(directories: dict[str, Path]) -> None:
    family = families.load(directories["Qwen2.5-VL"])
    assert family.prompt_times((2, 2, 2), [0.0, 1.0], None) == ()
    assert family.prompt_text((2, 2, 2), ()) == ""


def test_times_go_to_the_engine(directories: dict[str, Path]) -> None:
    family = families.load(directories["Qwen3-VL"])
    picture = PromptItem("image", 0, 4, "h")
    clip = PromptItem("video", 1, 4, "h", spread=[1, 2], times=(0.25, 1.25))
    still = TicketItem("image", "h", "float32", (4, 384), 0, grid_thw=(1, 4, 4))
    items = [still, entry(family, None)]
    inputs = family.prompt_inputs([picture, clip], items)
    assert inputs == {"video": {"timestamps": [[0.25, 1.25]]}}
    assert family.prompt_inputs([picture], [still]) == {}
    short = msgspec.structs.replace(clip, times=(0.25,))
    with pytest.raises(InvalidValue, match="1 times for a grid of") as caught:
        family.prompt_inputs([picture, short], items)
    assert caught.value.where == "items[1]"


def test_a_family_can_be_sent_to_a_media_worker(family: QwenVL) -> None:
    there = pickle.loads(pickle.dumps(family))
    assert there.plan_image(300, 200) == family.plan_image(300, 200)
    assert there.plan_video(4, 300, 200, 2.0) == family.plan_video(4, 300, 200, 2.0)
