"""An encoder's end of the road NIXL in a process of its own, told what to do over a pipe."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import torch

from triptych import contract
from triptych.contract import ITEM_SIZE, DType, Ticket, TicketItem, aligned
from triptych.engines.base import Media
from triptych.handover import Publisher
from triptych.handover.owner import NixlPublisher
from triptych.handover.trust import load_key

SECRET = "of the tests"
"""What engines are told as the setting ``handover_key``."""
KEY = load_key(SECRET)
MIB = 1 << 20
FINITE = {2: ~0x4000_4000_4000_4000, 4: ~0x4000_0000_4000_0000}
"""By the bytes of a float, 64 bits that leave the highest of each exponent out."""


class Spec(NamedTuple):
    """One item's embeddings, which follow from it."""

    seed: int
    shape: tuple[int, int]
    dtype: DType = "float32"
    nans: bool = False
    """Any bits, and not only those of finite values."""

    def make(self) -> torch.Tensor:
        """Random bytes."""
        generator = torch.Generator().manual_seed(self.seed)
        words = -(-self.shape[0] * self.shape[1] * ITEM_SIZE[self.dtype] // 8)
        whole = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator)
        if not self.nans:
            whole &= FINITE.get(ITEM_SIZE[self.dtype], -1)
        count = self.shape[0] * self.shape[1]
        return whole.view(getattr(torch, self.dtype))[:count].view(self.shape)


Made = tuple[TicketItem, "npt.NDArray[np.uint8]"]
"""An item and its bytes; where they lie is for `publish` to say."""


def made(spec: Spec) -> Made:
    """What an encoder would make."""
    item = TicketItem("image", f"{spec.seed}", spec.dtype, spec.shape, 0)
    return item, spec.make().view(-1).view(torch.uint8).numpy()


def publish(publisher: Publisher, media: Sequence[Made]) -> tuple[torch.Tensor, Ticket]:
    """Do as the encoder does: room, write, publish."""
    items: list[TicketItem] = []
    offset = 0
    for item, _ in media:
        items.append(msgspec.structs.replace(item, offset=offset))
        offset += aligned(item.nbytes)
    whole = publisher.room(items[-1].offset + items[-1].nbytes if items else 0)
    for item, (_, data) in zip(items, media, strict=True):
        whole[item.offset : item.offset + item.nbytes].copy_(torch.from_numpy(data))
    return whole, publisher.publish(whole, Ticket(items))


def same(tensor: torch.Tensor, spec: Spec) -> bool:
    """Whether all bytes are those of ``spec``."""
    made = spec.make()
    return (
        tensor.shape == made.shape
        and tensor.dtype == made.dtype
        and torch.equal(tensor.reshape(-1).view(torch.uint8), made.view(-1).view(torch.uint8))
    )


def usage() -> dict[str, int]:
    """What this process has of the system."""
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "fds": process.num_fds(),
        "threads": process.num_threads(),
    }


def registered(end: Any) -> int:
    """How large NIXL's own list is of what an end of the road has registered, bytes."""
    return len(end._agent.metadata)


class Owner:
    """The test's side of the pipe."""

    def __init__(self, process: Any, pipe: Any) -> None:
        self.process = process
        self.pipe = pipe

    def ask(self, command: str, *arguments: Any) -> Any:
        self.pipe.send((command, *arguments))
        assert self.pipe.poll(60), f"no answer to {command}"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def publish(self, *specs: Spec) -> Ticket:
        return contract.decode(self.ask("publish", list(specs)), Ticket)

    def hand_over(self, media: Media) -> Ticket:
        """A ticket for embeddings that are here."""
        pairs = [
            (item, tensor.contiguous().view(-1).view(torch.uint8).numpy()) for item, tensor in media
        ]
        return contract.decode(self.ask("hand over", pairs), Ticket)

    def leases(self, expected: int, within_s: float = 5.0) -> None:
        """Wait until so many leases are open: releases take a millisecond."""
        end = time.monotonic() + within_s
        while (got := self.ask("stats")["leases"]) != expected:
            assert time.monotonic() < end, f"{got} leases, expected {expected}"
            time.sleep(0.005)


@contextmanager
def owner(
    capacity: int = 512 * MIB, lease_s: float = 60.0, device: str = "cpu", **environ: str
) -> Iterator[Owner]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, capacity, lease_s, device, environ))
    process.start()
    try:
        yield Owner(process, ours)
    finally:
        if process.is_alive():
            ours.send(("close",))
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _serve(pipe: Any, capacity: int, lease_s: float, device: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    torch.set_num_threads(1)
    publisher = NixlPublisher(capacity, torch.device(device), KEY, lease_s)
    while True:
        command, *arguments = pipe.recv()
        if command == "close":
            publisher.close()
            return
        try:
            pipe.send(_answer(publisher, command, arguments))
        except Exception as error:
            pipe.send(error)


def _answer(publisher: NixlPublisher, command: str, arguments: list[Any]) -> Any:
    if command == "publish":
        return contract.encode(publish(publisher, [made(spec) for spec in arguments[0]])[1])
    if command == "hand over":
        return contract.encode(publish(publisher, arguments[0])[1])
    if command == "publish many":
        count, spec = arguments
        tickets = [publish(publisher, [made(spec)])[1] for _ in range(count)]
        return msgspec.json.encode(tickets)
    if command == "corrupt":
        ctypes.c_uint8.from_address(arguments[0]).value ^= 1
    elif command == "stats":
        return {
            "leases": publisher.leases,
            "used": publisher.used,
            "registered": registered(publisher),
            **usage(),
        }
    elif command == "cpu":
        begun = time.process_time()
        time.sleep(arguments[0])
        return time.process_time() - begun
    return None
