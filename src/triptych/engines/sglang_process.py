"""The process that SGLang runs in: ``python -m triptych.engines.sglang_process FD``.

SGLang kills its process and all processes below it whenever anything in it fails, so it gets one of
its own, which the stage can lose and start again. The stage holds the other end of the socket
``FD``: when that closes, this process ends, and with it all that SGLang has started.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import time
import warnings
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from triptych import families, logs
from triptych.engines import environment, sglang_plugin, torchvision_ops
from triptych.engines.sglang_arguments import MARGIN, build_arguments
from triptych.engines.sglang_wire import (
    CHILD_FAILED,
    Abort,
    Begin,
    Channel,
    Failed,
    Generate,
    Output,
    Ready,
    Scored,
    tensor,
)
from triptych.errors import (
    ConfigurationError,
    InternalError,
    InvalidRequest,
    TriptychError,
    Unavailable,
)
from triptych.settings import DecodeSettings

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

logger = logging.getLogger("triptych.engines.sglang")

_PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""
_ENVIRONMENT = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # before temperature, as everywhere else
    "SGLANG_SANITIZE_NAN_LOGITS": "1",  # drawing from NaN would end SGLang
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "triptych.engines.sglang_models",
    "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "triptych.engines.sglang_processors",
    sglang_plugin.OURS: "1",
}


def main() -> None:
    """Serve the stage at the other end of the socket that the command line names."""
    _die_with(os.getppid())
    logs.configure()
    end = socket.socket(fileno=int(sys.argv[1]))
    # A fork that still had it would keep the stage from seeing that this process has ended.
    os.register_at_fork(after_in_child=end.close)
    try:
        asyncio.run(_serve(end))
    except BaseException:
        logger.exception("SGLang's process ends")
        _end(1)
    _end(0)


async def _serve(end: socket.socket) -> None:
    channel = Channel(end)
    try:
        begin, _ = await channel.receive()
        assert isinstance(begin, Begin)
        settings = msgspec.convert(begin.settings, DecodeSettings)
        logs.configure(settings.log_level)
        try:
            server = Server(settings, channel)
        except TriptychError as error:
            channel.post(Failed(str(error)))
            await channel.receive()  # until the stage has read it
        else:
            await server.serve()
    except EOFError:
        pass  # the stage wants an end


class Server:
    """SGLang, and the requests that it is at work on.

    Args:
        settings: The stage's.
        channel: To the stage, which is told that SGLang is ready.

    Raises:
        ConfigurationError: An argument or the environment is wrong.
        Unavailable: SGLang does not start for another reason.
    """

    def __init__(self, settings: DecodeSettings, channel: Channel) -> None:
        begun = time.monotonic()
        self._channel = channel
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: set[str] = set()
        """Ids of the generations that the stage still wants."""
        engine_type, on_cpu = _import()
        imported = time.monotonic()
        arguments, context = build_arguments(settings, families.load(settings.model), on_cpu=on_cpu)
        try:
            engine: Engine = engine_type(server_args=arguments)
        except Exception as error:
            raise Unavailable(f"SGLang did not start: {error}; its own log says why") from error
        self._manager = engine.tokenizer_manager
        _handle_failures(self._manager)
        context = _served_context(context, self._manager.max_req_input_len)
        dtype: Any = str(self._manager.model_config.dtype).removeprefix("torch.")
        channel.post(Ready(context, dtype, tuple(engine.get_all_child_pids())))
        logger.info(
            "started in %.1f s: import %.1f, engine %.1f",
            time.monotonic() - begun,
            imported - begun,
            time.monotonic() - imported,
        )

    async def serve(self) -> None:
        """Do what the stage asks for.

        Raises:
            EOFError: The stage has closed its end.
        """
        while True:
            message, octets = await self._channel.receive()
            if isinstance(message, Generate):
                self._live.add(message.id)
                task = asyncio.create_task(self._generate(message, octets))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif isinstance(message, Abort):
                self._live.discard(message.id)
                self._manager.abort_request(message.id)

    async def _generate(self, request: Generate, octets: memoryview) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        try:
            asked = GenerateReqInput(
                rid=request.id,
                input_ids=request.token_ids,
                sampling_params=request.sampling,
                stream=True,
                return_logprob=request.top_logprobs is not None,
                top_logprobs_num=request.top_logprobs or 0,
                priority=request.priority,
                **request.transfer,
                **_media(request, octets),
            )
            del octets
            async for output in self._manager.generate_request(asked):
                _raise_if_aborted(output)
                self._channel.post(_output(request.id, output))
        except Exception as error:
            self._fail(request.id, error)
        finally:
            self._live.discard(request.id)

    def _fail(self, request_id: str, error: Exception) -> None:
        if request_id not in self._live:
            return  # it was aborted
        failure: TriptychError = InternalError("the engine failed on this request")
        if isinstance(error, ValueError):  # what SGLang raises about a request
            failure = InvalidRequest(str(error))
        else:
            logger.error("SGLang failed on %s", request_id, exc_info=error)
        self._channel.post(Failed(str(failure), request_id))


def _import() -> tuple[type[Engine], bool]:
    """SGLang's engine, and whether it will run on the CPU."""
    environment.prepare(_ENVIRONMENT)
    torchvision_ops.define_missing()
    import torch

    on_cpu = not torch.cuda.is_available()
    # It warns of what it will do without on this machine.
    warnings.simplefilter("ignore", UserWarning)
    try:
        if on_cpu:
            from triptych.engines import sglang_cpu

            sglang_cpu.prepare()
            return sglang_cpu.engine_type(), on_cpu
        from sglang.srt.entrypoints.engine import Engine

        return Engine, on_cpu
    except ImportError as error:
        raise ConfigurationError(
            f"SGLang cannot be imported from {sys.prefix}: {error}; "
            "scripts/setup --engine sglang makes its environment"
        ) from error


