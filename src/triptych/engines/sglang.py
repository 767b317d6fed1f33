"""The engine SGLang, in a process of its own (`triptych.engines.sglang_process`).

Each request brings token ids with every placeholder spread out, and one tensor a modality with the
embeddings of all its items; SGLang's own vision tower is loaded and never asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
import psutil

from triptych.contract import KV_TRANSFER, DType, Modality, Prompt, Sampling, TicketItem
from triptych.engines import sglang_scratch
from triptych.engines.arguments import read_arguments
from triptych.engines.base import Delta, EmbeddingInputs, Engine, Media
from triptych.engines.sampling import SUPPORTED, Declaration, mapped, refused
from triptych.engines.sglang_generation import Generation
from triptych.engines.sglang_wire import (
    CHILD_FAILED,
    Abort,
    Begin,
    Channel,
    Embeddings,
    Failed,
    Generate,
    Output,
    Ready,
    TensorSpec,
)
from triptych.errors import (
    Cancelled,
    ConfigurationError,
    InvalidValue,
    TriptychError,
    Unavailable,
)
from triptych.families.base import Family

if TYPE_CHECKING:
    import torch

GRACE_S = 5.0
"""Seconds that the process has to end in, before it is killed."""


class SglangEngine(Engine):
    """SGLang's ``Engine``; its scheduler and detokeniser are processes below its own."""

    name = "sglang"
    transfers = True
    sampling: ClassVar[Declaration] = {
        "max_tokens": SUPPORTED,
        "temperature": SUPPORTED,
        "top_p": SUPPORTED,
        "top_k": SUPPORTED,
        "min_p": SUPPORTED,
        "presence_penalty": SUPPORTED,
        "frequency_penalty": SUPPORTED,
        "repetition_penalty": mapped("the prompt's tokens are added to those that SGLang counts"),
        "seed": refused("SGLang draws by seeds in deterministic inference alone"),
        "stop": mapped("found in the text as it comes"),
        "logprobs": SUPPORTED,
        "top_logprobs": SUPPORTED,
        "priority": SUPPORTED,
    }
    python: Path = Path(sys.prefix, "bin", "python")
    """Of an environment with SGLang."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._context_length = super().context_length
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._reader: asyncio.Task[None] | None = None
        self._outage: Unavailable | None = Unavailable("the engine is not running")
        self._pids: tuple[int, ...] = ()
        self._scratch: Path | None = None
        self._dtype: DType = "float32"
        self._live: dict[str, Generation] = {}
        """By the id that SGLang has of them."""

    @classmethod
    def refuses(cls, family: type[Family], modality: Modality) -> str:
        """SGLang is given embeddings alone, and there are none of what an engine encodes itself."""
        if modality in family.engine_encodes:
            return f"SGLang takes no embeddings of {family.name}"
        return ""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._context_length

    @property
    def pids(self) -> Sequence[int]:
        """SGLang's process and those below it."""
        return self._pids

    async def start(self) -> None:
        """Start the process, and wait until SGLang has loaded the model in it."""
        from tokenizers import Tokenizer

        read_arguments(self.settings.engine_args)  # to say at once that it cannot be read
        self._scratch = sglang_scratch.make()
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = Channel(ours)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    self.python,
                    "-P",
                    "-m",
                    "triptych.engines.sglang_process",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    env=sglang_scratch.environ(self._scratch),
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                raise ConfigurationError(f"{self.python} cannot be run: {error}") from error
        self._pids = (self._process.pid,)
        self._tokenizer = Tokenizer.from_file(str(self.family.checkpoint.path / "tokenizer.json"))
        self._channel.post(Begin(msgspec.to_builtins(self.settings)))
        try:
            answer, _ = await self._channel.receive()
        except EOFError:
            raise Unavailable(f"SGLang did not start: {await self._ending()}") from None
        if isinstance(answer, Failed):
            raise TriptychError.parse(answer.error)
        assert isinstance(answer, Ready)
        self._context_length = answer.context_length
        self._dtype = answer.dtype
        self._pids += answer.pids
        self._outage = None
        self._reader = asyncio.create_task(self._read(self._channel))

    async def generate(self, prompt: Prompt, media: Media) -> AsyncGenerator[Delta, None]:
        """Generate with SGLang; its detokeniser never cuts a character."""
        channel = self._running()
        embeddings = self.admit(prompt, media)
        items = [item for item, _ in media]
        del media
        # SGLang aborts whatever id begins like the one it is given.
        generation = Generation(uuid.uuid4().hex, prompt, self._tokenizer)
        self._live[generation.id] = generation
        channel.post(*self._request(generation, items, embeddings))
        del embeddings
        try:
            async for delta in generation.deltas():
                yield delta
        finally:
            del self._live[generation.id]
            if not generation.finished and self._outage is None:
                channel.post(Abort(generation.id))

    async def abort(self, prompt_id: str) -> None:
        """End the generation, whether SGLang has it yet or not."""
        for generation in self._live.values():
            if generation.prompt.id == prompt_id:
                generation.put(Cancelled("the generation was aborted"))

    async def health(self) -> None:
        """Whether the process lives, and those below it."""
        self._running()

    async def stop(self) -> None:
        """End every generation, and every process."""
        self._fail(Unavailable("the engine is stopped"), Cancelled("the engine is stopped"))
        if self._reader is not None:
            self._reader.cancel()
        if self._channel is not None:
            await self._channel.close()
        if self._process is not None:
            await asyncio.shield(asyncio.to_thread(_end, self._pids, GRACE_S))
            await self._process.wait()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _running(self) -> Channel:
        if self._outage is not None:
            raise self._outage
        assert self._channel is not None
        return self._channel

    def _fail(self, outage: Unavailable, error: TriptychError) -> None:
        """From now on there is no engine; tell whoever waits for it."""
        if self._outage is None:
            self._outage = outage
        for generation in self._live.values():
            generation.put(error)

    async def _read(self, channel: Channel) -> None:
        """Hand what comes from SGLang to its generation, until nothing more comes."""
        with contextlib.suppress(EOFError):
            while True:
                message, _ = await channel.receive()
                assert isinstance(message, Output | Failed)
                if generation := self._live.get(message.id):
                    generation.put(
                        message
                        if isinstance(message, Output)
                        else TriptychError.parse(message.error)
                    )
        outage = Unavailable(f"the engine has died: {await self._ending()}")
        self._fail(outage, Unavailable("the engine died during the generation"))

    async def _ending(self) -> str:
        assert self._process is not None
        status = await self._process.wait()
        if status == CHILD_FAILED:
            return "a process of SGLang's failed; its own log says why"
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"its process ended {how}; its own log says why"

    def _request(
        self, generation: Generation, items: Sequence[TicketItem], inputs: EmbeddingInputs
    ) -> tuple[Generate, list[torch.Tensor]]:
        """What SGLang is asked for, and the tensors that go with it."""
        prompt = generation.prompt
        media, tensors = [], []
        for modality, values in inputs.items():
            of_it = [item for item in items if item.modality == modality]
            found, tensor = self._embeddings(of_it, values)
            media.append(found)
            tensors.append(tensor)
        if len(media) > 1:
            # SGLang looks for a clip's timing in the first of them alone.
            shared = {name: value for each in media for name, value in each.fields.items()}
            media = [msgspec.structs.replace(each, fields=shared) for each in media]
        room = self._context_length - prompt.length
        sampling = prompt.sampling
        asked = Generate(
            generation.id,
            prompt.expanded(),
            _sampling_params(sampling, min(sampling.max_tokens, room)),
            sampling.top_logprobs if sampling.logprobs else None,
            tuple(media),
            _transfer(prompt),
            sampling.priority,
        )
        return asked, tensors

    def _embeddings(
        self,
        items: Sequence[TicketItem],
        values: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
    ) -> tuple[Embeddings, torch.Tensor]:
        """The items of one modality."""
        import torch

        modality = items[0].modality
        name = f"{modality}_embeds"
        if not isinstance(values, Mapping):
            values = {name: values[0] if len(values) == 1 else torch.cat(list(values))}
        tensor = values[name].to("cpu", getattr(torch, self._dtype))
        fields = {key: value.tolist() for key, value in values.items() if key != name}
        spec = TensorSpec(self._dtype, tuple(tensor.shape))
        return Embeddings(modality.upper(), spec, _hash(items), fields), tensor


