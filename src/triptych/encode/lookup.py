"""How preprocess learns what the encoder holds: the messages, and where they are exchanged.

    preprocess ──Find(claim)──────▶ encoder     before decoding: is it held?
               ◀──────Found(lease)─
    preprocess ──Bring(pixels)────▶ encoder     after decoding: encode it, the request follows
               ◀──────Found(lease)─
    preprocess ──Leave────────────▶ encoder     the request was cancelled meanwhile
    encoder    ──Take(lease)──────▶ encoder     when another instance gave the lease
               ◀─────Taken(bytes)──

Each encoder instance listens on a Unix socket in a directory that belongs to its tritonserver and
that only this user may enter. Not a call of the model (BLS), for two reasons: it would wait in the
encoder's queue behind the forward pass of other requests, when the answer is a look in a table,
and Triton's callers could send it as well, so that every answer would need a proof.

Every ``Unknown`` has a way round it: preprocess sends the pixels as MEDIA.

A message is one line of JSON.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

import blake3
import msgspec

from triptych.contract import DType, Item

SUFFIX = ".sock"
SEPARATOR = "@"
"""Between a socket's model and its instance."""
MAX_LINE_BYTES = 1 << 20
_SAFE = re.compile(r"[\w.-]+@[\w.-]+")
_MAX_PATH_BYTES = 107
"""Of a Unix socket, unix(7)."""


class Find(msgspec.Struct, frozen=True, tag=True):
    """Who has a claim, and no pixels, asks for a lease."""

    id: int
    claim: str


class Bring(msgspec.Struct, frozen=True, tag=True):
    """Pixels, for embeddings that the sender's request will need, and what they are called."""

    id: int
    claim: str
    content: str
    """`triptych.encode.keys.content_key`."""
    note: str
    """What to be told when the claim is found."""
    item: Item
    file: str
    """Path of an open file of the sender that holds the pixels, under ``/proc``; it stays open
    until there is an answer."""
    priority: int = 0
    """`triptych.contract.Sampling.priority`."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Whoever sent a `Bring` waits for its answer no longer; there is none to this."""

    id: int
    """Of the `Bring`."""


class Take(msgspec.Struct, frozen=True, tag=True):
    """One encoder fetches what another has leased."""

    id: int
    lease: str
    revision: str
    """`triptych.encode.keys.revision`, which must be the same at both."""


class Found(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Find` or `Bring`."""

    id: int
    lease: str
    note: str = ""
    """As it was given with the claim."""


class Taken(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Take`; the embeddings' bytes follow the line."""

    id: int
    item: Item
    key: str
    dtype: DType
    shape: tuple[int, int]
    seconds: float
    nbytes: int


class Unknown(msgspec.Struct, frozen=True, tag=True):
    """The answer when there is nothing to be had.

    After `Bring`: the encoder failed, or has no room for what would come of the pixels.
    """

    id: int


Request = Find | Bring | Leave | Take
Reply = Found | Taken | Unknown

_ENCODER = msgspec.json.Encoder()
read_request = msgspec.json.Decoder(Request).decode
read_reply = msgspec.json.Decoder(Reply).decode


def line(message: Request | Reply) -> bytes:
    """The message as it goes over the socket."""
    return _ENCODER.encode(message) + b"\n"


def instance(model: str, name: str) -> str:
    """What this process is called among the encoder instances of its server.

    The process counts: while a model is loaded anew, its old instance ends its work beside the new.

    Args:
        model: Triton's name of the model.
        name: Triton's name of the instance.

    Raises:
        ValueError: It would not do as a file's name.
    """
    whole = f"{model}{SEPARATOR}{name}.{os.getpid()}"
    if not _SAFE.fullmatch(whole):
        raise ValueError(f"{whole!r} cannot be the name of a socket")
    return whole


def place() -> Path:
    """The directory for the sockets of the tritonserver that this process is a stub of.

    All stubs are children of one tritonserver, which the directory is named after: its process id,
    when it started, and the namespace in which that id is its own.
    """
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    namespace = os.stat("/proc/self/ns/pid").st_ino
    name = blake3.blake3(f"{namespace} {parent} {started}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"triptych-{os.geteuid()}" / name


def address(folder: Path, name: str) -> Path:
    """The socket of an instance.

    Raises:
        ValueError: The name is not one that `instance` makes, or the path is too long.
    """
    if not _SAFE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an encoder instance")
    path = folder / f"{name}{SUFFIX}"
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ValueError(f"the path of the socket is too long: {path}")
    return path


def private(folder: Path) -> bool:
    """Whether nobody but this user can put anything into ``folder`` or reach what is there."""
    try:
        found = [os.lstat(path) for path in (folder.parent, folder)]
    except OSError:
        return False
    return all(
        stat.S_ISDIR(one.st_mode) and one.st_uid == os.geteuid() and not one.st_mode & 0o077
        for one in found
    )
