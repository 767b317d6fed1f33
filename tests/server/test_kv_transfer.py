"""Prefill and decode apart: two servers, vLLM's NIXL connector between their engines, on the CPU.

README's ``engine.json`` of both, and the request that a router sends to one and then to the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from babbler import make_babbler
from conftest import ServerFactory
from pictures import encoded, noise
from triptych import contract
from triptych.errors import InvalidValue, TriptychError, UnknownField
from triptych.server import Server
from triptych.server.ports import Claim
from triptych_client import image, user
from triton_inputs import bytes_input

pytestmark = pytest.mark.server

PREFILL = '{"do_remote_decode": true, "do_remote_prefill": false}'
"""What a router asks of the server that prefills."""
LENGTH = 24


@dataclass
class Side:
    """One of the two servers."""

    server: Server
    ensemble: str = "chat_vllm"

    def ask(
        self, question: str, picture: Any = None, *, kv: Any = None, **options: Any
    ) -> dict[str, Any]:
        """The CHUNK of a request that is answered whole."""
        shown = [] if picture is None else [image(encoded(picture, "PNG"))]
        body = {"messages": [user(*shown, question)], "temperature": 0, **options}
        parameters = {} if kv is None else {contract.KV_TRANSFER: kv}
        with triton.InferenceServerClient(f"localhost:{self.server.grpc_port}") as client:
            answers: list[Any] = []
            client.start_stream(lambda result, error: answers.append(error or result))
            client.async_stream_infer(
                self.ensemble,
                [bytes_input(contract.REQUEST, json.dumps(body).encode(), (1,))],
                parameters=parameters,
            )
            client.stop_stream()
        [answer] = answers
        if isinstance(answer, InferenceServerException):
            raise TriptychError.parse(answer.message())
        chunk: dict[str, Any] = json.loads(answer.as_numpy(contract.CHUNK)[0])
        return chunk


def said(chunk: dict[str, Any]) -> str:
    text: str = chunk["choices"][0]["delta"]["content"]
    return text


@pytest.fixture(scope="module")
def sides(
    checkpoint: Path,
    start_server: ServerFactory,
    repository_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Side, Side]]:
    folder = tmp_path_factory.mktemp("kv")
    model = make_babbler(checkpoint, folder / "model")
    guide = (repository_root / "docs" / "prefill-decode.md").read_text()
    servers = []
    claim = Claim("127.0.0.1", dict.fromkeys(("prefill", "decode"), 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
        for role in ("prefill", "decode"):
            found = re.search(rf"`{role}\.json`.*?```json\n(.*?)```", guide, re.DOTALL)
            assert found, f"docs/prefill-decode.md has no {role}.json"
            arguments = folder / f"{role}.json"
            arguments.write_text(found[1])
            patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(claim.ports[role]))
            servers.append(
                start_server(
                    "vllm",
                    options={"model": str(model)},
                    engine_args=str(arguments),
                    # NIXL touches all of the memory for keys and values.
                    max_num_seqs=2,
                    max_model_len=2048,
                    allow_kv_transfer=True,
                )
            )
    yield Side(servers[0]), Side(servers[1])
    for server in servers:
        server.stop()
    claim.release()


@pytest.mark.parametrize("shown", [False, True], ids=["text", "picture"])
def test_the_answer_is_that_of_one_engine(sides: tuple[Side, Side], shown: bool) -> None:
    prefill, decode = sides
    picture = noise(448, 448) if shown else None
    question = "What is in the picture, and where? " * 20
    begun = prefill.ask(question, picture, max_tokens=1, kv=PREFILL)
    transfer = begun["kv_transfer_params"]
    assert transfer["do_remote_prefill"]
    answer = decode.ask(question, picture, max_tokens=LENGTH, kv=json.dumps(transfer))
    alone = prefill.ask(question, picture, max_tokens=LENGTH)

    assert said(answer) == said(alone)
    assert said(answer).startswith(said(begun))
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert "kv_transfer_params" not in alone


def test_keys_and_values_are_those_that_came(sides: tuple[Side, Side]) -> None:
    """With those of another prompt of as many tokens the answer is another, so they are used."""
    prefill, decode = sides
    mine, others = ("Is there a red circle? " * 40, "Is there a blue square? " * 40)
    begun = prefill.ask(others, max_tokens=1, kv=PREFILL)
    tokens = begun["usage"]["prompt_tokens"]
    assert tokens == prefill.ask(mine, max_tokens=1)["usage"]["prompt_tokens"]
    mixed = decode.ask(mine, max_tokens=LENGTH, kv=json.dumps(begun["kv_transfer_params"]))
    assert said(mixed) != said(prefill.ask(mine, max_tokens=LENGTH))


@pytest.mark.parametrize("value", ["[1]", "{", 7])
def test_what_is_no_object_is_refused(sides: tuple[Side, Side], value: Any) -> None:
    with pytest.raises(InvalidValue) as error:
        sides[0].ask("Hello", max_tokens=1, kv=value)
    assert error.value.where == contract.KV_TRANSFER


def test_an_engine_that_cannot_refuses_it_by_name(echo_server: Server) -> None:
    with pytest.raises(UnknownField, match="the engine echo") as error:
        Side(echo_server, "chat_echo").ask("Hello", max_tokens=1, kv=PREFILL)
    assert error.value.where == contract.KV_TRANSFER
