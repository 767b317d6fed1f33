"""`LLM` and the requests that it answers, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from pathlib import Path
from typing import Any

import torch

from tensorrt_llm.model import Model, State
from tensorrt_llm.parameters import DisaggregatedParams, SamplingParams


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: Any = None,
        backend: str,
        dtype: str = "auto",
        max_batch_size: int = 2048,
        max_seq_len: int | None = None,
        kv_cache_config: dict[str, Any] | None = None,
    ) -> None:
        if backend != "pytorch":
            raise ValueError(f"the stand-in is of the PyTorch backend, got {backend!r}")
        if tokenizer is None:
            raise ValueError("the stand-in has no tokenizer of its own")
        if unknown := set(kv_cache_config or {}) - {"enable_block_reuse"}:
            raise ValueError(f"kv_cache_config has no {unknown}")
        torch.set_num_threads(1)
        self._reuses = (kv_cache_config or {}).get("enable_block_reuse", True)
        self._tokenizer = tokenizer
        self._model = Model(Path(model), dtype)
        self._most, self._longest = max_batch_size, max_seq_len
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="tensorrt_llm")
        self._thread.start()

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
    ) -> RequestOutput:
        if not self._open:
            raise RuntimeError("LLM is shutting down")
        ids, media = self._read(inputs, disaggregated_params)
        job = Job(sampling_params or SamplingParams(), streaming, ids, media)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return RequestOutput(job, self._tokenizer)

    def shutdown(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _read(self, inputs: Any, disaggregated: DisaggregatedParams | None) -> tuple[Any, Any]:
        """Token ids with one placeholder a picture, and what the pictures are."""
        llava = self._model.model_type.startswith("llava")
        if isinstance(inputs, list):
            if disaggregated is not None:
                raise ValueError("text prompt is required but not provided")
            return inputs, None
        if extra := set(inputs) - {"prompt", "multi_modal_embeddings"}:
            raise TypeError(f"inputs have no {extra}")
        ids = self._tokenizer(inputs["prompt"]).input_ids
        if disaggregated is not None:
            if llava:
                raise ValueError("multimodal disaggregated inference: one handle for this model")
            return ids, disaggregated
        if "multi_modal_embeddings" not in inputs:
            return ids, None
        if not llava:
            raise NotImplementedError("input processor does not support multimodal embedding input")
        if self._reuses:
            raise AssertionError("keys and values of one picture would be reused for another")
        [(modality, embeddings)] = inputs["multi_modal_embeddings"].items()
        if modality != "image":
            raise ValueError("only image modality is supported for external embeddings")
        return ids, embeddings

    def _run(self) -> None:
        active: list[Job] = []
        while True:
            with self._changed:
                while self._open and not active and not self._waiting:
                    self._changed.wait()
                if not self._open:
                    for job in [*active, *self._waiting]:
                        job.end("cancelled")
                    return
                while self._waiting and len(active) < self._most:
                    active.append(self._waiting.popleft())
            active = [job for job in active if self._advance(job)]

    def _advance(self, job: Job) -> bool:
        """Draw one token; whether another is to come."""
        try:
            if job.aborted:
                return job.end("cancelled")
            if job.state is None:
                job.state = self._model.prefill(job.ids, job.media)
                job.media = None
            token = job.state.draw(job.sampling)
            full = self._longest is not None and job.state.length + 1 >= self._longest
            if token in self._model.end_ids:
                return job.end("stop", token)
            if job.drawn + 1 >= job.sampling.max_tokens or full:
                return job.end("length", token)
            self._model.step(job.state, token)
            return job.tell(token)
        except Exception as error:
            return job.fail(error)


class Job:
    """The engine's side of a request."""

    def __init__(self, sampling: SamplingParams, streaming: bool, ids: Any, media: Any) -> None:
        self.sampling, self.streaming = sampling, streaming
        self.ids, self.media = ids, media
        self.state: State | None = None
        self.aborted = False
        self.drawn = 0
        self.steps: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._kept: list[int] = []

    def tell(self, token: int) -> bool:
        self.drawn += 1
        self._kept.append(token)
        if self.streaming:
            self._put((self._kept, None))
            self._kept = []
        return True

    def end(self, reason: str, *tokens: int) -> bool:
        self._put(([*self._kept, *tokens], reason))
        return False

    def fail(self, error: Exception) -> bool:
        self._put(error)
        return False

    def _put(self, step: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.steps.put_nowait, step)


class RequestOutput:
    """One request and its answer: the asynchronous iterator gives itself."""

    __slots__ = ("_job", "finished", "outputs")

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self._job = job
        self.outputs = [CompletionOutput(tokenizer)]
        self.finished = False

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        step = await self._job.steps.get()
        if isinstance(step, Exception):
            self.finished = True
            raise step
        tokens, reason = step
        self.outputs[0]._add(tokens, reason)
        self.finished = reason is not None
        return self

    def abort(self) -> None:
        self._job.aborted = True


class CompletionOutput:
    """The answer so far; a character that is not whole is held back."""

    __slots__ = (
        "_tokenizer",
        "finish_reason",
        "text",
        "text_diff",
        "token_ids",
        "token_ids_diff",
    )

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        self.text_diff = ""
        self.token_ids: list[int] = []
        self.token_ids_diff: list[int] = []
        self.finish_reason: str | None = None

    def _add(self, tokens: list[int], reason: str | None) -> None:
        self.token_ids_diff = tokens
        self.token_ids = [*self.token_ids, *tokens]
        self.finish_reason = reason
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        whole = text if reason else text.rstrip("�")
        self.text_diff = whole[len(self.text) :]
        self.text = whole
