"""What ``pip install`` of a part brings, and that the part runs with no more."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MIB = 1 << 20
INSTALLED = sysconfig.get_path("purelib")
"""Not a build's leavings in the clone."""
HEAVY = {"av", "jinja2", "tokenizers", "torch", "transformers", "vllm"}
"""What the stages and engines need: distributions."""

ALONE = """
import sys
from importlib import metadata
allowed, own = set(sys.argv[1].split()), {"triptych", "triptych_client"}
tops = metadata.packages_distributions()

class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in own or not tops.get(top):
            return None
        if not allowed & {d.lower().replace("_", "-").replace(".", "-") for d in tops[top]}:
            raise ModuleNotFoundError(f"{name} is not installed by this part", name=name)
        return None

sys.meta_path.insert(0, Only())
"""


def closure(extra: str) -> dict[str, metadata.Distribution]:
    """All that ``pip install triptych[extra]`` brings, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [("triptych", extra), ("triptych", "")]
    while waiting:
        name, part = waiting.pop()
        if (name, part) in asked:
            continue
        asked.add((name, part))
        [found[name]] = metadata.distributions(name=name, path=[INSTALLED])
        waiting += needs(found[name], part)
    return found


def needs(distribution: metadata.Distribution, extra: str) -> Iterator[tuple[str, str]]:
    for line in distribution.requires or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            name = canonicalize_name(need.name)
            yield name, ""
            yield from ((name, each) for each in need.extras)


@pytest.mark.parametrize("extra", ["", "gateway"])
def test_neither_library_nor_gateway_brings_what_the_stages_need(extra: str) -> None:
    found = closure(extra)
    assert not HEAVY & found.keys()
    others = {name: each for name, each in found.items() if name != "triptych"}
    sizes = {
        name: sum(file.size or 0 for file in each.files or ()) for name, each in others.items()
    }
    assert sum(sizes.values()) < 250 * MIB, sorted(sizes.items(), key=lambda pair: -pair[1])[:9]


def test_the_stages_bring_it() -> None:
    assert closure("stages").keys() >= {"av", "jinja2", "tokenizers"}


@pytest.mark.parametrize(
    ("extra", "program"),
    [
        (
            "gateway",
            "import httpx\n"
            "from triptych.gateway import Gateway, GatewayOptions\n"
            "with Gateway(GatewayOptions(triton='127.0.0.1:1', port=0)) as gateway:\n"
            "    for path, status in (('/health/live', 200), ('/docs', 200), ('/metrics', 200),\n"
            "                         ('/docs/swagger-ui.css', 200), ('/openapi.json', 200),\n"
            "                         ('/v1/models', 503)):\n"
            "        assert httpx.get(gateway.url + path).status_code == status, path\n"
            "    body = {'model': 'm', 'messages': [{'role': 'user', 'content': 'a'}]}\n"
            "    answer = httpx.post(gateway.url + '/v1/chat/completions', json=body)\n"
            "    assert answer.status_code == 503, answer.text\n",
        ),
        (
            "gateway",
            "from triptych.cli import main\n"
            "assert main(['gateway', '--triton', 'http://a']) == 2\n",
        ),
        ("", "from triptych.cli import main\nassert main(['chat', '--help']) == 0\n"),
        ("", "from triptych.cli import main\nassert main(['gateway']) == 2\n"),
        ("", "from triptych.cli import main\nassert main(['matrix']) == 0\n"),
        (
            "",
            "from triptych_client import Client, Unavailable, image, user\n"
            "with Client('127.0.0.1:1') as client:\n"
            "    assert not client.ready()\n",
        ),
    ],
    ids=["gateway", "gateway's command", "chat's command", "no gateway", "matrix", "library"],
)
def test_a_part_runs_with_what_it_brings(extra: str, program: str) -> None:
    """Every other package is hidden from it."""
    allowed = " ".join(closure(extra))
    done = subprocess.run(
        [sys.executable, "-c", ALONE + program, allowed],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
