"""The adapter of TensorRT-LLM: the promises of every engine, and Hugging Face's tokens.

Against a strict stand-in that computes, and by the same assertions against the library itself
where it is installed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import inspect
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch

from checkpoints import tiny_llava, transformers
from engine_contract import SLOTS, EngineContract, about_a_picture, long, words
from engine_sampling import SamplingContract
from engine_tokens import TokensContract
from generations import collect, generation, picture, text
from qwen_checkpoints import tiny_qwen2_vl, tiny_qwen3_vl
from triptych import families
from triptych.engines.base import Engine
from triptych.engines.trtllm import TrtllmEngine
from triptych.errors import (
    Cancelled,
    ConfigurationError,
    InternalError,
    InvalidRequest,
    Unavailable,
    UnsupportedMedium,
)
from triptych.families import Family
from triptych.settings import DecodeSettings

pytestmark = [
    pytest.mark.engine,
    # One loop for all tests, since the engine lives on the one that started it.
    pytest.mark.asyncio(loop_scope="module"),
]

STAND_IN = Path(__file__).parents[1] / "fakes"
INSTALLED = importlib.util.find_spec("tensorrt_llm") is not None


@pytest.fixture(scope="module", params=["stand-in", "library"] if INSTALLED else ["stand-in"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which ``tensorrt_llm`` is imported."""
    if request.param == "library":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STAND_IN)
        yield request.param
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(library: str) -> None:
    """For what can only be done to the stand-in."""
    if library != "stand-in":
        pytest.skip("the library cannot be made to fail")


def trtllm(family: Family, **settings: Any) -> TrtllmEngine:
    given = {"max_num_seqs": SLOTS, "engine_dtype": "float32", **settings}
    return TrtllmEngine(DecodeSettings(model=str(family.checkpoint.path), **given), family)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(library: str, family: Family) -> AsyncIterator[Engine]:
    engine = trtllm(family)
    await engine.start()
    yield engine
    await engine.stop()


class TestTrtllm(EngineContract, SamplingContract, TokensContract):
    pass


@pytest.mark.usefixtures("library")
class TestSurface:
    """What the adapter depends on is there; that is not much."""

    async def test_the_loader(self) -> None:
        from tensorrt_llm.inputs import default_multimodal_input_loader

        parameters = inspect.signature(default_multimodal_input_loader).parameters
        used = {"tokenizer", "model_dir", "model_type", "modality", "prompts", "mm_embeddings"}
        assert set(parameters) >= used
        required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
        assert required <= used

    async def test_the_engine(self) -> None:
        from tensorrt_llm import LLM

        used = {"inputs", "sampling_params", "streaming", "disaggregated_params"}
        assert set(inspect.signature(LLM.generate_async).parameters) >= used
        assert callable(LLM.shutdown)

    async def test_the_parameters(self) -> None:
        from tensorrt_llm import DisaggregatedParams, SamplingParams

        SamplingParams(max_tokens=3, temperature=0.5, top_k=None, top_p=1.0)
        SamplingParams(max_tokens=3, temperature=1.0, top_k=1, top_p=None)
        fields = {field.name for field in dataclasses.fields(DisaggregatedParams)}
        assert fields >= {
            "request_type",
            "multimodal_embedding_handles",
            "mrope_position_ids_handle",
            "mrope_position_deltas_handle",
        }

    async def test_handles(self) -> None:
        from tensorrt_llm._torch.shared_tensor import SharedTensorContainer

        tensor = torch.zeros(3, 2)
        handle = SharedTensorContainer.from_tensor(tensor).dump_to_dict()
        assert list(handle["tensor_size"]) == [3, 2]

    async def test_a_request(self, engine: Engine, family: Family) -> None:
        from tensorrt_llm import SamplingParams

        assert isinstance(engine, TrtllmEngine)
        assert engine._llm is not None
        parameters = SamplingParams(max_tokens=4, top_k=1)
        request = engine._llm.generate_async(words(family), parameters, streaming=True)
        pieces, tokens = [], []
        async for output in request:
            assert output is request
            pieces.append(output.outputs[0].text_diff)
            tokens += output.outputs[0].token_ids_diff
        assert "".join(pieces) == request.outputs[0].text
        assert tokens == list(request.outputs[0].token_ids)
        assert len(tokens) == 4
        assert request.finished
        assert request.outputs[0].finish_reason == "length"
        request.abort()  # of what has ended does nothing


