"""Ports that a server is to open later: nobody else gets them in between."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from triptych.errors import ConfigurationError
from triptych.server.ports import Claim

HOST = "127.0.0.1"


@pytest.fixture
def claim() -> Iterator[Claim]:
    claim = Claim(HOST, {"http": 0, "grpc": 0})
    yield claim
    claim.release()


def listen(port: int, *, reuse: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        other.bind((HOST, port))
        other.listen()


def test_a_server_may_open_what_is_claimed_for_it(claim: Claim) -> None:
    first, second = claim.ports.values()
    assert first != second
    listen(first, reuse=True)
    listen(second, reuse=True)


def test_who_does_not_ask_for_a_claimed_port_by_number_is_not_given_it(claim: Claim) -> None:
    """An outgoing connection is held to the one port, as if no other were left."""
    port = claim.ports["http"]
    with socket.create_server((HOST, 0)) as server:
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            socket.create_connection(server.getsockname(), source_address=(HOST, port)).close()
        claim.release()
        socket.create_connection(server.getsockname(), source_address=(HOST, port)).close()


@pytest.mark.parametrize("wanted", ["taken", "twice"])
def test_a_port_that_cannot_be_used_is_named(wanted: str) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        if wanted == "twice":
            server.close()
        with pytest.raises(ConfigurationError) as caught:
            Claim(HOST, {"http": port, "grpc": port})
    name = "http" if wanted == "taken" else "grpc"
    assert f"the {name} port {port} on {HOST} cannot be used: Address already" in caught.value.what


def test_a_claim_that_fails_keeps_nothing() -> None:
    with socket.create_server((HOST, 0)) as server:
        taken = server.getsockname()[1]
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            free = probe.getsockname()[1]
        with pytest.raises(ConfigurationError):
            Claim(HOST, {"http": free, "grpc": taken})
    listen(free, reuse=False)
