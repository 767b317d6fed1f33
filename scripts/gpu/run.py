"""On a GPU machine without a network: put the environment together, test, measure, write JSON.

::

    python3 scripts/gpu/run.py take .pieces/00      # once for each folder, in any order
    python3 scripts/gpu/run.py install              # a virtual environment over the machine's own
    python3 scripts/gpu/run.py check test handover encoder serve --out "$OUT"

Each step writes what it saw to ``STEP.json``. It ends at the first step that fails, with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORE = Path(os.environ.get("TRIPTYCH_GPU_HOME", "/tmp/triptych-gpu"))
PIECES, WHEELS, VENV = STORE / "pieces", STORE / "wheels", STORE / "venv"
PYTHON = VENV / "bin" / "python"

OTHERS_NUMPY = ("sklearn", "scikit_learn", "scipy", "pandas", "numpy")
"""Built for NumPy 2, with which Triton's stub breaks; transformers does without them."""

PROBE = """\
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("probe was loaded")
"""
"""It ends the server at once, which then says why."""
PROBE_CONFIG = """\
name: "probe" backend: "python" max_batch_size: 0
output [ { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""

Seen = dict[str, Any]


def take(folder: Path) -> Seen:
    """Keep the pieces of a folder, and join the wheels that are whole with them."""
    PIECES.mkdir(parents=True, exist_ok=True)
    WHEELS.mkdir(exist_ok=True)
    for file in folder.iterdir():
        shutil.copy2(file, PIECES / file.name)
    missing = []
    for name, wheel in json.loads((PIECES / "list.json").read_text()).items():
        parts = [PIECES / f"{name}.{number:03}" for number in range(wheel["pieces"])]
        if not all(part.exists() for part in parts):
            missing.append(name)
        elif not (WHEELS / name).exists():
            data = b"".join(part.read_bytes() for part in parts)
            if hashlib.sha256(data).hexdigest() != wheel["sha256"]:
                raise RuntimeError(f"{name} is not what was packed")
            (WHEELS / name).write_bytes(data)
    return {"whole": len(list(WHEELS.iterdir())), "missing": missing}


def install() -> Seen:
    """A virtual environment that sees the machine's packages, with ours in front of them.

    Triton's stub knows environments but no PYTHONPATH.
    """
    venv.create(VENV, system_site_packages=True, with_pip=True, clear=True)
    _show_machine()
    own = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--quiet"]
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    pip = [PYTHON, "-m", "pip", "install", "--force-reinstall", *own]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda group: _call([*pip, *group]), _groups(wheels)))
    _share_cuda()
    _call([PYTHON, "-m", "pip", "install", *own, "-e", str(ROOT)])
    return {"wheels": [Path(wheel).name for wheel in wheels]}


def _groups(wheels: list[str], count: int = 6) -> list[list[str]]:
    """The wheels by size, in as many groups as are unpacked at a time; the large ones are alone."""
    by_size = sorted(wheels, key=lambda wheel: -Path(wheel).stat().st_size)
    return [*([wheel] for wheel in by_size[: count - 1]), by_size[count - 1 :]]


def _show_machine() -> None:
    """Let the environment see what this Python has, which may be a virtual environment itself."""
    seen = STORE / "machine"
    shutil.rmtree(seen, ignore_errors=True)
    seen.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OTHERS_NUMPY):
            (seen / entry.name).symlink_to(entry)
    site = next(VENV.glob("lib/python*/site-packages"))
    (site / "machine.pth").write_text(f"{seen}\n")


def _share_cuda() -> None:
    """Put the machine's CUDA libraries beside a PyTorch of ours, which looks for them there."""
    for ours in VENV.glob("lib/python*/site-packages/nvidia"):
        for theirs in (STORE / "machine" / "nvidia").iterdir():
            if not (ours / theirs.name).exists():
                (ours / theirs.name).symlink_to(theirs)


