"""The corpus against the loader: every answer a named error, nothing dies, nothing grows."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import psutil
import pytest

import hostile
from media_files import settings
from media_planner import FilePlanner
from triptych.errors import TriptychError
from triptych.media import MediaLoader, MediaOptions
from triptych.media.fetch import Fetcher, resolve
from triptych.media.policy import Policy

MODALITIES = {
    "image_url": "image",
    "video_url": "video",
    "audio_url": "audio",
    "image_embeds": "image",
}


def url_of(case: hostile.Hostile) -> str:
    return case.part[case.part["type"]]["url"]


@pytest.mark.timeout(280)
@pytest.mark.parametrize("mode", ["exact", "fast"])
async def test_every_answer_is_right_and_nothing_is_harmed(mode):
    async def offline(host, port):
        return await resolve(host, port) if host[-1:].isdigit() or ":" in host else ["10.0.0.1"]

    limits = settings(media_workers=2, media_cache_mb=8, decode_timeout_s=15, image_mode=mode)
    fetcher = Fetcher(limits, Policy(limits), resolve=offline)
    loader = MediaLoader(limits, FilePlanner(), fetcher=fetcher)
    wrong: list[str] = []
    codes: Counter[str] = Counter()
    gate = asyncio.Semaphore(8)

    async def one(case: hostile.Hostile) -> None:
        kind = case.part["type"]
        options = MediaOptions(embeds=kind == "image_embeds")
        try:
            await loader.load(MODALITIES[kind], url_of(case), where="part", options=options)
        except TriptychError as error:
            codes[error.code] += 1
            if error.code not in case.codes or error.where != "part":
                wrong.append(f"{case.name}: {error}")
        else:
            codes["answered"] += 1
            if not case.harmless:
                wrong.append(f"{case.name}: answered")
        finally:
            gate.release()

    async def run() -> int:
        tasks = []
        for case in hostile.corpus():
            await gate.acquire()
            tasks.append(asyncio.create_task(one(case)))
        await asyncio.gather(*tasks)
        return len(tasks)

    try:
        await check(loader, run, wrong, codes, twice=mode == "exact")
    finally:
        await loader.close()


async def check(loader, run, wrong, codes, *, twice):
    def footprint() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    count = await run()
    assert not wrong, "\n".join(wrong)
    assert count >= 1_000
    assert "internal" not in codes
    if twice:
        before, handles, workers = footprint(), psutil.Process().num_fds(), loader.worker_pids
        await run()
        assert footprint() - before < 64 << 20
        assert psutil.Process().num_fds() <= handles + 2
        assert sorted(loader.worker_pids) == sorted(workers), "no worker was lost"


def test_the_corpus_is_the_same_each_time():
    names = [case.name for case in hostile.corpus()]
    assert names == [case.name for case in hostile.corpus()]
    assert len(names) == len(set(names))
