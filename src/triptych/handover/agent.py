"""All that is called of NIXL itself: one agent of this process, with UCX under it.

Without NIXL's progress thread, which turns on a core without a pause. So nothing moves unless
somebody asks for it: `Agent.notifications` at the owner's end, `Agent.done` at the reader's.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from triptych.errors import ConfigurationError
from triptych.handover.arena import Arena, Memory

logger = logging.getLogger("triptych.handover")

_SEGMENT = {"host": "DRAM", "cuda": "VRAM"}
_PEER = re.compile(r"\| (?P<agent>\S+) (?P<reach>self|intra-node|inter-node) cfg#")
_READ = re.compile(r"\| remote memory read by ")
_BULK = re.compile(r"\|\s*\d+\.\.inf\s*\| (?P<how>.*?)\s*\| (?P<lanes>.*?)\s*\|")
"""The row of a table that large reads go by."""
_COMPLAINT = re.compile(r"UCX\s+(?:ERROR|WARN|FATAL)\s+(?P<what>.*)")
_TRANSPORT = re.compile(r"([a-z_0-9]+)/")


class Reach(NamedTuple):
    """What UCX chose for reading from one kind of peer."""

    same_host: bool
    transports: frozenset[str]
    """Such as ``tcp``, ``cma``, ``cuda_ipc``, ``rc_mlx5``."""
    told: str
    """UCX's own words, such as ``zero-copy cma/memory``."""


class Agent:
    """One NIXL agent. Any thread may call.

    Args:
        role: The name begins with it; the rest is random, so that a process that was started
            again is not taken for the one before.

    Raises:
        ConfigurationError: NIXL is not installed, or has no UCX.
    """

    def __init__(self, role: str) -> None:
        self.name = f"{role}-{secrets.token_hex(6)}"
        with _ucx_log.capture():
            self._agent = _new_agent(self.name)
        self._registered: list[Any] = []

    def register(self, arena: Arena) -> None:
        """Let the arena take part in transfers, until `close`."""
        region = (arena.address, arena.tensor.numel(), arena.device_id, "")
        self._registered.append(
            self._agent.register_memory([region], _SEGMENT[arena.memory], backends=["UCX"])
        )

    @property
    def metadata(self) -> bytes:
        """What others need to `add` this agent: its addresses and what is registered."""
        return bytes(self._agent.get_agent_metadata())

    def add(self, metadata: bytes) -> str:
        """Get to know another agent, whose metadata are to be trusted. Its name."""
        name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove(self, name: str) -> None:
        """Forget another agent; transfers with it end in errors."""
        self._agent.remove_remote_agent(name)

    def read(
        self,
        peer: str,
        local: tuple[Memory, int, int],
        remote: tuple[Memory, int, int],
        nbytes: int,
    ) -> Any:
        """Begin to copy from another agent's memory into ours.

        Args:
            peer: Its name.
            local: Kind of memory, ordinal of the device, address.
            remote: Likewise.
            nbytes: How much.

        Returns:
            A handle for `done` and `release`.
        """
        handle = self._agent.initialize_xfer(
            "READ", self._descriptor(local, nbytes), self._descriptor(remote, nbytes), peer
        )
        self._agent.transfer(handle)
        return handle

    def done(self, handle: Any) -> bool:
        """Whether the transfer has ended well; drives it on if not. Raises if it has failed."""
        state = self._agent.check_xfer_state(handle)
        if state not in ("DONE", "PROC"):
            raise ConnectionError(f"the transfer ended with {state}")
        return bool(state == "DONE")

    def release(self, handle: Any) -> None:
        """Give up a transfer's handle. Raises if NIXL cannot let go of it yet."""
        self._agent.release_xfer_handle(handle)

    def notify(self, peer: str, message: bytes) -> None:
        """Send ``message``; it arrives when the peer asks for its `notifications`."""
        self._agent.send_notif(peer, message)

    def notifications(self) -> list[bytes]:
        """What has arrived, from anyone; drives on whatever is under way."""
        return [message for sent in self._agent.get_new_notifs().values() for message in sent]

    def reaches(self) -> list[Reach]:
        """What UCX has chosen for reads since the last call; passes its complaints to our log."""
        return _ucx_log.reaches(self.name)

    def close(self) -> None:
        """Take all memory back from NIXL; a second call does nothing."""
        while self._registered:
            self._agent.deregister_memory(self._registered.pop())
        self._agent = None

    def _descriptor(self, place: tuple[Memory, int, int], nbytes: int) -> Any:
        memory, device, address = place
        return self._agent.get_xfer_descs([(address, nbytes, device)], _SEGMENT[memory])


