"""What SGLang does otherwise here: it is installed as a plugin of SGLang.

pyproject.toml names `register` in the entry-point group ``sglang.srt.plugins``, which SGLang asks
in each of its processes. Those that others have started are left alone.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from triptych.engines.sglang_scratch import LOADS

OURS = "_TRIPTYCH_SGLANG"
"""Environment variable that is set in the processes of ours."""
_PENALTY = "sglang.srt.sampling.penaltylib.repetition_penalty.BatchedRepetitionPenalizer._prepare"
_LOADS_PATH = "sglang.srt.managers.load_snapshot.shm_path_for"


def register() -> None:
    """Have SGLang do two things otherwise.

    - ``repetition_penalty`` counts the prompt's tokens, as it does everywhere else. SGLang takes
      the answer's alone. Checkpoints' generation_config.json sets this penalty for the other
      meaning, which is that of Hugging Face and vLLM.
    - What its processes share of their load is a temporary file, and not one in ``/dev/shm`` that
      nobody ever removes.
    """
    if OURS not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_PENALTY, _count_prompts, HookType.AFTER)
    HookRegistry.register(_LOADS_PATH, _loads_path, HookType.REPLACE)


def _count_prompts(_: None, penalizer: Any) -> None:
    """Enter the penalty for each prompt's tokens, after SGLang has prepared a batch."""
    import torch

    orchestrator = penalizer.orchestrator
    for row, request in enumerate(orchestrator.reqs()):
        # A penalty belongs to a token, however often it occurs. A medium's places hold numbers
        # beyond the vocabulary.
        ids = {token for token in request.origin_input_ids if token < orchestrator.vocab_size}
        places = torch.tensor(sorted(ids), device=orchestrator.device)
        penalizer.cumulated_repetition_penalties[row, places] = penalizer.repetition_penalties[row]


def _loads_path(_: str) -> str:
    """In the directory of this engine (`triptych.engines.sglang_scratch`)."""
    return os.path.join(tempfile.gettempdir(), LOADS)
