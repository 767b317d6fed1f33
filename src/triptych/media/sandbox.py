"""What a worker process may not do: take much memory, outlive its parent, reach out.

A decoder is C code that reads what strangers send. Should one be taken over, it finds a process
that can open no socket, start no program, and write no file. Linux only; on a kernel or a
processor where seccomp cannot be had, `confine` says so and the rest still holds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Mapping
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Classic BPF: BPF_LD|W|ABS, BPF_JMP|JEQ|K, JGE, JSET, BPF_RET|K (linux/filter.h)."""


class _Machine(NamedTuple):
    """The numbers of one architecture (linux/audit.h, asm/unistd.h)."""

    audit: int
    refused: tuple[int, ...]
    openat: int
    clone: int
    open: int | None
    """Where the older call still exists."""
    foreign_abi: int | None
    """System calls from this number on belong to another ABI (x32)."""


_CLONE3 = 435
_COMMON = (425, 434, 438)
"""io_uring_setup, pidfd_open, pidfd_getfd."""
# fmt: off
_MACHINES: Mapping[str, _Machine] = {
    "x86_64": _Machine(
        0xC000003E,
        # socket connect accept bind listen socketpair fork vfork execve kill truncate
        # rename mkdir rmdir creat link unlink symlink chmod chown ptrace mount keyctl mkdirat
        # unlinkat renameat linkat symlinkat fchmodat unshare accept4 perf_event_open
        # setns process_vm_readv process_vm_writev renameat2 bpf execveat userfaultfd
        (*(41, 42, 43, 49, 50, 53, 57, 58, 59, 62, 76, 82, 83, 84, 85, 86, 87, 88, 90, 92),
         *(101, 165, 250, 258, 263, 264, 265, 266, 268, 272, 288, 298, 308, 310, 311, 316, 321),
         *(322, 323), *_COMMON),
        openat=257,
        clone=56,
        open=2,
        foreign_abi=0x40000000,
    ),
    "aarch64": _Machine(
        0xC00000B7,
        # mkdirat unlinkat symlinkat linkat renameat mount truncate fchmodat unshare ptrace kill
        # socket socketpair bind listen accept connect keyctl execve perf_event_open accept4 setns
        # process_vm_readv process_vm_writev renameat2 bpf execveat userfaultfd
        (*(34, 35, 36, 37, 38, 40, 45, 53, 97, 117, 129, 198, 199, 200, 201, 202, 203, 219),
         *(221, 241, 242, 268, 270, 271, 276, 280, 281, 282), *_COMMON),
        openat=56,
        clone=220,
        open=None,
        foreign_abi=None,
    ),
}
# fmt: on


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: The parent's process id; if it is gone already, this process exits.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def limit_memory(nbytes: int) -> None:
    """Let allocations beyond ``nbytes`` fail, end at so much shared memory, dump no core."""
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def confine() -> bool:
    """Give up sockets, programs, other processes and writing to files, for good.

    Returns:
        Whether the kernel took the filter.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return False
    program = _filter(machine)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16
    )
    return (
        _prctl(_PR_SET_NO_NEW_PRIVS, 1) == 0
        and _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header)) == 0
    )


def _prctl(option: int, *arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return int(libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)))


def _filter(machine: _Machine) -> bytes:
    """The BPF program; `struct seccomp_data` is number, architecture, pc, six arguments."""
    denied, no_such = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    code = [
        _op(_LOAD, 4),
        _op(_JUMP_EQ, machine.audit, skip_if=1),
        _op(_RETURN, denied),
        _op(_LOAD, 0),
    ]
    if machine.foreign_abi is not None:
        code += [_op(_JUMP_GE, machine.foreign_abi, skip_else=1), _op(_RETURN, denied)]
    for number in machine.refused:
        code += [_op(_JUMP_EQ, number, skip_else=1), _op(_RETURN, denied)]
    # C libraries fall back to clone, whose flags a filter can see.
    code += [_op(_JUMP_EQ, _CLONE3, skip_else=1), _op(_RETURN, no_such)]
    code += _by_argument(machine.clone, 0, _CLONE_THREAD, if_set=_ALLOW, otherwise=denied)
    code += _by_argument(machine.openat, 2, _WRITING, if_set=denied, otherwise=_ALLOW)
    if machine.open is not None:
        code += _by_argument(machine.open, 1, _WRITING, if_set=denied, otherwise=_ALLOW)
    return b"".join([*code, _op(_RETURN, _ALLOW)])


def _by_argument(
    number: int, argument: int, mask: int, *, if_set: int, otherwise: int
) -> list[bytes]:
    """Judge system call ``number`` by whether a bit of ``mask`` is set in one argument."""
    return [
        _op(_JUMP_EQ, number, skip_else=4),
        _op(_LOAD, 16 + 8 * argument),
        _op(_JUMP_SET, mask, skip_else=1),
        _op(_RETURN, if_set),
        _op(_RETURN, otherwise),
    ]


def _op(code: int, value: int, *, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if, skip_else, value)
