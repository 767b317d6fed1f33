"""What is spared by never encoding twice, and what others feel of what is not spared.

One server, the repository's own ensemble up to TICKET; texts go to an engine that says back what it
was given. Checkpoint: the tiny one, with the picture sizes of the hub's Qwen2.5-VL: a photograph of
1024² becomes 1296 embeddings in a tower of 4 layers. Every picture is another one unless it is said
to be the same; pictures are sent as ``data:`` URIs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benches import Row
from benches._callers import all_at_once, first_tokens, ms, p99, running, seconds
from benches._checkpoint import with_hub_sizes
from benches._embed import Caller, chat, metrics
from benches._instances import rows as instance_rows
from benches._media import Media
from benches._tell import tell
from triptych import families
from triptych.contract import Item
from triptych.encode import Encoder
from triptych.media.worker import NICENESS
from triptych.server import Server
from triptych.settings import EncoderSettings

AT_ONCE = 32
BURST_CALLERS = 4
BEFORE = ("PROMPT", "TICKET")
"""Embeddings are made as they are for the language model, and not sent to the caller."""


def run(quick: bool) -> list[Row]:
    """Measure; a row a goal."""
    media = Media()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = with_hub_sizes(Path(folder) / "checkpoint")
        with running(checkpoint, Path(folder) / "two", extra=("chat_echo",)) as (server, caller):
            rows = [
                _repeat(caller, media, rounds=7 if quick else 25),
                *_at_once(server, caller, media, rounds=3 if quick else 7),
                _texts(caller, media, probes=150 if quick else 500, rounds=3 if quick else 5),
            ]
        rows.append(_batched(checkpoint, rounds=5 if quick else 15))
        rows += instance_rows(checkpoint, Path(folder), media, rounds=3 if quick else 7)
    return rows


def _repeat(caller: Caller, media: Media, rounds: int) -> Row:
    """The fastest way there is for a picture that was seen, against the way of one that was not."""
    cold, again = [], []
    for number in range(rounds + 1):
        body = media.picture()
        spent = seconds(lambda body=body: caller.ask("embed", body, BEFORE))
        repeats = [seconds(lambda body=body: caller.ask("embed", body, BEFORE)) for _ in range(5)]
        if number:  # the first warms up
            cold.append(spent)
            again.append(median(repeats))
    text = [seconds(lambda: caller.ask("embed", chat(), BEFORE)) for _ in range(20)]
    tell(f"cold {ms(cold)}, repeated {ms(again)}, no picture at all {ms(text)}")
    ratios = [one / other for one, other in zip(again, cold, strict=True)]
    return Row.of("1024² JPEG before the language model: repeat ÷ cold", ratios, 1 / 50)


def _at_once(server: Server, caller: Caller, media: Media, rounds: int) -> list[Row]:
    """De-duplication cannot be turned off in a batch, so without it means 32 that differ."""
    ratios, encodes = [], []
    for _ in range(rounds):
        different = [media.picture(512) for _ in range(AT_ONCE)]
        same = [media.picture(512)] * AT_ONCE
        alone = all_at_once(caller, different, "embed", BEFORE, AT_ONCE)
        before = metrics(server)["batch_items_sum"]
        together = all_at_once(caller, same, "embed", BEFORE, AT_ONCE)
        encodes.append(metrics(server)["batch_items_sum"] - before)
        ratios.append(alone / together)
        tell(f"32 different {alone:.2f} s, 32 identical {together:.3f} s, {encodes[-1]:g} encoded")
    return [
        Row.of("32 identical 512² at once ÷ 32 different: throughput", ratios, 8.0, "higher"),
        Row.of("32 identical at once: encoded", encodes, 1.0),
    ]


def _texts(caller: Caller, media: Media, probes: int, rounds: int) -> Row:
    """Time to the first token of a text, while 4 callers send new pictures without a pause."""
    text = chat(text="Say something.", stream=True, max_tokens=4)
    first_tokens(caller, text, 20)  # to warm up
    ratios = []
    for _ in range(rounds):
        idle = first_tokens(caller, text, probes)
        bodies = [media.picture() for _ in range(60)]
        with _burst(caller, bodies) as sent:
            busy = first_tokens(caller, text, probes)
        with _computing():
            beside = first_tokens(caller, text, probes)
        tell(
            f"texts: idle {_spread(idle)}; during {next(sent)} pictures {_spread(busy)}; beside "
            f"processes of niceness {NICENESS} that compute, one a core, {_spread(beside)}"
        )
        ratios.append(p99(busy) / p99(idle))
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
        single = seconds(lambda: [encoder.encode([request]) for request in requests])
        batched = seconds(lambda: encoder.encode(requests))
        if number:
            ratios.append(single / batched)
    return Row.of("16 × 224² in the tower: batched ÷ single images a second", ratios, 1.0, "higher")


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


@contextmanager
def _computing() -> Iterator[None]:
    """A process on every core that does nothing but compute, as low in rank as decoders are."""
    program = f"import os\nos.nice({NICENESS})\nwhile True: pass"
    cores = range(len(os.sched_getaffinity(0)))
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in cores]
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _spread(times: list[float]) -> str:
    return f"p50 {ms(times)}, p99 {p99(times) * 1e3:.1f} ms"
