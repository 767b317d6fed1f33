"""Ports that are free, and stay so until a server listens on them."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from triptych.errors import ConfigurationError


class Claim:
    """Ports that are ours from now on, though whoever is to listen on them opens them later.

    A tritonserver opens its ports only after its models have loaded, and any outgoing connection
    of the machine may be given such a port in between. So each is kept by a bound socket that does
    not listen: the kernel then gives it to nobody who has not asked for it by number, and lets in
    whoever listens with ``SO_REUSEADDR``, as tritonserver does.

    Args:
        host: The address to listen on.
        wanted: Name → port; 0: any that is free.

    Raises:
        ConfigurationError: A port is taken, is wanted twice, or the address is not ours.
    """

    def __init__(self, host: str, wanted: Mapping[str, int]) -> None:
        self.ports: dict[str, int] = {}
        """Name → port."""
        self._kept: list[socket.socket] = []
        probes: list[socket.socket] = []
        try:
            for name, port in wanted.items():
                # One that is only bound would not keep the next name off its port.
                probes.append(_bound(name, host, port, listening=True))
                self.ports[name] = probes[-1].getsockname()[1]
            _close(probes)
            for name, port in self.ports.items():
                self._kept.append(_bound(name, host, port))
        except ConfigurationError:
            self.release()
            raise
        finally:
            _close(probes)

    def release(self) -> None:
        """Keep them no longer; a second call does nothing."""
        _close(self._kept)


def _bound(name: str, host: str, port: int, *, listening: bool = False) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        if listening:
            bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"the {name} port {port} on {host} cannot be used: {error.strerror}"
        ) from None
    return bound


def _close(sockets: list[socket.socket]) -> None:
    while sockets:
        sockets.pop().close()