def _served_context(context: int, longest_input: int) -> int:
    """The context, or what of it the memory for keys and values has room for.

    Args:
        context: Tokens of prompt and answer together.
        longest_input: SGLang's limit of a prompt, which lies six below that of a request.
    """
    held = longest_input + 6 - MARGIN
    if held < context:
        logger.warning("the context is %d tokens, not %d: there is no more memory", held, context)
    return min(context, held)


def _handle_failures(manager: Any) -> None:
    """End this process, with a status that says why, when one of SGLang's has failed.

    SGLang's processes say so by SIGQUIT, and its watchdog does if one of them cannot. SGLang's own
    handler would kill this process, and nobody would know the reason.
    """
    from sglang.srt.managers.tokenizer_manager import SignalHandler

    class Handler(SignalHandler):  # type: ignore[misc]  # it has no types
        def running_phase_sigquit_handler(self, *_: Any) -> None:
            logger.error("a process of SGLang's has failed; this one ends")
            _end(CHILD_FAILED)

    manager.signal_handler_class = Handler
    manager.auto_create_handle_loop()


def _media(request: Generate, octets: memoryview) -> dict[str, list[dict[str, Any]]]:
    """The embeddings as SGLang takes them: one dictionary a modality.

    ``processor_output`` is the form in which it does not guess what it is given.
    """
    import torch

    found = {}
    offset = 0
    for media in request.media:
        embeddings, offset = tensor(media.spec, octets, offset)
        found[f"{media.modality.lower()}_data"] = [
            {
                "format": "processor_output",
                "modality": media.modality,
                "precomputed_embeddings": embeddings,
                "hash": media.hash,
                **{name: torch.tensor(value) for name, value in media.fields.items()},
            }
        ]
    return found


def _raise_if_aborted(output: dict[str, Any]) -> None:
    """Raise what has ended a request early; `ValueError` if the request itself has."""
    finish = output["meta_info"]["finish_reason"] or {}
    if finish.get("type") == "abort":
        kind = ValueError if finish.get("status_code") == HTTPStatus.BAD_REQUEST else RuntimeError
        raise kind(finish.get("message") or "it was aborted")


def _output(request_id: str, output: dict[str, Any]) -> Output:
    told = output["meta_info"]
    finish = told["finish_reason"] or {}
    return Output(
        request_id,
        output.get("text") or "",
        list(output.get("output_ids") or ()),
        told.get("cached_tokens") or 0,
        finish.get("type", ""),
        tuple(map(_scored, told.get("output_token_logprobs") or ())),
        tuple(tuple(map(_scored, place or ())) for place in told.get("output_top_logprobs") or ()),
    )


def _scored(entry: Any) -> Scored:
    logprob, token, _ = entry
    return token, logprob


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends: a stub that is killed cannot stop it.

    SGLang does the same for the processes below.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _end(status: int) -> None:
    """End at once, with all that SGLang has started."""
    from psutil import Process

    for child in Process().children(recursive=True):
        child.kill()
    os._exit(status)


if __name__ == "__main__":
    main()
