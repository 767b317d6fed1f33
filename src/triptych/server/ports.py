"""Ports that are free."""

from __future__ import annotations

import contextlib
import socket

from triptych.errors import ConfigurationError


def claim(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """The ports to use: those wanted, if they are free, and free ones where 0 is wanted.

    Raises:
        ConfigurationError: A port is taken, is wanted twice, or the address is not ours.
    """
    with contextlib.ExitStack() as stack:
        ports = {}
        for name, port in wanted.items():
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen()  # a socket that is only bound would not keep the next one off
            except OSError as error:
                raise ConfigurationError(
                    f"the {name} port {port} on {host} cannot be used: {error.strerror}"
                ) from None
            ports[name] = probe.getsockname()[1]
        return ports
