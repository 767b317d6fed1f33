"""Fixtures that every test may use: the checkpoint, model repositories, and real servers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Before torch is imported anywhere, here or in a server: tests are many small things, and
# threads that wait for each other by spinning would make them slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts a command in the background has it ignore Ctrl-C, and so all its children;
# the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from faults.repository import with_echo
from triptych.server import Server, ServerOptions

ROOT = Path(__file__).parents[1]
LOOPBACK_FREE = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}

ServerFactory = Callable[..., Server]


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The clone."""
    return ROOT


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The small trained Qwen2.5-VL that comes with the repository."""
    path = ROOT / "models" / "tiny-qwen2.5-vl"
    assert (path / "config.json").is_file(), f"{path} is part of the repository and not there"
    return path


@pytest.fixture(scope="session")
def echo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model repository with the engine ``echo``."""
    repository = with_echo(tmp_path_factory.mktemp("models") / "model_repository")
    # Environments of engines lie beside the repository.
    (repository.parent / ".venvs").symlink_to(ROOT / ".venvs")
    # A model's own folder is on the path of its stub and of no other.
    stand_in = ROOT / "tests" / "fakes" / "tensorrt_llm"
    shutil.copytree(stand_in, repository / "decode_trtllm" / "1" / stand_in.name)
    return repository


@pytest.fixture(scope="session")
def start_server(
    checkpoint: Path, echo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerFactory]:
    """Start a ready server of one's own: ``start_server("echo", max_model_len=64)``.

    Keywords are settings of the stages; ``options`` are further `ServerOptions`, and ``environ``
    is put into its environment. A test stops its server when done; what it leaves is stopped at
    the end.
    """
    with ExitStack() as stack:

        def start(
            engine: str,
            *,
            options: dict[str, Any] | None = None,
            environ: dict[str, str] | None = None,
            **settings: Any,
        ) -> Server:
            log = tmp_path_factory.mktemp(f"server-{engine}") / "tritonserver.log"
            server = Server(
                ServerOptions(
                    **{
                        "model": str(checkpoint),
                        "engine": engine,
                        "model_repository": str(echo_repository),
                        "settings": settings,
                        "log_file": str(log),
                        **LOOPBACK_FREE,
                        **(options or {}),
                    }
                )
            )
            stack.callback(server.stop)
            with pytest.MonkeyPatch.context() as patch:
                # `import vllm` chooses for this process; a server is to choose for itself.
                patch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
                for name, value in (environ or {}).items():
                    patch.setenv(name, value)
                server.start()
            server.wait_ready()
            return server

        yield start


@pytest.fixture(scope="session")
def echo_server(start_server: ServerFactory) -> Server:
    """A real tritonserver whose engine says back what it was given; starts in seconds."""
    return start_server("echo")


@pytest.fixture(scope="session")
def vllm_server(start_server: ServerFactory) -> Server:
    """A real tritonserver with vLLM."""
    options = {"allow_shared_memory": True, "allow_model_control": True}
    return start_server("vllm", options=options)


@pytest.fixture(scope="session")
def sglang_server(start_server: ServerFactory) -> Server:
    """A real tritonserver with SGLang."""
    return start_server("sglang")


@pytest.fixture(scope="session")
def trtllm_server(start_server: ServerFactory, shared_files: Path) -> Server:
    """A real tritonserver with the stand-in of TensorRT-LLM, which really computes."""
    return start_server(
        "trtllm",
        engine_dtype="float32",
        allowed_local_media_path=str(shared_files),
        max_file_size_mb=1,
    )


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory whose files a request to `trtllm_server` may name."""
    return tmp_path_factory.mktemp("shared")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the end of a server's log with the failure of a test that used it."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"log of {name}", value.log.tail(40)))
    return report
