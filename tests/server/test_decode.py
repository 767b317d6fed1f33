"""The stage decode in a real tritonserver, asked without the stages before it."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conftest import ServerFactory
from engine_contract import about_a_picture, words
from generations import changed, generation
from triptych import contract, families
from triptych.chat import chunks
from triptych.contract import Prompt, Ticket
from triptych.engines.base import Media
from triptych.engines.echo import checksum
from triptych.errors import Cancelled, InvalidRequest, InvalidValue, TriptychError
from triptych.families import Family
from triptych.server import Server
from triton_inputs import array_input, bytes_input

pytestmark = pytest.mark.server

DELAY_S = 0.02
"""Between the tokens of the slow server."""


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return families.load(checkpoint)


@pytest.fixture(scope="module")
def slow_server(start_server: ServerFactory) -> Server:
    return start_server("echo", echo_token_delay_s=DELAY_S)


class Stream:
    """One gRPC stream to a ``decode_*`` model; responses by request id, with their times."""

    def __init__(self, server: Server, model: str) -> None:
        self._client = triton.InferenceServerClient(f"localhost:{server.grpc_port}")
        self._model = model
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def ask(self, prompt: Prompt, media: Media = (), request_id: str = "", **options: Any) -> None:
        self._client.async_stream_infer(
            self._model,
            inputs(prompt, media),
            request_id=request_id,
            enable_empty_final_response=True,
            **options,
        )

    def abort(self, request_id: str) -> None:
        self._client.async_stream_infer(
            self._model, [], request_id="the abort", parameters={contract.ABORT: request_id}
        )

    def next(self) -> tuple[Any, Any]:
        """(response, error) of the next message."""
        return self._answers.get(timeout=10)

    def collect(self) -> list[Any]:
        """The responses up to the final one.

        Raises:
            TriptychError: What the server answers with.
        """
        responses = []
        while True:
            result, error = self.next()
            if error is not None:
                raise TriptychError.parse(error.message())
            responses.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return responses

    def close(self, *, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def inputs(prompt: Prompt, media: Media) -> list[Any]:
    offset, items, parts = 0, [], []
    for item, tensor in media:
        items.append(msgspec.structs.replace(item, offset=offset))
        data = tensor.numpy().tobytes()
        parts.append(data.ljust(contract.aligned(len(data)), b"\0"))
        offset += len(parts[-1])
    embeddings = np.frombuffer(b"".join(parts), np.uint8)[None]
    return [
        bytes_input(contract.PROMPT, contract.encode(prompt), (1,)),
        bytes_input(contract.TICKET, contract.encode(Ticket(items)), (1, 1)),
        array_input(contract.EMBEDDINGS, embeddings, "UINT8"),
    ]


def element(response: Any, name: str) -> bytes:
    return bytes(response.as_numpy(name).reshape(-1)[0])


def text(responses: Sequence[Any]) -> str:
    return b"".join(element(response, contract.TEXT) for response in responses).decode()


def streamed(family: Family, repeats: int = 1, **sampling: Any) -> tuple[Prompt, Media]:
    prompt, media = generation(family, words(family) * repeats, max_tokens=4000, **sampling)
    return msgspec.structs.replace(prompt, stream=True), media


@pytest.fixture
def stream(echo_server: Server) -> Iterator[Stream]:
    stream = Stream(echo_server, "decode_echo")
    yield stream
    stream.close()


@pytest.fixture
def slow(slow_server: Server) -> Iterator[Stream]:
    stream = Stream(slow_server, "decode_echo")
    yield stream
    stream.close()


def test_text_and_chunks_say_the_same(stream: Stream, family: Family) -> None:
    prompt, media = streamed(family, 3)
    stream.ask(prompt, media)
    responses = stream.collect()
    said = [chunks.decode(element(response, contract.CHUNK)) for response in responses]

    assert "".join(c.choices[0].delta.content or "" for c in said[:-1]) == text(responses)
    assert [c.choices[0].finish_reason for c in said[:-1]][-1] == "stop"
    assert said[-1].choices == []
    assert isinstance(said[-1].usage, chunks.Usage)
    assert said[-1].usage.prompt_tokens == prompt.length
    assert {c.id for c in said} == {prompt.id}


@pytest.mark.parametrize("name", [contract.TEXT, contract.CHUNK])
def test_only_what_was_asked_for_is_sent(stream: Stream, family: Family, name: str) -> None:
    prompt, media = streamed(family)
    stream.ask(prompt, media, outputs=[triton.InferRequestedOutput(name)])
    for response in stream.collect():
        assert [output.name for output in response.get_response().outputs] == [name]


@pytest.mark.parametrize("name", [contract.TEXT, contract.CHUNK])
def test_only_what_is_read_is_sent_where_an_ensemble_asks_for_all(
    stream: Stream, family: Family, name: str
) -> None:
    prompt, media = streamed(family)
    stream.ask(prompt, media, parameters={contract.OUTPUTS: name})
    for response in stream.collect():
        assert [output.name for output in response.get_response().outputs] == [name]


def test_outputs_that_there_are_not_are_refused_by_name(stream: Stream, family: Family) -> None:
    prompt, media = streamed(family)
    stream.ask(prompt, media, parameters={contract.OUTPUTS: "CHONK"})
    with pytest.raises(InvalidValue, match="CHUNK, TEXT: 'CHONK'") as error:
        stream.collect()
    assert error.value.where == contract.OUTPUTS


def test_without_stream_there_is_one_response(stream: Stream, family: Family) -> None:
    prompt, media = about_a_picture(family, max_tokens=4000)
    stream.ask(prompt, media)
    [response] = stream.collect()
    chunk = chunks.decode(element(response, contract.CHUNK))

    assert chunk.choices[0].delta.content == element(response, contract.TEXT).decode()
    assert chunk.choices[0].finish_reason == "stop"
    assert isinstance(chunk.usage, chunks.Usage)
    assert f"crc32 {checksum(media[0][1]):08x}" in text([response])


def test_each_request_has_its_own_embeddings(slow: Stream, family: Family) -> None:
    cases = [about_a_picture(family, seed, max_tokens=12) for seed in range(24)]
    for number, (prompt, media) in enumerate(cases):
        slow.ask(prompt, media, request_id=str(number))
    answers = {}
    while len(answers) < len(cases):
        result, error = slow.next()
        assert error is None
        if result.get_response().outputs:
            answers[int(result.get_response().id)] = element(result, contract.TEXT).decode()
    for number, (_, media) in enumerate(cases):
        assert f"crc32 {checksum(media[0][1]):08x}" in answers[number]


def test_the_first_token_comes_at_once(slow: Stream, family: Family) -> None:
    prompt, media = streamed(family)
    begun = time.monotonic()
    slow.ask(prompt, media)
    result, error = slow.next()
    first = time.monotonic() - begun
    slow.collect()
    whole = time.monotonic() - begun

    assert error is None
    assert element(result, contract.TEXT) == b"prompt:"
    assert first < DELAY_S + 0.1 < whole


def test_what_piles_up_is_merged(stream: Stream, family: Family) -> None:
    prompt, media = streamed(family, 100)
    stream.ask(prompt, media, outputs=[triton.InferRequestedOutput(contract.TEXT)])
    responses = stream.collect()
    tokens = len(text(responses).split())
    assert tokens > 1000
    assert len(responses) < tokens / 2


def test_streams_side_by_side(stream: Stream, family: Family) -> None:
    prompts = {str(number): streamed(family, 1 + number) for number in range(16)}
    for request_id, (prompt, media) in prompts.items():
        stream.ask(prompt, media, request_id=request_id)
    said: dict[str, list[Any]] = {request_id: [] for request_id in prompts}
    open_ids = set(prompts)
    while open_ids:
        result, error = stream.next()
        assert error is None
        response = result.get_response()
        said[response.id].append(result)
        if response.parameters["triton_final_response"].bool_param:
            open_ids.remove(response.id)
    for request_id, (prompt, _) in prompts.items():
        assert text(said[request_id]).startswith(f"prompt: {prompt.length} tokens")


def test_abort_ends_a_generation(slow: Stream, slow_server: Server, family: Family) -> None:
    prompt, media = streamed(family, 50)
    slow.ask(prompt, media, request_id="mine")
    slow.next()
    other = Stream(slow_server, "decode_echo")
    begun = time.monotonic()
    other.abort("mine")
    result, error = other.next()
    assert error is None
    assert element(result, contract.TEXT) == element(result, contract.CHUNK) == b""
    with pytest.raises(Cancelled):
        slow.collect()
    assert time.monotonic() - begun < 0.5
    other.close()


def test_abort_before_the_generation_arrives(slow: Stream, family: Family) -> None:
    slow.abort("early")
    assert slow.next()[1] is None
    slow.ask(*streamed(family), request_id="early")
    with pytest.raises(Cancelled):
        slow.collect()


def test_abort_by_http_needs_no_inputs(echo_server: Server) -> None:
    url = f"http://localhost:{echo_server.http_port}/v2/models/decode_echo/generate"
    answer = httpx.post(url, json={contract.ABORT: "nobody"})
    assert answer.status_code == 200
    assert answer.json()["TEXT"] == ""


def test_a_caller_who_goes_away_frees_the_slot(start_server: ServerFactory, family: Family) -> None:
    server = start_server("echo", echo_token_delay_s=DELAY_S, max_num_seqs=1)
    going, staying = Stream(server, "decode_echo"), Stream(server, "decode_echo")
    going.ask(*streamed(family, 100))
    going.next()
    staying.ask(*streamed(family))
    begun = time.monotonic()
    going.close(cancel=True)
    assert text(staying.collect())
    assert time.monotonic() - begun < 5, "the slot was held until the end"
    staying.close()
    server.stop()


def test_many_who_go_away_leave_a_server_that_serves(slow_server: Server, family: Family) -> None:
    for _ in range(8):
        stream = Stream(slow_server, "decode_echo")
        for _ in range(8):
            stream.ask(*streamed(family, 50))
        stream.next()
        stream.close(cancel=True)
    stream = Stream(slow_server, "decode_echo")
    stream.ask(*streamed(family))
    assert text(stream.collect())
    stream.close()


def faulty(family: Family) -> dict[str, tuple[list[Any], type[TriptychError], str]]:
    prompt, media = about_a_picture(family)
    good = inputs(prompt, media)
    [item] = [msgspec.structs.replace(item, offset=0) for item, _ in media]

    def ticket(**fields: Any) -> list[Any]:
        wrong = contract.encode(Ticket([msgspec.structs.replace(item, **fields)]))
        return [good[0], bytes_input(contract.TICKET, wrong, (1, 1)), good[2]]

    return {
        "no inputs": ([], InvalidValue, "PROMPT"),
        "broken prompt": ([bytes_input("PROMPT", b"{", (1,)), *good[1:]], InvalidValue, "PROMPT"),
        "not a prompt": ([bytes_input("PROMPT", b"{}", (1,)), *good[1:]], InvalidValue, "id"),
        "no ticket": ([good[0]], InvalidValue, "TICKET"),
        "no embeddings": (good[:2], InvalidValue, "EMBEDDINGS"),
        "by nixl": (ticket(where="nixl"), InvalidValue, "nixl"),
        "beyond the end": (ticket(offset=1 << 20), InvalidValue, "bytes 1048576"),
        "before the start": (ticket(offset=-64), InvalidValue, "bytes -64"),
        "not aligned": (ticket(offset=4, shape=(1, 4)), InvalidValue, "multiple of 64"),
        "another shape": (ticket(shape=(6, 192)), InvalidValue, "items[0]"),
        "no grid": (ticket(grid_thw=None), InvalidValue, "image_grid_thw"),
    }


FAULTS = [
    *("no inputs", "broken prompt", "not a prompt", "no ticket", "no embeddings", "by nixl"),
    *("beyond the end", "before the start", "not aligned", "another shape", "no grid"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_requests_are_refused_by_name(
    echo_server: Server, family: Family, stream: Stream, fault: str
) -> None:
    sent, expected, named = faulty(family)[fault]
    client = triton.InferenceServerClient(f"localhost:{echo_server.grpc_port}")
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put(error))
    client.async_stream_infer("decode_echo", sent)
    error = answers.get(timeout=10)
    client.stop_stream()

    assert isinstance(error, InferenceServerException)
    parsed = TriptychError.parse(error.message())
    assert type(parsed) is expected
    assert named in str(parsed)
    stream.ask(*about_a_picture(family))
    assert stream.collect()


class TestVllm:
    @pytest.fixture
    def vllm(self, vllm_server: Server) -> Iterator[Stream]:
        stream = Stream(vllm_server, "decode_vllm")
        yield stream
        stream.close()

    def test_streams(self, vllm: Stream, family: Family) -> None:
        prompt, media = streamed(family, temperature=2.0, seed=3)
        vllm.ask(prompt, media)
        responses = vllm.collect()
        again = msgspec.structs.replace(changed(prompt), stream=False)
        vllm.ask(again, media)
        [whole] = vllm.collect()
        assert text(responses) == text([whole])
        assert len(responses) > 1

    def test_abort(self, vllm: Stream, family: Family) -> None:
        prompt, media = streamed(family, temperature=2.0, stop=("never said",))
        for _ in range(20):
            vllm.ask(changed(prompt), media, request_id="mine")
        vllm.abort("mine")
        ended = 0
        while ended < 20:
            result, error = vllm.next()
            if error is not None:
                assert isinstance(TriptychError.parse(error.message()), Cancelled | InvalidRequest)
                ended += 1
            elif (
                result.get_response().id == "mine"
                and result.get_response().parameters["triton_final_response"].bool_param
            ):
                ended += 1
        vllm.ask(*streamed(family))
        assert vllm.collect()


def test_the_engine_dies_with_its_stub(start_server: ServerFactory) -> None:
    server = start_server("vllm")
    engine, stub = engine_and_stub(server)
    os.kill(stub, signal.SIGKILL)
    wait_for_end(engine)
    server.stop()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"the process {pid} lives on"
        time.sleep(0.05)


def engine_and_stub(server: Server) -> tuple[int, int]:
    """Process ids of vLLM's engine and of the stub that started it."""
    for process in psutil.Process(server.pid).children(recursive=True):
        if "EngineCore" in " ".join(process.cmdline()) + process.name():
            return process.pid, process.ppid()
    raise AssertionError("no engine is running")