@pytest.mark.usefixtures("stand_in")
class TestStandIn:
    """What lies outside of that raises, so that no test passes by it."""

    async def test_unknown_arguments(self, engine: Any, family: Family) -> None:
        from tensorrt_llm import LLM, DisaggregatedParams, SamplingParams

        for call in (
            lambda: LLM("model", backend="pytorch", guided_decoding_backend="xgrammar"),
            lambda: SamplingParams(seed=1),
            lambda: DisaggregatedParams(ctx_request_id=1),
            lambda: engine._llm.generate_async([1], cache_salt="a"),
        ):
            with pytest.raises(TypeError):
                call()
        request = engine._llm.generate_async([1], SamplingParams(max_tokens=1))
        async for output in request:
            with pytest.raises(AttributeError):
                output.prompt_token_ids  # noqa: B018 - it is the question whether there is one
            with pytest.raises(AttributeError):
                output.outputs[0].logprobs  # noqa: B018

    async def test_embeddings_that_the_library_would_drop(self, engine: Any) -> None:
        with pytest.raises(TypeError):
            engine._llm.generate_async({"prompt_token_ids": [1], "multi_modal_embeddings": {}})
        with pytest.raises(NotImplementedError):
            engine._llm.generate_async(
                {"prompt": "x", "multi_modal_embeddings": {"image": [torch.zeros(2, 2)]}}
            )

    async def test_a_loader_on_the_event_loop(self, engine: Any) -> None:
        from tensorrt_llm.inputs import default_multimodal_input_loader

        with pytest.raises(AssertionError, match="event loop"):
            default_multimodal_input_loader(
                tokenizer=object(),
                model_dir="",
                model_type="llava",
                modality="image",
                prompts=["x"],
                mm_embeddings=[[torch.zeros(2, 2)]],
            )

    async def test_handles_are_good_once_and_while_somebody_keeps_them(self) -> None:
        from tensorrt_llm._torch import shared_tensor

        tensor = torch.ones(2)
        handle = shared_tensor.SharedTensorContainer.from_tensor(tensor).dump_to_dict()
        assert shared_tensor.read(handle) is tensor
        with pytest.raises(RuntimeError, match="gone"):
            shared_tensor.read(handle)
        lost = shared_tensor.SharedTensorContainer.from_tensor(torch.ones(2)).dump_to_dict()
        with pytest.raises(RuntimeError, match="gone"):
            shared_tensor.read(lost)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("make", [tiny_qwen2_vl, tiny_qwen3_vl])
