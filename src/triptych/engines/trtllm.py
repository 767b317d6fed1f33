"""The engine TensorRT-LLM, by its PyTorch backend. It has never run against the real library.

The library needs an NVIDIA GPU and cannot be installed without one, so all that is known of it here
is its documentation. This module and `triptych.engines.trtllm_inputs` depend on little of it:

- ``tensorrt_llm.LLM(model, tokenizer=…, backend="pytorch", …)``, its ``generate_async(inputs,
  sampling_params, streaming, disaggregated_params)`` and ``shutdown()``
- the request that ``generate_async`` returns: an asynchronous iterator that gives itself, with
  ``finished``, ``abort()``, and ``outputs[0]`` with ``text_diff``, ``token_ids_diff`` and
  ``finish_reason``
- ``SamplingParams(max_tokens, temperature, top_k, top_p)``
- ``tensorrt_llm.inputs.default_multimodal_input_loader``, ``DisaggregatedParams`` and
  ``SharedTensorContainer``, for embeddings

The tests have a strict stand-in for that much, which really computes, and hold the library itself
to the same assertions where it is installed.

Source: https://nvidia.github.io/TensorRT-LLM/llm-api/reference.html; features/sampling.html there
says what the sampler of the PyTorch backend knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar

from triptych.contract import Modality, Prompt
from triptych.engines import environment, torchvision_ops
from triptych.engines.arguments import read_arguments
from triptych.engines.base import Delta, Engine, FinishReason, Media, Usage
from triptych.engines.sampling import SUPPORTED, Declaration, mapped, refused
from triptych.engines.stops import StopStrings
from triptych.engines.trtllm_inputs import InputMaker, Inputs, load_tokenizer
from triptych.errors import (
    Cancelled,
    ConfigurationError,
    InternalError,
    InvalidRequest,
    TriptychError,
    Unavailable,
)
from triptych.families.base import Family

if TYPE_CHECKING:
    import torch
    from tensorrt_llm import LLM, SamplingParams

logger = logging.getLogger("triptych.engines.trtllm")

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_PASSED_OVER = refused("the sampler of TensorRT-LLM 1.2 passes over it")
_FROM_CHECKPOINT = refused(
    "the sampler of TensorRT-LLM 1.2 passes over it; "
    "give the neutral value where generation_config.json has another"
)
_UNTRIED = refused("its form in TensorRT-LLM has not been tried")
PROBE_S = 30.0
"""Seconds that an engine which has failed on a request has to draw one token."""


class TrtllmEngine(Engine):
    """TensorRT-LLM's `LLM`; its workers are processes of their own."""

    name = "trtllm"
    caution = "never run against the real engine"
    sampling: ClassVar[Declaration] = {
        "max_tokens": SUPPORTED,
        "temperature": mapped("0 as `top_k` 1"),
        "top_p": SUPPORTED,
        "top_k": SUPPORTED,
        "min_p": _FROM_CHECKPOINT,
        "presence_penalty": _PASSED_OVER,
        "frequency_penalty": _PASSED_OVER,
        "repetition_penalty": _FROM_CHECKPOINT,
        "seed": _PASSED_OVER,
        "stop": mapped("found in the text as it comes"),
        "logprobs": _UNTRIED,
        "top_logprobs": _UNTRIED,
        "priority": refused("its queue has not been tried"),
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._llm: LLM | None = None
        self._inputs: InputMaker | None = None
        self._suspect = False
        """It has failed on a request for a reason that may be its own."""
        self._live: dict[str, Generation] = {}
        """By prompt id."""

    @classmethod
    def refuses(cls, family: type[Family], modality: Modality) -> str:
        """TensorRT-LLM takes embeddings of pictures."""
        return "" if modality == "image" else "TensorRT-LLM takes embeddings of pictures alone"

    async def start(self) -> None:
        """Import TensorRT-LLM and load the model."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        given = read_arguments(self.settings.engine_args)
        environment.prepare({"TLLM_LOG_LEVEL": "WARNING"})
        torchvision_ops.define_missing()
        try:
            from tensorrt_llm import LLM
        except ImportError as error:
            raise ConfigurationError(f"TensorRT-LLM cannot be imported: {error}") from error
        tokenizer = load_tokenizer(self.family.checkpoint.path)
        arguments = {**self._defaults(), "tokenizer": tokenizer, **given}
        try:
            self._llm = LLM(**arguments)
        except (TypeError, ValueError) as error:  # pydantic's are among them
            raise ConfigurationError(f"TensorRT-LLM refuses its configuration: {error}") from error
        except Exception as error:
            raise Unavailable(f"TensorRT-LLM did not start: {error}") from error
        self._inputs = InputMaker(self.family, tokenizer, _dtype(arguments["dtype"], self.family))

    def _defaults(self) -> dict[str, Any]:
        """The arguments that the user may overrule."""
        return {
            "model": str(self.family.checkpoint.path.resolve()),
            "backend": "pytorch",
            "dtype": self.settings.engine_dtype,
            "max_batch_size": self.settings.max_num_seqs,
            "max_seq_len": self.context_length,
            # Embeddings of the loader take the same token ids whatever the picture: the keys and
            # values of one would be found again for another.
            "kv_cache_config": {"enable_block_reuse": False},
        }

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Generate with TensorRT-LLM; stop strings are found in the text."""
        llm = self._running()
        embeddings = self.admit(prompt, media)
        assert self._inputs is not None
        generation = self._live[prompt.id] = Generation(prompt)
        try:
            inputs = await self._inputs.make(prompt, media, embeddings)
            parameters = _sampling_params(prompt, self.context_length)
            generation.begin(llm, inputs, parameters)
            del inputs
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    yield delta
        except TriptychError:
            raise
        except ValueError as error:
            raise InvalidRequest(f"TensorRT-LLM: {error}") from error
        except Exception as error:
            self._suspect = True
            logger.error("TensorRT-LLM failed on %s", prompt.id, exc_info=error)
            raise InternalError("the engine failed on this request") from error
        finally:
            generation.abort()
            self._live.pop(prompt.id, None)

    async def abort(self, prompt_id: str) -> None:
        """End the generation, whether TensorRT-LLM has it yet or not."""
        if generation := self._live.get(prompt_id):
            generation.abort()

    async def health(self) -> None:
        """Whether it runs; after a failure, whether it still draws a token."""
        llm = self._running()
        if not self._suspect:
            return
        try:
            await asyncio.wait_for(_draw_one(llm), PROBE_S)
        except Exception as error:
            raise Unavailable("the engine has died") from error
        self._suspect = False

    async def stop(self) -> None:
        """Abort what runs and end the engine's processes."""
        for prompt_id in list(self._live):
            await self.abort(prompt_id)
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    def _running(self) -> LLM:
        if self._llm is None:
            raise Unavailable("the engine is not running")
        return self._llm


class Generation:
    """One request, from before the engine has it until it has ended."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._stops = StopStrings(prompt.sampling.stop)
        self._request: Any = None
        self._aborted = False
        self._alive: Sequence[Any] = ()

    def begin(self, llm: LLM, inputs: Inputs, parameters: SamplingParams) -> None:
        """Give it to the engine.

        Raises:
            Cancelled: It was aborted meanwhile.
            ValueError: The engine does not take it.
        """
        self._raise_if_aborted()
        self._alive = inputs.alive
        self._request = llm.generate_async(
            inputs.inputs,
            sampling_params=parameters,
            streaming=True,
            disaggregated_params=inputs.disaggregated_params,
        )

    def abort(self) -> None:
        """End it; nothing if it has ended."""
        self._aborted = True
        if self._request is not None and not self._request.finished:
            self._request.abort()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the request adds to its answer.

        Raises:
            Cancelled: It was aborted.
            InternalError: The engine ended it for a reason that it should not have.
        """
        drawn = 0
        async for output in self._request:
            self._raise_if_aborted()
            self._alive = ()  # the engine has read them
            completion = output.outputs[0]
            tokens = len(completion.token_ids_diff)
            drawn += tokens
            text, stopped = self._stops.add(completion.text_diff)
            if not stopped and not output.finished:
                yield Delta(text, tokens)
                continue
            reason: FinishReason | None = (
                "stop" if stopped else _FINISH.get(completion.finish_reason)
            )
            if reason is None:
                raise InternalError(f"TensorRT-LLM ended it: {completion.finish_reason}")
            text += "" if stopped else self._stops.rest()
            usage = Usage(self._prompt.length, drawn)
            yield Delta(text, tokens, finish_reason=reason, usage=usage)
            return
        self._raise_if_aborted()

    def _raise_if_aborted(self) -> None:
        if self._aborted:
            raise Cancelled("the generation was aborted")


def _sampling_params(prompt: Prompt, context_length: int) -> SamplingParams:
    from tensorrt_llm import SamplingParams

    sampling = prompt.sampling
    greedy = sampling.temperature == 0
    return SamplingParams(
        max_tokens=min(sampling.max_tokens, context_length - prompt.length),
        # Without top_k or top_p TensorRT-LLM is greedy, whatever the temperature; and that must
        # be above 0.
        temperature=1.0 if greedy else sampling.temperature,
        top_k=1 if greedy else sampling.top_k or None,
        top_p=None if greedy else sampling.top_p,
    )


async def _draw_one(llm: LLM) -> None:
    from tensorrt_llm import SamplingParams

    async for _ in llm.generate_async([0], sampling_params=SamplingParams(max_tokens=1)):
        pass


def _dtype(name: str, family: Family) -> torch.dtype | None:
    """The language model's dtype, as set, or as the checkpoint says; None: it says none."""
    import torch

    config = family.checkpoint.config
    for said in (name, family.checkpoint.text_config.get("dtype"), config.get("dtype"),
                 config.get("torch_dtype")):  # fmt: skip
        found = getattr(torch, str(said).removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    return None
