"""The engine vLLM, in this process, with the language model only.

The vision tower stays out: each request brings token ids with one placeholder an item, and the
items' embeddings, under their content hashes, so that vLLM's prefix cache knows a picture again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

from triptych.contract import KV_TRANSFER, TRACEPARENT, Prompt
from triptych.engines import vllm_environment, vllm_grammar, vllm_ingest
from triptych.engines.arguments import read_arguments
from triptych.engines.base import (
    Alternative,
    Delta,
    Engine,
    FinishReason,
    Media,
    TokenLogprob,
    Usage,
)
from triptych.engines.claim import Claim
from triptych.engines.sampling import SUPPORTED, Declaration
from triptych.engines.token_bytes import token_bytes
from triptych.engines.vllm_arguments import build_config
from triptych.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    InvalidValue,
    Overloaded,
    TriptychError,
    Unavailable,
    UnknownField,
)

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("triptych.engines.vllm")

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine(Engine):
    """vLLM's `AsyncLLM`: its scheduler and workers are a process of their own."""

    name = "vllm"
    transfers = True
    ingests = frozenset({"inline", "connector"})
    sampling: ClassVar[Declaration] = {
        "max_tokens": SUPPORTED,
        "temperature": SUPPORTED,
        "top_p": SUPPORTED,
        "top_k": SUPPORTED,
        "min_p": SUPPORTED,
        "presence_penalty": SUPPORTED,
        "frequency_penalty": SUPPORTED,
        "repetition_penalty": SUPPORTED,
        "seed": SUPPORTED,
        "stop": SUPPORTED,
        "logprobs": SUPPORTED,
        "top_logprobs": SUPPORTED,
        "response_format": SUPPORTED,
        "tool_choice": SUPPORTED,
        "priority": SUPPORTED,
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._llm: AsyncLLM | None = None
        # It lives as long as the engine: the kernel ends an engine's process with the thread that
        # started it, and not only with the whole process.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="triptych-vllm")
        self._context_length = super().context_length
        self._has_priorities = True
        self._live: dict[str, bool] = {}
        """By prompt id, whether the generation was aborted."""
        self._pids: tuple[int, ...] = ()
        self._stopping = asyncio.Lock()
        self._stopped = False

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, as vLLM has it."""
        return self._context_length

    @property
    def pids(self) -> Sequence[int]:
        """The engine's process and its workers."""
        return self._pids

    async def start(self) -> None:
        """Import vLLM, load the weights, wait until the engine's process answers."""
        await asyncio.get_running_loop().run_in_executor(self._starter, self._start)

    def _start(self) -> None:
        begun = time.monotonic()
        given = read_arguments(self.settings.engine_args)
        on_cpu = vllm_environment.prepare(eager=given.get("enforce_eager", True))
        from vllm.v1.engine.async_llm import AsyncLLM

        imported = time.monotonic()
        config = build_config(self.settings, self.family, given, on_cpu=on_cpu)
        self._dtype: torch.dtype = config.model_config.dtype
        self._context_length = config.model_config.max_model_len
        self._has_priorities = config.scheduler_config.policy == "priority"
        configured = time.monotonic()
        try:
            self._llm = AsyncLLM.from_vllm_config(
                config, disable_log_stats=not config.observability_config.otlp_traces_endpoint
            )
        except Exception as error:
            raise Unavailable(f"vLLM did not start: {error}; its own log says why") from error
        self._pids = _processes(self._llm)
        logger.info(
            "started in %.1f s: import %.1f, configuration %.1f, engine, by %s, %.1f",
            time.monotonic() - begun,
            imported - begun,
            configured - imported,
            os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork"),
            time.monotonic() - configured,
        )

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Generate with vLLM; the text is cut by its detokeniser, never within a character."""
        llm = self._running()
        engine_prompt = self._engine_prompt(prompt, media)
        parameters = _sampling_params(prompt)
        self._live[prompt.id] = False
        try:
            (rendered,) = await llm.renderer.render_cmpl_async([engine_prompt])
            self._raise_if_aborted(prompt.id)
            if isinstance(media, Claim):
                vllm_ingest.refer(media.ticket, prompt.id, rendered, parameters)
                media.taken = True
            drawn = 0
            generated = llm.generate(
                rendered,
                parameters,
                prompt.id,
                trace_headers=self._trace_headers(prompt),
                priority=prompt.sampling.priority,
            )
            async with aclosing(generated) as outputs:
                async for output in outputs:
                    self._raise_if_aborted(prompt.id)
                    if isinstance(media, Claim) and output.outputs[0].finish_reason == "error":
                        raise await vllm_ingest.why(llm, prompt.id)
                    delta = _delta(output, prompt, drawn, llm.renderer.tokenizer)
                    drawn += delta.tokens
                    yield delta
        except TriptychError:
            raise
        except Exception as error:
            raise _translated(error, prompt.id) from error
        finally:
            self._live.pop(prompt.id, None)

    async def abort(self, prompt_id: str) -> None:
        """End the generation, whether vLLM has it yet or not."""
        if prompt_id in self._live and self._llm is not None:
            self._live[prompt_id] = True
            await self._llm.abort(prompt_id)

    async def give_back(self, claim: Claim) -> None:
        """By the engine's process, which alone is known to the owner."""
        if not claim.taken:
            claim.taken = True
            await vllm_ingest.give_back(self._running(), claim.ticket)

    async def health(self) -> None:
        """Whether the engine's process lives."""
        self._running()

    async def stop(self) -> None:
        """Abort what runs and end the engine's process."""
        async with self._stopping:
            if self._stopped:
                return
            for prompt_id in list(self._live):
                await self.abort(prompt_id)
            # In that thread a start under way comes to its end first.
            await asyncio.get_running_loop().run_in_executor(self._starter, self._shut_down)
            self._starter.shutdown()
            self._stopped = True

    def _shut_down(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            # Its __del__ shuts down once more, and must not wait for the interpreter's end, when
            # the modules it needs are gone.
            self._llm = None
            gc.collect()

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise Unavailable("the engine is not running")
        if self._llm.errored:
            raise Unavailable("the engine has died")
        return self._llm

    def _raise_if_aborted(self, prompt_id: str) -> None:
        if self._live.get(prompt_id):
            raise Cancelled("the generation was aborted")

    def _trace_headers(self, prompt: Prompt) -> dict[str, str] | None:
        """The request's place in its trace, for vLLM's span of it."""
        if not (self.settings.otlp_endpoint and prompt.traceparent):
            return None
        return {TRACEPARENT: prompt.traceparent}

    def _engine_prompt(self, prompt: Prompt, media: Media) -> dict[str, Any]:
        """The prompt as vLLM takes it, checked."""
        inputs = self.admit(prompt, media)
        if prompt.sampling.priority and not self._has_priorities:
            raise UnknownField(
                "the engine vllm was started with scheduling_policy 'fcfs', "
                f"got {prompt.sampling.priority}",
                where="priority",
            )
        items = [item for item, _ in media]
        if not items:
            return {"prompt_token_ids": prompt.token_ids}
        told = self.family.prompt_inputs(prompt.items, items)
        return {
            "prompt_token_ids": prompt.token_ids,
            "multi_modal_data": {
                modality: self._handed_over(tensors, told.get(modality, {}))
                for modality, tensors in inputs.items()
            },
            "multi_modal_uuids": {
                modality: [item.hash for item in items if item.modality == modality]
                for modality in inputs
            },
        }

    def _handed_over(
        self, tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], told: Mapping[str, Any]
    ) -> dict[str, Any] | list[torch.Tensor]:
        """The tensors as they go to the engine's process: by value, so from the CPU's memory."""
        if isinstance(tensors, Mapping):
            given = {
                # Seconds of a clip's step are no embeddings: bfloat16 would move them.
                name: self._by_value(tensor) if name.endswith("_embeds") else tensor.cpu()
                for name, tensor in tensors.items()
            }
            return {**given, **told}
        return [self._by_value(tensor) for tensor in tensors]

    def _by_value(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        return tensor.to("cpu", self._dtype if tensor.is_floating_point() else tensor.dtype)


def _processes(llm: AsyncLLM) -> tuple[int, ...]:
    """The process of each engine core of ours, and what these have started."""
    manager = llm.engine_core.resources.engine_manager
    cores = [process.pid for process in getattr(manager, "processes", ())]
    workers = [worker.pid for core in cores for worker in psutil.Process(core).children(True)]
    return (*cores, *workers)


def _sampling_params(prompt: Prompt) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = prompt.sampling
    try:
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=list(sampling.stop),
            logprobs=sampling.top_logprobs if sampling.logprobs else None,
            structured_outputs=vllm_grammar.structured_outputs(sampling),
            output_kind=RequestOutputKind.DELTA,
            extra_args={KV_TRANSFER: prompt.kv_transfer} if prompt.kv_transfer else None,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _delta(output: RequestOutput, prompt: Prompt, drawn: int, tokenizer: Any) -> Delta:
    """One output of vLLM, after ``drawn`` tokens.

    Raises:
        Cancelled: vLLM has aborted the request.
        InvalidValue: There is no way to go on that the request's schema allows.
        InternalError: It has failed on it.
    """
    completion = output.outputs[0]
    tokens = len(completion.token_ids)
    reason = usage = None
    if completion.finish_reason is not None:
        if completion.finish_reason == "abort":
            raise Cancelled("the generation was aborted")
        reason = _FINISH.get(completion.finish_reason)
        if reason is None and (where := vllm_grammar.where(prompt.sampling)):
            raise InvalidValue("the engine found no answer that fulfils it", where=where)
        if reason is None:
            raise InternalError(f"vLLM ended the generation: {completion.finish_reason}")
        usage = Usage(prompt.length, drawn + tokens, output.num_cached_tokens or 0)
    logprobs: tuple[TokenLogprob, ...] = ()
    if completion.logprobs:
        pairs = zip(completion.token_ids, completion.logprobs, strict=False)
        logprobs = tuple(
            _token_logprob(token, place, prompt.sampling.top_logprobs, tokenizer)
            for token, place in pairs
        )
    transfer = output.kv_transfer_params if reason else None
    return Delta(completion.text, tokens, logprobs, reason, usage, transfer)


def _token_logprob(token: int, place: dict[int, Logprob], top: int, tokenizer: Any) -> TokenLogprob:
    """The drawn token among vLLM's entries for its place, which are the likeliest and it.

    vLLM shows a token's text as it stands among those before it: the last byte of a character as
    the whole of it. The token's own bytes come from the vocabulary.
    """

    def raw(other: int) -> bytes | None:
        piece = tokenizer.convert_ids_to_tokens(other)
        # Some models have more rows than their tokenizer has tokens.
        return None if piece is None else token_bytes(piece)

    likeliest = sorted(place, key=lambda other: -place[other].logprob)[:top]
    return TokenLogprob(
        place[token].decoded_token or "",
        place[token].logprob,
        raw(token),
        tuple(
            Alternative(place[other].decoded_token or "", place[other].logprob, raw(other))
            for other in likeliest
        ),
    )


def _translated(error: Exception, prompt_id: str) -> TriptychError:
    """An exception of vLLM in our words; what is unknown is logged, since callers see no cause."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return Unavailable("the engine died during the generation")
    if isinstance(error, VLLMClientError):
        return InvalidRequest(str(error))
    if isinstance(error, GracefulHTTPError):
        return Overloaded(str(error))
    logger.error("vLLM failed on %s", prompt_id, exc_info=error)
    return InternalError("the engine failed on this request")