def check() -> Seen:
    """Python, libpython, the GPU, and whether the tritonserver starts."""
    libpython = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if ".so" not in libpython.name or not libpython.exists():
        raise RuntimeError(f"Triton's stub needs a shared libpython; {libpython} is none")
    versions = _json(
        "import torch, numpy, json; print(json.dumps({'torch': torch.__version__, 'numpy': "
        "numpy.__version__, 'cuda': torch.version.cuda, 'gpu': torch.cuda.get_device_name() if "
        "torch.cuda.is_available() else None}))"
    )
    launcher = "from triptych.server import installation as i; print(i.find().binary)"
    binary = _call([PYTHON, "-c", launcher]).strip()
    _load_a_model()
    return {"python": sys.version, "libpython": str(libpython), "tritonserver": binary, **versions}


def _load_a_model() -> None:
    """Whether the tritonserver starts, and a stub of this Python in it."""
    model = STORE / "probe" / "probe"
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / "model.py").write_text(PROBE)
    (model / "config.pbtxt").write_text(PROBE_CONFIG)
    command = [VENV / "bin" / "tritonserver", f"--model-repository={model.parent}"]
    ports = ["--allow-http=true", "--http-port=0", "--allow-grpc=false", "--allow-metrics=false"]
    _call([*command, *ports, "--disable-auto-complete-config"], ended_by="probe was loaded")


def test() -> Seen:
    """The tests marked ``gpu``; none may be skipped where there is a GPU."""
    report = STORE / "tests.xml"
    command = [PYTHON, "-m", "pytest", "-m", "gpu", "-rs", "tests/gpu", f"--junitxml={report}"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, capture_output=True)
    print(done.stdout[-6000:])
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stderr[-2000:]}")
    closing = done.stdout.strip().splitlines()[-1]
    if Path("/dev/nvidiactl").exists() and "skipped" in closing:
        raise RuntimeError(f"there is a GPU, and tests were skipped: {closing}")
    return {"closing": closing}


def encoder() -> Seen:
    """Images a second of the encoder, at real sizes; see ``encoder.py``."""
    return _json_of([PYTHON, ROOT / "scripts" / "gpu" / "encoder.py"])


def handover() -> Seen:
    """Embeddings from one process's device memory to another's; see ``handover.py``."""
    return _json_of([PYTHON, ROOT / "scripts" / "gpu" / "handover.py"])


def serve() -> Seen:
    """Time to first token beside vLLM's own server; see ``serve.py``."""
    return _json_of([PYTHON, ROOT / "scripts" / "gpu" / "serve.py"])


STEPS: dict[str, Callable[[], Seen]] = {
    "install": install,
    "check": check,
    "test": test,
    "encoder": encoder,
    "handover": handover,
    "serve": serve,
}


def main() -> int:
    """Run the steps in the order in which they are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="+", help=f"take FOLDER, or of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=STORE / "out")
    arguments = parser.parse_args()
    if arguments.steps[0] == "take":
        print(json.dumps(take(Path(arguments.steps[1]))))
        return 0
    if unknown := set(arguments.steps) - STEPS.keys():
        parser.error(f"no step {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for step in arguments.steps:
        begun = time.monotonic()
        try:
            seen = STEPS[step]()
        except Exception as error:
            seen = {"error": f"{type(error).__name__}: {error}"}
        seen["seconds"] = round(time.monotonic() - begun, 1)
        (arguments.out / f"{step}.json").write_text(json.dumps(seen, indent=1))
        print(f"{step}: {json.dumps(seen)}", flush=True)
        if "error" in seen:
            return 1
    return 0


def _call(command: list[Any], ended_by: str = "") -> str:
    """What a program prints; with ``ended_by`` it has to fail with these words."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    said = done.stdout + done.stderr
    if (done.returncode and not ended_by) or ended_by not in said:
        raise RuntimeError(f"{command[:3]} ended with {done.returncode}: {said[-2000:]}")
    return done.stdout


def _json(program: str) -> Seen:
    return _json_of([PYTHON, "-c", program])


def _json_of(command: list[Any]) -> Seen:
    found: Seen = json.loads(_call(command).strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