class Bootstrap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the two sides of a request meet whose keys and values change the engine."""

    bootstrap_host: str
    """Of the side that prefills."""
    bootstrap_port: int
    """Its ``disaggregation_bootstrap_port``."""
    bootstrap_room: Annotated[int, msgspec.Meta(ge=0)]
    """The router's number for this request."""


def _transfer(prompt: Prompt) -> dict[str, Any]:
    """`Prompt.kv_transfer` as SGLang's request has it.

    Raises:
        InvalidValue: It is no `Bootstrap`.
    """
    if not prompt.kv_transfer:
        return {}
    try:
        return msgspec.structs.asdict(msgspec.convert(prompt.kv_transfer, Bootstrap))
    except msgspec.ValidationError as error:
        raise InvalidValue(str(error), where=KV_TRANSFER) from None


def _sampling_params(sampling: Sampling, max_tokens: int) -> dict[str, Any]:
    """SGLang's own; stop strings are left in the text, which `StopStrings` then cuts."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "no_stop_trim": True,
    }


def _hash(items: Sequence[TicketItem]) -> int:
    """Of their embeddings, and of what their positions in the prompt are made of."""
    told = [(item.hash, item.grid_thw, item.second_per_grid) for item in items]
    return int.from_bytes(hashlib.blake2b(msgspec.json.encode(told), digest_size=8).digest())


def _end(pids: Sequence[int], grace_s: float) -> None:
    """Wait until processes have ended, and then kill them; those below them too."""
    found = [process for pid in pids for process in _family(pid)]
    _, alive = psutil.wait_procs(found, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []
