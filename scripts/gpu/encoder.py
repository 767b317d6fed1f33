"""Images a second through the encoder with the towers of real models, weights drawn at random.

Prints one JSON object: for each model and picture size the milliseconds of one picture by the
tower alone, by the encoder one at a time, and by the encoder in batches of different pictures. The
tower alone, launched kernel by kernel, is the bound unless the encoder replays it as a CUDA graph:
``encoder ÷ tower`` is what everything around it leaves of its speed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import MODELS, write
from triptych import families
from triptych.contract import Item
from triptych.encode import Encoder
from triptych.encode.replay import AFTER
from triptych.settings import EncoderSettings

SIZES = {"360p": (360, 640), "1080p": (1080, 1920)}
BATCH = 16
WARM_UP = AFTER + 1


def main() -> None:
    """Measure each model; ``--small`` draws towers of two layers, to see that it runs."""
    small = "--small" in sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"device": str(device), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            checkpoint = write(name, Path(folder) / name, small=small)
            found["models"][name] = _measure(checkpoint, device, rounds=3 if small else 20)
    print(json.dumps(found))


def _measure(checkpoint: Path, device: torch.device, rounds: int) -> dict[str, Any]:
    family = families.load(checkpoint)
    settings = EncoderSettings(model=str(checkpoint), encoder_cache_mb=0)
    encoder = Encoder(family, settings, device)
    tower = family.load_tower(device, encoder.dtype)
    random = np.random.default_rng(0)
    found = {}
    for size, (height, width) in SIZES.items():
        plan = family.plan_image(height, width)
        item = Item("image", "", "uint8", plan.shape, 0, plan.tokens, plan.grid_thw)
        # Different ones: equal ones are encoded once.
        pictures = [
            torch.from_numpy(random.integers(0, 256, plan.shape, np.uint8))
            for _ in range(BATCH if device.type == "cuda" else 2)
        ]
        requests = [([item], picture.flatten()) for picture in pictures]
        on_device = pictures[0].to(device)

        def launched(on_device: torch.Tensor = on_device, item: Item = item) -> None:
            with torch.inference_mode():
                tower.encode([item], [on_device])

        alone = _seconds(launched, device, rounds)
        single = _seconds(lambda r=requests[:1]: encoder.encode(r), device, rounds)
        batched = _seconds(lambda r=requests: encoder.encode(r), device, rounds) / len(requests)
        found[size] = {
            "tokens": plan.tokens,
            "tower_ms": alone * 1e3,
            "single_ms": single * 1e3,
            "batched_ms": batched * 1e3,
            "encoder ÷ tower": alone / single,
            "batched ÷ single": single / batched,
        }
    return found


def _seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    spent = []
    for number in range(rounds + WARM_UP):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            spent.append(time.perf_counter() - start)
    return median(spent)


if __name__ == "__main__":
    main()
