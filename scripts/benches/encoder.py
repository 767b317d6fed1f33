"""What is spared by never encoding twice, and what others feel of what is not spared.

One server, the repository's own ensemble up to TICKET; texts go to an engine that says back what it
was given. Checkpoint: the tiny one, with the picture sizes of the hub's Qwen2.5-VL: a photograph of
1024² becomes 1296 embeddings in a tower of 4 layers. Every picture is another one unless it is said
to be the same; pictures are sent as ``data:`` URIs.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benches import Row
from benches._embed import Caller, chat, metrics, ready, serve
from triptych import families
from triptych.contract import Item
from triptych.encode import Encoder
from triptych.server import Server
from triptych.settings import EncoderSettings

CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny-qwen2.5-vl"
HUB_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
AT_ONCE = 32
BURST_CALLERS = 4
BEFORE = ("PROMPT", "TICKET")
"""Embeddings are made as they are for the language model, and not sent to the caller."""


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    pictures = Pictures()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _with_hub_sizes(Path(folder) / "checkpoint")
        with _server(checkpoint, Path(folder) / "two", extra=("chat_echo",)) as (server, caller):
            rows = [
                _repeat(caller, pictures, rounds=7 if quick else 25),
                *_at_once(server, caller, pictures, rounds=3 if quick else 7),
                _texts(caller, pictures, probes=150 if quick else 500, rounds=3 if quick else 5),
            ]
        rows.append(_batched(checkpoint, rounds=5 if quick else 15))
        rows.append(_instances(checkpoint, Path(folder), pictures, rounds=3 if quick else 7))
    return rows


class Pictures:
    """Requests about photographs that differ."""

    def __init__(self) -> None:
        self._plain = {size: _photograph(size) for size in (512, 1024, 4096)}
        self._shifts = itertools.count(1)

    def new(self, size: int = 1024) -> bytes:
        """A request about a picture that was never sent."""
        rolled = np.roll(self._plain[size], next(self._shifts), axis=1)
        buffer = io.BytesIO()
        Image.fromarray(rolled).save(buffer, "JPEG")
        return chat("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())


def _photograph(size: int) -> npt.NDArray[np.uint8]:
    """Noise of every coarseness, the coarse stronger, as in a photograph: 1.5 bits a pixel."""
    random = np.random.default_rng(size)
    whole = np.zeros((size, size, 3))
    for octave in range(2, size.bit_length()):
        noise = random.integers(0, 256, (2**octave, 2**octave, 3), np.uint8)
        scaled = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        whole += (np.asarray(scaled) - 127.5) * 0.62**octave
    return np.clip(127.5 + whole * (50 / whole.std()), 0, 255).astype(np.uint8)


def _repeat(caller: Caller, pictures: Pictures, rounds: int) -> Row:
    """The fastest way there is for a picture that was seen, against the way of one that was not."""
    cold, again = [], []
    for number in range(rounds + 1):
        body = pictures.new()
        spent = _seconds(lambda body=body: caller.ask("embed", body, BEFORE))
        repeats = [_seconds(lambda body=body: caller.ask("embed", body, BEFORE)) for _ in range(5)]
        if number:  # the first warms up
            cold.append(spent)
            again.append(median(repeats))
    text = [_seconds(lambda: caller.ask("embed", chat(), BEFORE)) for _ in range(20)]
    _tell(f"cold {_ms(cold)}, repeated {_ms(again)}, no picture at all {_ms(text)}")
    ratios = [one / other for one, other in zip(again, cold, strict=True)]
    return Row.of("1024² JPEG before the language model: repeat ÷ cold", ratios, 1 / 50)


def _at_once(server: Server, caller: Caller, pictures: Pictures, rounds: int) -> list[Row]:
    """De-duplication cannot be turned off in a batch, so without it means 32 that differ."""
    ratios, encodes = [], []
    for _ in range(rounds):
        different = [pictures.new(512) for _ in range(AT_ONCE)]
        same = [pictures.new(512)] * AT_ONCE
        alone = _all_at_once(caller, different)
        before = metrics(server)["batch_items_sum"]
        together = _all_at_once(caller, same)
        encodes.append(metrics(server)["batch_items_sum"] - before)
        ratios.append(alone / together)
        _tell(f"32 different {alone:.2f} s, 32 identical {together:.3f} s, {encodes[-1]:g} encoded")
    return [
        Row.of("32 identical 512² at once ÷ 32 different: throughput", ratios, 8.0, "higher"),
        Row.of("32 identical at once: encoded", encodes, 1.0),
    ]


def _texts(caller: Caller, pictures: Pictures, probes: int, rounds: int) -> Row:
    """Time to the first token of a text, while 4 callers send new pictures without a pause."""
    text = chat(text="Say something.", stream=True, max_tokens=4)
    _first_tokens(caller, text, 20)  # to warm up
    ratios = []
    for _ in range(rounds):
        idle = _first_tokens(caller, text, probes)
        bodies = [pictures.new() for _ in range(60)]
        with _burst(caller, bodies) as sent:
            busy = _first_tokens(caller, text, probes)
        _tell(
            f"texts: idle p50 {_ms(idle)}, p99 {_p99(idle) * 1e3:.1f} ms; during {next(sent)} "
            f"pictures p50 {_ms(busy)}, p99 {_p99(busy) * 1e3:.1f} ms"
        )
        ratios.append(_p99(busy) / _p99(idle))
    return Row.of("text, p99 of the first token: image burst ÷ idle", ratios, 1.1)


def _batched(checkpoint: Path, rounds: int) -> Row:
    """Images a second in the tower alone, 16 of 224² in one pass against one by one."""
    family = families.load(checkpoint)
    settings = EncoderSettings(model=str(checkpoint), encoder_cache_mb=0)
    encoder = Encoder(family, settings, torch.device("cpu"))
    plan = family.plan_image(224, 224)
    random = np.random.default_rng(0)
    requests = []
    for number in range(16):
        pixels = torch.from_numpy(random.integers(0, 256, plan.shape, np.uint8)).flatten()
        item = Item("image", str(number), "uint8", plan.shape, 0, plan.tokens, plan.grid_thw)
        requests.append(([item], pixels))
    ratios = []
    for number in range(rounds + 1):
        single = _seconds(lambda: [encoder.encode([request]) for request in requests])
        batched = _seconds(lambda: encoder.encode(requests))
        if number:
            ratios.append(single / batched)
    return Row.of("16 × 224² in the tower: batched ÷ single images a second", ratios, 1.0, "higher")


def _instances(checkpoint: Path, folder: Path, pictures: Pictures, rounds: int) -> Row:
    """Pictures of 4096² a second through preprocess alone, one decoding process an instance."""
    settings = {"media_workers": 1, "encoder_model": "", "media_cache_mb": 0}
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with (
        _server(checkpoint, folder / "a", {"preprocess": 1}, **settings) as (_, one),
        _server(checkpoint, folder / "b", {"preprocess": 2}, **settings) as (_, two),
    ):
        for number in range(rounds + 1):
            for count, caller in ((1, one), (2, two)):
                bodies = [pictures.new(4096) for _ in range(12)]
                spent = _all_at_once(caller, bodies, "preprocess", ("ITEMS",), callers=6)
                if number:
                    speeds[count].append(len(bodies) / spent)
    _tell(f"preprocess: one {median(speeds[1]):.1f}/s, two {median(speeds[2]):.1f}/s")
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return Row.of("4096² JPEGs a second: two preprocess instances ÷ one", ratios, 1.9, "higher")


@contextmanager
def _server(
    checkpoint: Path,
    folder: Path,
    instances: dict[str, int] | None = None,
    extra: tuple[str, ...] = (),
    **settings: object,
) -> Iterator[tuple[Server, Caller]]:
    folder.mkdir()
    server = serve(checkpoint, folder, instances=instances, extra=extra, **settings)
    try:
        ready(server.start())
        with closing(Caller(server)) as caller:
            yield server, caller
    finally:
        server.stop()


def _with_hub_sizes(folder: Path) -> Path:
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    processor = folder / "preprocessor_config.json"
    config = json.loads(processor.read_text())
    edges = {"shortest_edge": HUB_PIXELS["min_pixels"], "longest_edge": HUB_PIXELS["max_pixels"]}
    processor.unlink()
    processor.write_text(json.dumps({**config, **HUB_PIXELS, "size": edges}))
    return folder


def _all_at_once(
    caller: Caller,
    bodies: list[bytes],
    model: str = "embed",
    outputs: tuple[str, ...] = BEFORE,
    callers: int = AT_ONCE,
) -> float:
    """Seconds until all are answered."""
    with ThreadPoolExecutor(callers) as threads:
        list(threads.map(lambda _: None, range(callers)))  # so that the threads are there
        return _seconds(
            lambda: list(threads.map(lambda body: caller.ask(model, body, outputs), bodies))
        )


def _first_tokens(caller: Caller, text: bytes, probes: int) -> list[float]:
    """Seconds to the first response of each, 5 ms apart."""
    found = []
    for _ in range(probes):
        found.append(caller.first("chat_echo", text))
        time.sleep(0.005)
    return found


@contextmanager
def _burst(caller: Caller, bodies: list[bytes]) -> Iterator[Iterator[int]]:
    """Callers that send pictures until this ends; tells how many were answered."""
    over, answered, left = threading.Event(), itertools.count(), iter(bodies)

    def send() -> None:
        for body in left:
            if over.is_set():
                return
            caller.ask("embed", body, BEFORE)
            next(answered)

    senders = [threading.Thread(target=send) for _ in range(BURST_CALLERS)]
    for sender in senders:
        sender.start()
    time.sleep(0.2)
    try:
        yield answered
    finally:
        over.set()
        for sender in senders:
            sender.join()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[-1]


def _ms(seconds: list[float]) -> str:
    return f"{median(seconds) * 1e3:.1f} ms"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
