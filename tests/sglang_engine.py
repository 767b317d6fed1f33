"""SGLang from its own environment, for tests in the one of vLLM."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from triptych.engines.sglang import SglangEngine
from triptych.families import Family
from triptych.settings import DecodeSettings

PYTHON = Path(__file__).parents[1] / ".venvs" / "sglang" / "bin" / "python"
"""Made by ``scripts/setup --engine sglang``."""


class Sglang(SglangEngine):
    """Runs SGLang by another interpreter than the tests'."""

    python = PYTHON


@asynccontextmanager
async def sglang(family: Family, **settings: Any) -> AsyncIterator[SglangEngine]:
    """A started SGLang."""
    engine = Sglang(DecodeSettings(model=str(family.checkpoint.path), **settings), family)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


def run(program: str, asked: Any = None, **environ: str) -> Any:
    """What a program in SGLang's environment prints as JSON, given ``asked`` likewise."""
    done = subprocess.run(
        [PYTHON, "-P", "-c", program],
        input=json.dumps(asked),
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
