from __future__ import annotations

import pytest

from triptych.errors import ConfigurationError, MediaForbidden
from triptych.server.log import StartLog

STAMP = "1123 16:23:13.906842 6994"
FAILED = (
    f"E{STAMP} model_lifecycle.cc:642] \"failed to load 'preprocess' version 1: Internal: "
    'TritonModelException: {reason}\\n\\nAt:\\n  /models/preprocess/1/model.py(7): initialize\\n"'
)


@pytest.fixture
def changes():
    return []


@pytest.fixture
def log(changes):
    return StartLog(lambda log: changes.append((set(log.loading), set(log.loaded))), keep=20)


def test_it_follows_models_as_they_load(log, changes):
    log.feed(f'I{STAMP} model_lifecycle.cc:472] "loading: encoder:1"')
    log.feed(f'I{STAMP} model_lifecycle.cc:472] "loading: decode_vllm:1"')
    log.feed(f"I{STAMP} model_lifecycle.cc:839] \"successfully loaded 'encoder'\"")
    assert changes[-1] == ({"decode_vllm"}, {"encoder"})
    assert log.loaded["encoder"] >= 0
    assert log.failure is None


def test_older_releases_do_not_quote(log):
    log.feed(f"I{STAMP} model_lifecycle.cc:472] loading: encoder:1")
    log.feed(f"I{STAMP} model_lifecycle.cc:839] successfully loaded 'encoder'")
    assert set(log.loaded) == {"encoder"}


def test_a_stages_own_error_is_the_reason(log):
    log.feed(FAILED.format(reason="[configuration] no model: set TRIPTYCH_MODEL"))
    assert isinstance(log.failure, ConfigurationError)
    assert (
        str(log.failure)
        == "[configuration] the model 'preprocess' did not load: no model: set TRIPTYCH_MODEL"
    )


def test_who_makes_an_environment_that_is_not_there_is_told(log):
    log.feed(
        f"E{STAMP} model_lifecycle.cc:642] \"failed to load 'decode_sglang' version 1: Internal: "
        'Failed to get the canonical path for /a/.venvs/sglang."'
    )
    assert log.failure is not None
    assert log.failure.what == (
        "the model 'decode_sglang' did not load: there is no /a/.venvs/sglang; "
        "scripts/setup --engine sglang makes it"
    )


def test_the_errors_class_and_place_are_kept(log):
    log.feed(FAILED.format(reason="[media_forbidden] a.b: no such folder"))
    assert isinstance(log.failure, MediaForbidden)
    assert log.failure.where == "a.b"


def test_another_error_comes_with_its_place_and_without_traceback(log):
    log.feed(FAILED.format(reason='ValueError: boom \\"quoted\\"'))
    assert log.failure is not None
    assert 'boom "quoted"' in log.failure.what
    assert log.failure.what.endswith("(at /models/preprocess/1/model.py(7): initialize)")


def test_the_first_failure_is_the_cause(log):
    log.feed(FAILED.format(reason="[configuration] first"))
    log.feed("error: creating server: Invalid argument - load failed for model 'chat_vllm'")
    assert "first" in str(log.failure)


def test_a_server_that_refuses_to_start_says_why(log):
    log.feed("error: creating server: Internal - failed to open /nowhere")
    assert "failed to open /nowhere" in str(log.failure)


def test_the_tail_has_no_tables(log):
    for line in ("I one", "+---+", "| a |", "", "E two"):
        log.feed(line)
    assert log.tail() == "I one\nE two"
    assert log.tail(1) == "E two"


def test_a_machine_without_a_gpu_is_no_error(log):
    log.feed(f'E{STAMP} server.cc:241] "CudaDriverHelper has not been initialized."')
    log.feed(f"E{STAMP} http_server.cc:1] \"Socket '127.0.0.1:1' already in use\"")
    assert log.errors() == ["Socket '127.0.0.1:1' already in use"]
