"""The servers that are compared, each a tree of processes of its own, and how each is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from triptych_client import Overloaded
from triptych_client.conversation import Conversation, Server
from triptych_client.grpc_transport import AsyncGrpcTransport
from triptych_client.requests import Call
from triptych_client.transport import parse_address

ROOT = Path(__file__).parents[2]
READY_S = 300.0
ANSWER_S = 600.0
STOP_S = 60.0
VLLM_ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""As `triptych.engines.vllm_environment` has it for ours."""

Environ = Mapping[str, str | None]

Piece = tuple[str, int]
"""Text, and the answer's tokens where it tells them, else 0."""


class StreamError(Exception):
    """The server answered with an error, before the stream or in it."""

    def __init__(self, what: str, *, refused: bool = False) -> None:
        super().__init__(what)
        self.refused = refused
        """Because it has enough to do."""


class Processes:
    """A server that was started, with whatever it starts.

    Args:
        command: Its command line.
        environ: What its environment has besides ours; None: what it has not.
        log: Where its output goes.
    """

    def __init__(self, command: Sequence[str], environ: Environ, log: Path) -> None:
        self._log = log
        self._started = time.monotonic()
        self.ready_s = 0.0
        """From the start until it was ready."""
        with log.open("w") as output:
            self._root = subprocess.Popen(
                command,
                env={k: v for k, v in {**os.environ, **environ}.items() if v is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait(self, url: str, saying: str = "") -> None:
        """Until ``url`` answers with success, and with ``saying`` in its answer.

        Raises:
            RuntimeError: The server ended, or did not get ready in time.
        """
        while time.monotonic() - self._started < READY_S:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                if saying.encode() in answer.read():
                    self.ready_s = time.monotonic() - self._started
                    return
            if self._root.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"{url} is not ready:\n{self._log.read_text()[-3000:]}")

    def cpu_seconds(self) -> float:
        """User and system time of all of them, so far."""
        return sum(sum(times[:2]) for times in self._each(lambda one: one.cpu_times()))

    def memory(self) -> int:
        """Bytes in memory, shared pages counted once: the sum of PSS."""
        return sum(self._each(lambda one: one.memory_full_info().pss))

    def stop(self) -> None:
        """End it as its user would, then by force."""
        family = self._family()
        if self._root.poll() is None:
            self._root.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._root.wait(STOP_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._root.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._root.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _each(self, ask: Any) -> list[Any]:
        found = []
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(ask(process))
        return found


class Peer(ABC):
    """A way to a server.

    Args:
        name: In the tables.
        processes: The server's; peers may share them.
    """

    def __init__(self, name: str, processes: Processes) -> None:
        self.name = name
        self.processes = processes

    @abstractmethod
    def ask(self, body: bytes) -> AsyncIterator[Piece]:
        """The pieces of one answer.

        Raises:
            StreamError: The server says that something is wrong.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of the connections."""


class OpenAIPeer(Peer):
    """``POST /v1/chat/completions`` by aiohttp, which sets TCP_NODELAY."""

    def __init__(self, name: str, processes: Processes, url: str) -> None:
        super().__init__(name, processes)
        self._url = f"{url}/v1/chat/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(ANSWER_S),
            read_bufsize=1 << 20,
        )

    async def ask(self, body: bytes) -> AsyncIterator[Piece]:
        """As `Peer` says."""
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                what = f"{response.status}: {(await response.text())[:300]}"
                raise StreamError(what, refused=response.status == 429)
            _acknowledge_at_once(response)
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise StreamError(str(chunk["error"]))
                yield _piece(chunk)

    async def close(self) -> None:
        """As `Peer` says."""
        await self._session.close()


class TritonPeer(Peer):
    """Triton's gRPC, by the client library."""

    def __init__(self, name: str, processes: Processes, address: str, model: str) -> None:
        super().__init__(name, processes)
        self._model = model
        self._server = Server(AsyncGrpcTransport(parse_address(address)))

    async def ask(self, body: bytes) -> AsyncIterator[Piece]:
        """As `Peer` says."""
        call = Call(self._model, uuid.uuid4().hex, body, ANSWER_S)
        conversation = Conversation(self._server, call)
        try:
            while (chunk := await conversation.next()) is not None:
                yield chunk.text, chunk.usage.completion_tokens if chunk.usage else 0
        except Exception as error:
            raise StreamError(str(error), refused=isinstance(error, Overloaded)) from error
        finally:
            await conversation.close()

    async def close(self) -> None:
        """As `Peer` says."""
        await self._server.close()


def start_triptych(
    model: Path,
    folder: Path,
    arguments: Sequence[str] = (),
    environ: Environ | None = None,
) -> dict[str, Any]:
    """``triptych serve --openai``.

    Args:
        model: Its checkpoint.
        folder: Where its log goes.
        arguments: More flags.
        environ: See `Processes`.

    Returns:
        The `Processes`, the addresses of Triton's gRPC and HTTP, and the gateway's URL.
    """
    http, grpc, metrics, openai = free_ports(4)
    command = [
        *(str(Path(sys.executable).with_name("triptych")), "serve", "--openai", f"--model={model}"),
        *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
        *(f"--openai-port={openai}", f"--served-model-name={model}", *arguments),
    ]
    processes = Processes(command, environ or {}, folder / "triptych.log")
    url = f"http://127.0.0.1:{openai}"
    return {
        "processes": processes,
        "grpc": f"127.0.0.1:{grpc}",
        "http": f"127.0.0.1:{http}",
        "url": url,
        "ready": f"{url}/health/ready",
    }


def start_vllm(
    model: Path, folder: Path, arguments: Sequence[str], environ: Environ | None = None
) -> dict[str, Any]:
    """The OpenAI server of vLLM; see `start_triptych`."""
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host=127.0.0.1", f"--port={port}", "--disable-uvicorn-access-log", *arguments),
    ]
    url = f"http://127.0.0.1:{port}"
    return {
        "processes": Processes(
            command, {**VLLM_ENVIRON, **(environ or {})}, folder / f"vllm-{port}.log"
        ),
        "url": url,
        "ready": f"{url}/health",
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _piece(chunk: dict[str, Any]) -> Piece:
    text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    usage = chunk.get("usage")
    return text, usage["completion_tokens"] if usage else 0


def _acknowledge_at_once(response: aiohttp.ClientResponse) -> None:
    """A server that waits for an acknowledgement before its next packet gets it."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        found = connection.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


async def warm(peer: Peer, bodies: Sequence[bytes]) -> None:
    """Ask once, one after the other, and forget the answers."""
    for body in bodies:
        async for _ in peer.ask(body):
            await asyncio.sleep(0)
