"""A mount namespace whose /dev/shm and disk are small and its own, so that both can be filled."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

SHM_MB = 160
"""A server of four stubs starts with 64, and Triton's step is 16."""
DISK_MB = 32

_SETUP = """
set -e
mount -t tmpfs -o size={shm}m,mode=1777 triptych-shm /dev/shm
mount -t tmpfs -o size={disk}m,mode=1777 triptych-disk {folder}
echo ready
exec cat
"""


class Room:
    """The namespace, as long as this is entered; where the kernel grants none, everybody's.

    Args:
        folder: An empty directory; within the namespace a disk of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._holder: subprocess.Popen[str] | None = None
        self._enter: list[str] = []

    def __enter__(self) -> Self:
        setup = _SETUP.format(shm=SHM_MB, disk=DISK_MB, folder=self.folder)
        root = os.geteuid() == 0
        unshare = ["unshare", "--mount", *([] if root else ["--user", "--map-root-user"])]
        if shutil.which("unshare") and shutil.which("nsenter"):
            self._holder = subprocess.Popen(
                [*unshare, "sh", "-c", setup],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self._holder.stdout is not None
            if self._holder.stdout.readline() == "ready\n":
                self._enter = ["nsenter", f"--target={self._holder.pid}", "--mount"]
                if not root:
                    self._enter += ["--user", "--preserve-credentials"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._holder is not None:
            self._holder.communicate()

    @property
    def is_own(self) -> bool:
        """Whether there is a namespace, so that filling it harms nobody."""
        return bool(self._enter)

    @property
    def shm(self) -> Path:
        """Its /dev/shm, seen from outside."""
        return self._seen(Path("/dev/shm"))

    @property
    def disk(self) -> Path:
        """Its disk, seen from outside."""
        return self._seen(self.folder)

    def command(self, words: list[str]) -> list[str]:
        """``words`` to be run inside."""
        return [*self._enter, *words]

    def _seen(self, path: Path) -> Path:
        if self._holder is None or not self.is_own:
            return path
        return Path(f"/proc/{self._holder.pid}/root{path}")


def fill(folder: Path) -> Path:
    """Write a file until its file system is full."""
    path = folder / "filled"
    block = bytes(1 << 16)
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(block) == len(block):
                pass
            while file.write(b"\0"):
                pass
        except OSError:
            pass
    return path
