"""The sum of `triptych.handover.seal` as one kernel, in OpenAI's Triton, which PyTorch brings.

On an H200 it takes 100 MiB from 0.8 ms to 0.12, and 9.8 MB from 0.25 to the same: that is the
launch and the wait. Imported only where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triptych.handover.seal import MIX

_MIX = tl.constexpr(MIX)
_BLOCK = 4096
"""Words of one program of the kernel."""


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _add(words, total, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Triton reads annotations, and knows none of Python's."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    word = tl.load(words + at, mask=at < count, other=0)
    tl.atomic_add(total, tl.sum(word * ((2 * at + 1) * _MIX)))


def sums(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ (2i+1)·M·word[i], modulo 2⁶⁴, of each of some int64 tensors on one GPU.

    Returns:
        int64, shape (pieces,), there.
    """
    found = torch.zeros(len(pieces), dtype=torch.int64, device=pieces[0].device)
    with torch.cuda.device(found.device):
        for index, piece in enumerate(pieces):
            grid = (triton.cdiv(piece.numel(), _BLOCK),)
            _add[grid](piece, found[index:], piece.numel(), block=_BLOCK)
    return found
