"""The whole hostile corpus through a real ensemble: named errors, nothing dies, nothing grows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from queue import Empty, Queue

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

import hostile
from media_files import data_uri, jpeg
from triptych.errors import TriptychError

pytestmark = pytest.mark.server
ANSWERED = "answered"
Ask = Callable[[dict], str]


@pytest.fixture
def ask(echo_server):
    """Send a part; the error's code comes back, or that there was an answer."""
    client = triton.InferenceServerClient(f"127.0.0.1:{echo_server.grpc_port}")
    results: Queue[tuple[object, Exception | None]] = Queue()
    client.start_stream(callback=lambda result, error: results.put((result, error)))

    def send(part: dict) -> str:
        content = [{"type": "text", "text": "What?"}, part]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        tensor = triton.InferInput("REQUEST", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([json.dumps(body).encode()], object))
        client.async_stream_infer("chat_echo", [tensor], enable_empty_final_response=True)
        code = ANSWERED
        while True:
            result, error = results.get(timeout=60)
            if error is not None:
                return TriptychError.parse(str(error)).code
            if result.get_response().parameters["triton_final_response"].bool_param:
                return code

    yield send
    client.stop_stream()
    client.close()
    with pytest.raises(Empty):
        results.get_nowait()


def processes(server) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def memory(server) -> int:
    return sum(process.memory_info().rss for process in processes(server))


def send_all(ask: Ask) -> tuple[Counter[str], list[str]]:
    codes: Counter[str] = Counter()
    wrong = []
    for case in hostile.corpus():
        code = ask(case.part)
        codes[code] += 1
        right = case.codes | {"unsupported_medium"} | ({ANSWERED} if case.harmless else set())
        if code not in right:
            wrong.append(f"{case.name}: {code}")
    return codes, wrong


@pytest.mark.timeout(600)
def test_every_answer_is_right_and_nothing_is_harmed(echo_server, ask):
    good = hostile.part("image_url", data_uri(jpeg(100, 100), "image/jpeg"))
    assert ask(good) == ANSWERED
    codes, wrong = send_all(ask)
    assert not wrong, "\n".join(wrong)
    assert codes.total() >= 1_000
    send_all(ask)  # workers keep what a picture took, up to a bound, and each has met them all now
    alive, before = sorted(p.pid for p in processes(echo_server)), memory(echo_server)
    send_all(ask)
    assert sorted(p.pid for p in processes(echo_server)) == alive
    assert memory(echo_server) - before < 200 << 20
    assert ask(good) == ANSWERED