def _new_agent(name: str) -> Any:
    # Without it a call waits for a connection over a link that is cut: two minutes, measured.
    os.environ.setdefault("UCX_TCP_CONN_NB", "y")
    # Without it, where no NVLink is seen, as between two processes on one GPU, UCX reads device
    # memory through TCP.
    os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
    raise_exceptions = logging.raiseExceptions
    try:
        from nixl import nixl_agent, nixl_agent_config, nixl_thread_sync_t
    except ImportError as error:
        raise ConfigurationError(
            f"embeddings cannot be handed over by NIXL: {error}; map EMBEDDINGS in the ensemble, "
            "or install NIXL (scripts/setup does)"
        ) from None
    finally:
        logging.raiseExceptions = raise_exceptions  # NIXL's import turns it off for everyone
    logging.getLogger("nixl").setLevel(logging.WARNING)
    config = nixl_agent_config(
        backends=["UCX"],
        enable_prog_thread=False,
        sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    try:
        return nixl_agent(name, config)
    except Exception as error:
        raise ConfigurationError(f"NIXL does not start: {error}") from error


class _UcxLog:
    """UCX's own log, the only place where it says which transports it chose.

    UCX reads what concerns its log when the library is loaded, and ``UCX_PROTO_INFO`` for each
    agent; who has set them before keeps them.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._told: dict[str, list[Reach]] = {}
        self._of: re.Match[str] | None = None
        """The line with the peer of the table that is being read."""
        self._reading = False
        """Whether that table is of reads."""

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Have an agent that is made within tell; what is loaded, log to a file without a name."""
        if self._file:
            with _environment(UCX_PROTO_INFO="y"):
                yield
            return
        if "UCX_LOG_FILE" in os.environ or "UCX_LOG_LEVEL" in os.environ:
            yield
            return
        with tempfile.NamedTemporaryFile("r", prefix="triptych-ucx-", delete=False) as file:
            self._file = open(file.name, errors="replace")  # noqa: SIM115 - see the next line
            atexit.register(self._file.close)
        try:
            with _environment(UCX_LOG_FILE=file.name, UCX_LOG_LEVEL="info", UCX_PROTO_INFO="y"):
                yield
        finally:
            os.unlink(file.name)

    def reaches(self, agent: str) -> list[Reach]:
        """What is new about ``agent``."""
        with self._lock:
            # UCX writes through a buffer of C's.
            ctypes.CDLL(None).fflush(None)
            for line in self._file or ():
                if found := _COMPLAINT.search(line):
                    logger.warning("UCX: %s", found["what"])
                else:
                    self._take(line)
            return self._told.pop(agent, [])

    def _take(self, line: str) -> None:
        """Take a line of a table: it names a peer, then a kind of transfer, then its ways."""
        if found := _PEER.search(line):
            self._of, self._reading = found, False
        elif _READ.search(line):
            self._reading = True
        elif self._of and self._reading and (found := _BULK.search(line)):
            transports = frozenset(_TRANSPORT.findall(found["lanes"]))
            told = f"{found['how']} {found['lanes']}"
            reach = Reach(self._of["reach"] != "inter-node", transports, told)
            told_of = self._told.setdefault(self._of["agent"], [])
            if reach not in told_of:  # there is a table for each way of calling it
                told_of.append(reach)
            self._of = None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables, and take away after use those that were not there."""
    added = [name for name in variables if name not in os.environ]
    for name in added:
        os.environ[name] = variables[name]
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


_ucx_log = _UcxLog()
