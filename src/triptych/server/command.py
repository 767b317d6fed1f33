"""The flags and the environment of tritonserver."""

from __future__ import annotations

from collections.abc import Mapping

from triptych.server.installation import Installation
from triptych.server.options import ServerOptions
from triptych.settings import as_environ

SHM_STEP = 16 << 20
"""Bytes of shared memory that a stub starts with, and that it grows by.

Triton's own 1 MiB makes the first pictures pay for dozens of steps. Containers give /dev/shm
64 MiB unless told otherwise, which four stubs just fit into."""


KEY_HEADER = "triptych-key"
"""By which Triton knows its supervisor; gRPC's has ``triton-grpc-protocol-`` before it."""


def arguments(
    installation: Installation,
    options: ServerOptions,
    ports: Mapping[str, int],
    shm_prefix: str,
    key: str,
) -> list[str]:
    """The command line, the binary first.

    Args:
        installation: What to run.
        options: What to serve.
        ports: ``http``, ``grpc`` and ``metrics``.
        shm_prefix: How the names of this server's shared memory regions begin.
        key: What opens the APIs that callers may not use.
    """
    command = [
        str(installation.binary),
        f"--model-repository={options.repository}",
        # config.pbtxt is the only truth about a model.
        "--disable-auto-complete-config",
        # Loading the ensemble loads its steps, and nothing else that lies in the repository.
        "--model-control-mode=explicit",
        f"--load-model={options.chat_model}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--backend-config=python,shm-default-byte-size={SHM_STEP}",
        f"--backend-config=python,shm-growth-byte-size={SHM_STEP}",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        f"--log-verbose={options.log_verbose}",
    ]
    if installation.backend_directory:
        command.append(f"--backend-directory={installation.backend_directory}")
    for name, port in ports.items():
        command += [f"--{name}-address={options.host}", f"--{name}-port={port}"]
    return [*command, *_restrictions(options, key), *options.extra_args]


def _restrictions(options: ServerOptions, key: str) -> list[str]:
    """What keeps callers from the APIs that they were not given.

    Triton writes the value into no log. Whoever can read it off the command line is a user of this
    host.
    """
    closed = [] if options.allow_shared_memory else ["shared-memory"]
    if not options.allow_model_control:
        closed += ["model-repository", "trace", "logging"]
    if not closed:
        return []
    setting = f"{','.join(closed)}:{KEY_HEADER}={key}"
    return [f"--http-restricted-api={setting}", f"--grpc-restricted-protocol={setting}"]


def environ(
    installation: Installation, options: ServerOptions, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of tritonserver, which its stubs inherit."""
    return {
        # Several processes share the cores; a worker thread that spins while it waits for its
        # like took a picture on a busy CPU from 20 ms to 1 s.
        "OMP_WAIT_POLICY": "PASSIVE",
        **installation.environ(dict(base)),
        "PYTHONUNBUFFERED": "1",  # what a stub prints is in the log before it dies
        **as_environ(options.stage_settings()),
    }
