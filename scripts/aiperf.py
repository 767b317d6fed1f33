"""Serves the tiny model with vLLM and OpenAI's API, and lets aiperf ask about pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from triptych.gateway import Gateway, GatewayOptions
from triptych.server import Server, ServerOptions

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "tiny-qwen2.5-vl"
AIPERF = ROOT / ".venvs" / "aiperf" / "bin" / "aiperf"
FLAGS = {
    "--endpoint-type": "chat",
    "--request-count": "20",
    "--concurrency": "4",
    "--synthetic-input-tokens-mean": "64",
    "--output-tokens-mean": "16",
    "--image-batch-size": "1",
    "--image-width-mean": "320",
    "--image-width-stddev": "60",
    "--image-height-mean": "240",
    "--image-height-stddev": "40",
}
SHOWN = ("time_to_first_token", "inter_token_latency", "request_latency", "request_throughput")


def main(flags: list[str]) -> int:
    """Run aiperf with ``flags`` besides ours; 1 where a request failed."""
    options = ServerOptions(model=str(MODEL), http_port=0, grpc_port=0, metrics_port=0)
    with Server(options) as server, tempfile.TemporaryDirectory() as folder:
        server.wait_ready()
        gateway = GatewayOptions(triton=f"127.0.0.1:{server.grpc_port}", port=0)
        with Gateway(gateway) as served:
            print(f"gateway on {served.url}, model chat_vllm", flush=True)
            done = subprocess.run(_command(served.url, folder, flags), env=_environment())
        if done.returncode:
            return done.returncode
        return _tell(Path(folder))


def _command(url: str, folder: str, flags: list[str]) -> list[str]:
    ours = {**FLAGS, "--model": "chat_vllm", "--url": url, "--tokenizer": str(MODEL)}
    ours |= {"--artifact-dir": folder, "--ui": "simple"}
    given = {flag.partition("=")[0] for flag in flags}
    pairs = [part for name, value in ours.items() if name not in given for part in (name, value)]
    return [str(AIPERF), "profile", "--streaming", *pairs, *flags]


def _environment() -> dict[str, str]:
    """Ours, less what has aiperf look for its tokenizer in a cache alone, and not in our folder."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in offline}
    return {**kept, "TOKENIZERS_PARALLELISM": "false"}


def _tell(folder: Path) -> int:
    """Whether all went well, by what aiperf wrote down."""
    [file] = folder.rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text())
    failed = found.get("error_request_count") or {"avg": 0}
    answered = found["request_count"]["avg"]
    print(f"{answered:.0f} answered, {failed['avg']:.0f} failed")
    for name in SHOWN:
        if value := found.get(name):
            print(f"  {name}: {value['avg']:.2f} {value['unit']}")
    return 0 if answered and not failed["avg"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
