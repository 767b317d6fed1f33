from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from media_files import data_uri, image_file, jpeg, pixels, settings
from media_planner import CrashPlanner, FilePlanner
from triptych.errors import (
    InternalError,
    MediaTimeout,
    MediaTooLarge,
    MediaUnreadable,
    Overloaded,
    Unavailable,
)
from triptych.media import MediaLoader, image
from triptych.media.base import PRIORITY
from triptych.media.pool import python
from triptych.media.slots import Slots

CRASH, HANG, FAULT = (data_uri(jpeg(20, width)) for width in (13, 17, 19))
"""What `CrashPlanner` does at each width."""


@pytest.fixture
async def make():
    loaders = []

    def make(planner=None, **values):
        loader = MediaLoader(settings(**values), planner or CrashPlanner())
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        await loader.close()
        assert not loader.worker_pids


def picture(seed):
    return data_uri(jpeg(seed=seed))


async def load(loader, url, where="here"):
    return await loader.load("image", url, where=where)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_is_ended_from_outside_is_not_its_mediums_fault(make, number):
    loader = make(planner=FilePlanner(), media_workers=1)
    expected = await load(loader, picture(1))
    [first] = loader.worker_pids
    os.kill(first, signal.SIGSTOP)  # so that it has not done its work by then
    task = asyncio.create_task(load(loader, picture(2)))
    await asyncio.sleep(0.1)
    os.kill(first, number)
    loaded = await task
    assert loaded.array.shape == expected.array.shape
    assert first not in loader.worker_pids


async def test_it_is_tried_twice_only(make, monkeypatch):
    loader = make(media_workers=1)
    monkeypatch.setattr("triptych.media.pool.STOPPED_LOOK_S", 0.01)
    monkeypatch.setattr("triptych.processes.is_stopped", lambda pid: True)
    with pytest.raises(Unavailable, match="twice"):
        await load(loader, HANG)
    monkeypatch.undo()
    assert await load(loader, picture(3))


