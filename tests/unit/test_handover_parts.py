"""The parts of the road NIXL that need no NIXL."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import ConfigurationError, InvalidValue
from triptych.handover import seal, trust
from triptych.handover.arena import Allocator, Arena
from triptych.handover.leases import Leases

CAPACITY = 4096
KINDS = ("xxh3", "sum64", "xxh3")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), max_size=60))
def test_what_is_taken_never_overlaps_and_all_grows_together_again(
    steps: list[tuple[bool, int]],
) -> None:
    allocator = Allocator(CAPACITY)
    owners = np.zeros(CAPACITY, dtype=bool)
    taken: list[tuple[int, int]] = []
    for take, number in steps:
        if take:
            start = allocator.take(number)
            if start is None:
                continue
            size = max(-(-number // 64) * 64, 64)
            assert start % 64 == 0
            assert not owners[start : start + size].any()
            assert start + size <= CAPACITY
            owners[start : start + size] = True
            taken.append((start, size))
        elif taken:
            start, size = taken.pop(number % len(taken))
            allocator.give(start)
            owners[start : start + size] = False
        assert allocator.used == owners.sum()
    for start, _ in taken:
        allocator.give(start)
    assert (allocator.used, allocator.holes) == (0, 1)
    assert allocator.take(CAPACITY) == 0


def test_giving_back_twice_is_noticed() -> None:
    allocator = Allocator(CAPACITY)
    start = allocator.take(10)
    assert start is not None
    allocator.give(start)
    with pytest.raises(KeyError):
        allocator.give(start)


def test_a_thousand_holes_cost_microseconds() -> None:
    allocator = Allocator(64 * 4096)
    starts = [allocator.take(64) for _ in range(4096)]
    for start in starts[: 2 * 1000 : 2]:
        allocator.give(start or 0)
    for start in starts[3000:]:
        allocator.give(start or 0)
    assert allocator.holes == 1001
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        start = allocator.take(128)
        times.append(time.perf_counter() - begun)
        allocator.give(start or 0)
    assert min(times) < 1e-3


def test_a_loan_ends_with_its_last_tensor() -> None:
    arena = Arena(1 << 20)
    offset = arena.take(1000)
    assert offset == 0
    lent = arena.lend(offset, 1000)
    part = lent[64:128].view(torch.float32)
    del lent
    gc.collect()
    assert arena.used > 0
    part.fill_(1.0)
    assert torch.equal(arena.view(64, 64).view(torch.float32), part)
    del part
    assert arena.used == 0


def test_leases_end_in_the_order_of_their_deadlines_and_names_are_never_used_again() -> None:
    now = [0.0]
    leases = Leases(10.0, clock=lambda: now[0])
    first = leases.open(0)
    now[0] = 5.0
    second, third = leases.open(64), leases.open(128)
    assert leases.close(second.generation) == second
    assert leases.close(second.generation) is None
    now[0] = 10.0
    assert leases.expired() == [first]
    assert leases.close(first.generation) is None
    assert leases.all() == [third]
    assert len(leases) == 0
    names = {lease.generation for lease in (first, second, third, leases.open(0))}
    assert len(names) == 4
    assert max(names) < 2**53


def sound(data: torch.Tensor, expected: str) -> bool:
    """Whether a reader takes ``data`` for what has the checksum ``expected``."""
    header = torch.zeros(seal.HEADER_BYTES, dtype=torch.uint8, device=data.device)
    generation, [found] = seal.examine(header, [data], [expected])
    assert generation is None
    return found


@pytest.mark.parametrize("kind", ["xxh3", "sum64"])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 64, 1000, (8 << 20) + 3])
def test_a_checksum_finds_any_wrong_bit_and_any_swap(kind: str, nbytes: int) -> None:
    data = torch.from_numpy(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8))
    [expected] = seal.checksums([data], kind)
    assert sound(data, expected)
    for place in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        data[place] ^= 16
        assert not sound(data, expected)
        data[place] ^= 16
    if nbytes >= 64:
        swapped = torch.cat([data[8:16], data[:8], data[16:]])
        assert not sound(swapped, expected)
    assert not sound(torch.cat([data, torch.zeros(8, dtype=torch.uint8)]), expected)


def test_each_piece_is_held_against_its_own_checksum() -> None:
    pieces = [torch.arange(size, dtype=torch.uint8) for size in (8, 64, 100)]
    header = torch.zeros(seal.HEADER_BYTES, dtype=torch.uint8)
    seal.write_header(header, 7)
    expected = [seal.checksums([p], kind)[0] for p, kind in zip(pieces, KINDS, strict=True)]
    assert seal.examine(header, pieces, expected) == (7, [True, True, True])
    pieces[1] = pieces[1] + 1
    assert seal.examine(header, pieces, expected) == (7, [True, False, True])
    assert seal.examine(header, pieces[::-1], expected) == (7, [False, False, False])


@pytest.mark.parametrize("wrong", ["", "crc32:00", ":", "none"])
def test_checksums_of_no_known_kind_are_refused(wrong: str) -> None:
    with pytest.raises(InvalidValue, match="no checksum"):
        sound(torch.zeros(3, dtype=torch.uint8), wrong)


def test_a_header_names_its_generation_until_it_is_wiped() -> None:
    place = torch.full((seal.HEADER_BYTES,), 255, dtype=torch.uint8)
    assert seal.read_header(place) is None
    seal.write_header(place, 2**52)
    assert seal.read_header(place) == 2**52
    seal.wipe_header(place)
    assert seal.read_header(place) is None


class TestTrust:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        self.folder = tmp_path

    def test_a_proof_holds_for_the_same_key_and_bytes_alone(self) -> None:
        key = trust.load_key("a secret")
        proof = trust.prove(key, b"metadata")
        assert trust.proven(key, b"metadata", proof)
        assert not trust.proven(key, b"Metadata", proof)
        assert not trust.proven(trust.load_key("another"), b"metadata", proof)
        assert not trust.proven(key, b"metadata", b"")
        assert not list(self.folder.iterdir())

    def test_without_a_setting_processes_of_one_user_share_a_key(self) -> None:
        assert trust.load_key("") == trust.load_key("")
        [path] = self.folder.glob("*/handover.key")
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700

    def test_a_key_that_others_can_read_is_refused(self) -> None:
        trust.load_key("")
        [path] = self.folder.glob("*/handover.key")
        path.chmod(0o644)
        with pytest.raises(ConfigurationError, match="others"):
            trust.load_key("")

    def test_a_link_in_its_place_is_refused(self) -> None:
        trust.load_key("")
        [path] = self.folder.glob("*/handover.key")
        elsewhere: Any = path.rename(self.folder / "elsewhere")
        path.symlink_to(elsewhere)
        with pytest.raises(ConfigurationError, match="others"):
            trust.load_key("")
