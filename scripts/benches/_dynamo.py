"""NVIDIA Dynamo as a peer: its frontend and one worker of vLLM, as in its ``agg_multimodal.sh``.

Without etcd and NATS: workers are found by files, requests go by TCP and events by ZeroMQ.
``scripts/dynamo`` makes the environment that it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches._peers import ROOT, VLLM_ENVIRON, Processes, free_ports

PYTHON = ROOT / ".venvs" / "dynamo" / "bin" / "python"

_BOTH = """
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap exit INT
"$PEER_PYTHON" -m dynamo.frontend --http-host=127.0.0.1 --http-port="$PEER_PORT" &
"$PEER_PYTHON" -m dynamo.vllm "$@" &
wait -n
"""
"""Frontend and worker, of which none outlives the other."""


def installed() -> bool:
    """Whether ``scripts/dynamo`` has come to its end."""
    return (PYTHON.parents[1] / ".setup-stamp").exists()


def start_dynamo(model: Path, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Frontend and worker; see `benches._peers.start_triptych`.

    Args:
        model: Its checkpoint.
        folder: Where its log, its store of workers and its temporary files go.
        arguments: More flags for vLLM.
    """
    (port,) = free_ports(1)
    own = folder / "dynamo"
    own.mkdir()
    environ = {
        **VLLM_ENVIRON,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(own / "store"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "warn",
        "PEER_PYTHON": str(PYTHON),
        "PEER_PORT": str(port),
        "PYTHONPATH": "",
        "TMPDIR": str(own),
    }
    flags = [f"--model={model}", f"--served-model-name={model}", "--enable-multimodal", *arguments]
    url = f"http://127.0.0.1:{port}"
    return {
        "processes": Processes(
            ["bash", "-c", _BOTH, "dynamo", *flags], environ, folder / "dynamo.log"
        ),
        "url": url,
        # It is there, and healthy, before any worker is.
        "ready": f"{url}/v1/models",
        "saying": str(model),
    }