async def test_a_crash_costs_one_request(make):
    loader = make(media_workers=2)
    results = await asyncio.gather(
        load(loader, picture(1)),
        load(loader, CRASH, "bad"),
        load(loader, picture(2)),
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == ["Loaded", "MediaUnreadable", "Loaded"]
    assert "SIGSEGV" in str(results[1])
    assert results[1].where == "bad"
    assert (await load(loader, picture(3))).tokens == 7


async def test_a_hang_is_ended(make):
    loader = make(decode_timeout_s=0.5)
    await load(loader, picture(1))
    before = loader.worker_pids
    with pytest.raises(MediaTimeout, match=r"0\.5 s"):
        await load(loader, HANG)
    assert (await load(loader, picture(2))).tokens == 7
    assert loader.worker_pids != before
    assert not psutil.pid_exists(before[0])


async def test_a_fault_of_ours_is_logged_and_not_told(make, caplog):
    loader = make()
    with (
        caplog.at_level(logging.ERROR, "triptych.media"),
        pytest.raises(InternalError, match="decoding the image failed") as caught,
    ):
        await load(loader, FAULT)
    assert "a fault of ours" in caplog.text
    assert "a fault of ours" not in str(caught.value)


async def test_memory_is_limited(make):
    loader = make(planner=FilePlanner(), media_worker_memory_mb=96)
    wide = data_uri(image_file(Image.new("RGB", (7000, 7000)), "PNG"))
    with pytest.raises(MediaTooLarge, match="memory"):
        await load(loader, wide)
    assert (await load(loader, picture(1))).tokens == 7


async def test_a_cancelled_load_gives_its_worker_back(make):
    loader = make(decode_timeout_s=60)
    await load(loader, picture(1))
    task = asyncio.create_task(load(loader, HANG))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    start = time.monotonic()
    assert (await load(loader, picture(2))).tokens == 7
    assert time.monotonic() - start < 10


async def test_a_short_job_that_nobody_waits_for_keeps_its_worker(make):
    loader = make(planner=FilePlanner())
    await load(loader, picture(1))
    before = loader.worker_pids
    task = asyncio.create_task(load(loader, picture(2)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await load(loader, picture(3))
    assert loader.worker_pids == before


async def test_a_worker_can_be_ready_beforehand(make):
    loader = make()
    await loader.start()
    (ready,) = loader.worker_pids
    await load(loader, picture(1))
    assert loader.worker_pids == [ready]


async def test_closing_while_a_worker_starts(make):
    loader = make()
    starting = asyncio.create_task(loader.start())
    await asyncio.sleep(0)
    await loader.close()
    await starting
    assert not loader.worker_pids


async def test_where_workers_do_not_start_it_shows_at_once(make, monkeypatch, caplog):
    monkeypatch.setattr("triptych.media.pool.python", lambda: "/bin/false")
    with pytest.raises(InternalError, match="did not start"):
        await make().start()
    assert "/bin/false did not start" in caplog.text


async def test_too_many_wait(make):
    loader = make(max_queued_media=2, decode_timeout_s=1)
    tasks = [asyncio.create_task(load(loader, HANG))]
    await asyncio.sleep(0.3)
    tasks += [asyncio.create_task(load(loader, picture(seed))) for seed in range(5)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 3
    assert isinstance(results[0], MediaTimeout)


async def test_the_lowest_priority_is_decoded_first(make):
    loader = make(media_workers=1, decode_timeout_s=1)
    done = []

    async def one(name, url, priority):
        PRIORITY.set(priority)
        with contextlib.suppress(MediaTimeout):
            await load(loader, url)
        done.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(one("holds the worker", HANG, 9))
        await asyncio.sleep(0.3)
        for name, priority in (("last", 7), ("third", 0), ("first", -2), ("second", -1)):
            group.create_task(one(name, picture(20 + priority), priority))
        gone = group.create_task(one("gone", picture(99), -9))
        await asyncio.sleep(0.1)
        gone.cancel()
    assert done == ["holds the worker", "first", "second", "third", "last"]


async def test_slots_are_not_lost_with_those_who_leave():
    slots = Slots(1)
    await slots.acquire()
    waiting = [asyncio.create_task(slots.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    slots.release()
    waiting[1].cancel()  # when its turn has come, and it has not gone on
    await asyncio.wait(waiting, timeout=1)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    slots.release()
    await asyncio.wait_for(slots.acquire(), 1)


async def test_workers_are_bounded_and_light(make):
    loader = make(planner=FilePlanner(), media_workers=2)
    await asyncio.gather(*(load(loader, picture(seed)) for seed in range(30)))
    assert 1 <= len(loader.worker_pids) <= 2
    for pid in loader.worker_pids:
        libraries = {Path(entry.path).name for entry in psutil.Process(pid).memory_maps()}
        assert not any(name.startswith(("libtorch", "libavcodec")) for name in libraries)
        assert psutil.Process(pid).memory_info().rss < 150 << 20


async def test_closing_ends_everything(make):
    loader = make(media_workers=2)
    tasks = [asyncio.create_task(load(loader, url)) for url in (HANG, picture(1))]
    await asyncio.sleep(0.4)
    pids = loader.worker_pids
    await loader.close()
    await loader.close()
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_many_pictures_leave_nothing_behind(make):
    loader = make(planner=FilePlanner(), media_cache_mb=0)
    url = data_uri(image_file(Image.fromarray(pixels(400, 400)), "PNG"))
    for _ in range(20):
        await load(loader, url)
    process = psutil.Process()
    before = process.memory_info().rss, process.num_fds()
    for _ in range(200):
        await load(loader, url)
    assert process.memory_info().rss - before[0] < 8 << 20
    assert process.num_fds() <= before[1]
    assert len(loader.worker_pids) == 1


ORPHAN = """
import asyncio, os, sys
sys.path[:0] = {path!r}
from media_files import data_uri, jpeg, settings
from media_planner import CrashPlanner
from triptych.media import MediaLoader, image

async def main():
    loader = MediaLoader(settings(decode_timeout_s=600), CrashPlanner())
    await loader.load("image", data_uri(jpeg()), where="x")
    asyncio.ensure_future(loader.load("image", data_uri(jpeg(20, 17)), where="x"))
    await asyncio.sleep(0.3)
    print(*loader.worker_pids, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def test_workers_die_with_their_parent():
    program = textwrap.dedent(ORPHAN.format(path=sys.path))
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == -9, run.stderr
    worker = int(run.stdout)
    for _ in range(100):
        if not psutil.pid_exists(worker):
            return
        time.sleep(0.05)
    pytest.fail("the hanging worker outlived its parent")


CONFINED = """
import errno, os, socket, subprocess, threading
from triptych.media import sandbox

assert sandbox.confine()
refused = {
    "socket": lambda: socket.socket(),
    "socketpair": lambda: socket.socketpair(),
    "write": lambda: open("/tmp/triptych-test", "w"),
    "unlink": lambda: os.unlink("/tmp/triptych-none"),
    "mkdir": lambda: os.mkdir("/tmp/triptych-test"),
    "fork": os.fork,
    "program": lambda: subprocess.run(["/bin/true"]),
    "kill": lambda: os.kill(1, 0),
}
for name, call in refused.items():
    try:
        call()
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EACCES), (name, error)
    else:
        raise SystemExit(f"{name} was not refused")
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
assert open("/proc/self/status").read()
os.memfd_create("x")
"""


def test_a_confined_process_cannot_reach_out():
    run = subprocess.run(
        [sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_the_interpreter_is_found_where_sys_executable_is_wrong(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/triton_python_backend_stub")
    found = python()
    assert os.access(found, os.X_OK)
    assert found.startswith((sys.prefix, sys.base_prefix))


async def test_a_planner_that_cannot_travel_is_our_fault(make, caplog):
    class Local(FilePlanner):
        pass

    with pytest.raises(InternalError):
        await load(make(planner=Local()), picture(1))


async def test_unreadable_has_its_place(make):
    with pytest.raises(MediaUnreadable) as caught:
        await load(make(), data_uri(jpeg()[:300]), "messages[0].content[1].image_url.url")
    assert str(caught.value).startswith(
        "[media_unreadable] messages[0].content[1].image_url.url: the JPEG cannot be read"
    )


async def test_arrays_larger_than_a_worker_keeps_room_for(make):
    loader = make(planner=FilePlanner())
    for height, width in ((3400, 3400), (40, 60), (3410, 3400), (3200, 3200)):
        data = jpeg(height, width, seed=height, quality=20)
        loaded = await load(loader, data_uri(data))
        alone = image.load(data, FilePlanner(), max_pixels=10**8)[0]
        assert np.array_equal(loaded.array, alone)