async def test_greedy_tokens_of_other_qwen_families_are_those_of_hugging_face(
    make: Any, tmp_path: Path
) -> None:
    """Two pictures; those of Qwen3-VL have embeddings of deeper layers beside the main ones."""
    kind = families.load(make(tmp_path / "model"))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    grids = [(1, 4, 6), (1, 8, 4)]
    vision = model.config.vision_config
    features = 3 * vision.temporal_patch_size * vision.patch_size**2
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randn(
        sum(rows * columns for _, rows, columns in grids), features, generator=chance
    )
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    ids = tokenizer(f"{shown}And{shown}What colour?").input_ids
    with torch.inference_mode():
        seen = model.get_image_features(pixels, torch.tensor(grids))
        deeper = getattr(seen, "deepstack_features", None) or ()
        embeddings = [
            torch.cat([main, *(layer[index] for layer in deeper)], dim=1)
            for index, main in enumerate(seen.pooler_output)
        ]
        prompt, media = generation(kind, ids, embeddings, grids)
        expanded = torch.tensor([prompt.expanded()])
        drawn = model.generate(
            input_ids=expanded,
            attention_mask=torch.ones_like(expanded),
            mm_token_type_ids=(expanded == model.config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor(grids),
            do_sample=False,
            max_new_tokens=prompt.sampling.max_tokens,
        )[0, expanded.shape[1] :]
    engine = trtllm(kind)
    await engine.start()
    said = text(await collect(engine, prompt, media))
    await engine.stop()
    assert said == tokenizer.decode(drawn, skip_special_tokens=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family without a grid, whose embeddings go through the library's loader."""
    return families.load(tiny_llava(tmp_path_factory.mktemp("llava") / "model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llava_engine(library: str, llava: Family) -> AsyncIterator[Engine]:
    engine = trtllm(llava)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.mark.parametrize("pictures", [0, 1, 3])
async def test_greedy_tokens_of_llava_are_those_of_hugging_face(
    llava_engine: Engine, llava: Family, pictures: int
) -> None:
    path = llava.checkpoint.path
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    size = model.config.vision_config.image_size
    chance = torch.Generator().manual_seed(pictures)
    pixels = torch.randn(pictures, 3, size, size, generator=chance)
    said = f"USER: {'<image>' * pictures}What colour? ASSISTANT:"
    ids = tokenizer(said, add_special_tokens=False).input_ids
    with torch.inference_mode():
        embeddings = list(model.get_image_features(pixels).pooler_output) if pictures else []
        prompt, media = generation(
            llava, ids, [part.clone() for part in embeddings], [None] * pictures
        )
        expanded = torch.tensor([prompt.expanded()])
        drawn = model.generate(
            input_ids=expanded,
            attention_mask=torch.ones_like(expanded),
            **({"pixel_values": pixels} if pictures else {}),
            do_sample=False,
            max_new_tokens=prompt.sampling.max_tokens,
        )[0, expanded.shape[1] :]
    deltas = await collect(llava_engine, prompt, media)
    assert text(deltas) == tokenizer.decode(drawn, skip_special_tokens=True)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.prompt_tokens == expanded.shape[1]


async def test_an_abort_before_the_engine_has_it(llava_engine: Engine, llava: Family) -> None:
    tokens = llava.plan_image(56, 56).tokens
    embeddings = torch.randn(tokens, llava.embedding_width)
    ids = [llava.checkpoint.added_tokens["<image>"]]
    prompt, media = generation(llava, ids, [embeddings], [None])
    running = asyncio.create_task(collect(llava_engine, prompt, media))
    await asyncio.sleep(0)  # it waits for the loader's thread
    await llava_engine.abort(prompt.id)
    with pytest.raises(Cancelled):
        await running


async def test_text_that_would_be_read_as_other_tokens_is_refused(
    engine: Engine, family: Family
) -> None:
    embeddings, grid = picture(family, 0)
    ids = words(family, "t", pictures=1) + words(family, "h") + words(family, "e")
    with pytest.raises(InvalidRequest, match="other tokens"):
        await collect(engine, *generation(family, ids, [embeddings], [grid]))
    # Words alone go in as they are.
    ids = words(family, "t") + words(family, "h") + words(family, "e")
    assert await collect(engine, *generation(family, ids))


async def test_clips_are_refused_by_name(engine: Engine, family: Family) -> None:
    prompt, media = about_a_picture(family)
    clip = [
        (_changed(item, modality="video", second_per_grid=1.0), tensor) for item, tensor in media
    ]
    places = [_changed(place, modality="video") for place in prompt.items]
    with pytest.raises(UnsupportedMedium, match="pictures alone") as error:
        await collect(engine, _changed(prompt, items=places), clip)
    assert error.value.where == "items[0]"


def _changed(struct: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(struct, **fields)


@pytest.mark.usefixtures("stand_in")
async def test_a_version_without_mrope_refuses_pictures_and_serves_text(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_llm

    older = dataclasses.make_dataclass(
        "DisaggregatedParams", ["request_type", "multimodal_embedding_handles"]
    )
    monkeypatch.setattr(tensorrt_llm, "DisaggregatedParams", older)
    with pytest.raises(UnsupportedMedium, match="M-RoPE"):
        await collect(engine, *about_a_picture(family))
    assert await collect(engine, *generation(family, words(family)))


@pytest.mark.usefixtures("stand_in")
async def test_an_engine_that_fails_is_asked_whether_it_lives(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm.model import Model

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patch:
        patch.setattr(Model, "prefill", fail)
        with pytest.raises(InternalError) as error:
            await collect(engine, *about_a_picture(family))
        assert "CUDA" not in str(error.value)
        with pytest.raises(Unavailable, match="died"):
            await engine.health()
    await engine.health()
    assert await collect(engine, *about_a_picture(family))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("arguments", "named"), [({"max_batchsize": 4}, "max_batchsize"), ({"dtype": "int3"}, "int3")]
)
async def test_wrong_engine_arguments_are_named(
    family: Family, tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(arguments))
    engine = trtllm(family, engine_args=str(file))
    with pytest.raises((ConfigurationError, Unavailable), match=named):
        await engine.start()
    await engine.stop()


@pytest.mark.usefixtures("library")
async def test_stop_ends_what_runs(family: Family) -> None:
    engine = trtllm(family)
    await engine.start()
    tasks = [asyncio.create_task(collect(engine, *long(family))) for _ in range(SLOTS + 1)]
    await asyncio.sleep(0.1)
    await engine.stop()
    await engine.stop()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(end, Cancelled | Unavailable)
    with pytest.raises(Unavailable):
        await engine.health()
    with pytest.raises(Unavailable):
        await collect(engine, *generation(family, words(family)))
