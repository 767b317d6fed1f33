"""The client repeats a few of the server's names, so that it need not have the server's package."""

from __future__ import annotations

import typing

import pytest

from contract.configs import ENSEMBLES, REPOSITORY
from triptych import contract
from triptych.chat import chunks
from triptych.chat.request import ChatRequest
from triptych.errors import BY_CODE, TriptychError
from triptych_client import answers, errors, messages, requests

SERVER = sorted(BY_CODE)


def test_tensors_have_the_same_names():
    assert requests.REQUEST == contract.REQUEST
    assert requests.REQUEST_TENSORS == contract.REQUEST_TENSORS
    assert requests.CHUNK == contract.CHUNK
    assert requests.ABORT == contract.ABORT


def test_the_model_asked_unless_told_otherwise_is_one_of_ours():
    assert requests.DEFAULT_MODEL in ENSEMBLES
    assert (REPOSITORY / requests.DEFAULT_MODEL).is_dir()


def test_only_the_connection_has_an_error_of_the_clients_own():
    assert set(errors.BY_CODE) - set(BY_CODE) == {errors.ConnectionFailed.code}


@pytest.mark.parametrize("code", SERVER)
def test_errors_are_the_servers(code):
    ours, theirs = errors.BY_CODE[code], BY_CODE[code]
    assert ours.http_status == theirs.http_status
    if theirs is not TriptychError:
        assert ours.__name__ == theirs.__name__
        bases = [base.code for base in theirs.__mro__ if issubclass(base, TriptychError)]
        assert bases == [
            base.code for base in ours.__mro__ if issubclass(base, errors.TriptychClientError)
        ]


@pytest.mark.parametrize("code", SERVER)
@pytest.mark.parametrize("where", ["", "messages[0].content[1].image_url.url"])
@pytest.mark.parametrize("front", ["", "in ensemble 'chat_vllm', "])
def test_errors_are_read_as_they_are_written(code, where, front):
    sent = BY_CODE[code]("got 9:\nat most 2 [of] them", where=where)
    read = errors.from_text(front + str(sent))
    assert (read.code, read.where, read.what) == (code, where, sent.what)


def test_sampling_names_are_fields_of_a_request():
    known = set(ChatRequest.__struct_fields__) | {"n", "max_completion_tokens", "stream_options"}
    assert set(typing.get_type_hints(requests.Sampling)) <= known


def test_roles_are_the_servers():
    roles = typing.get_args(typing.get_type_hints(messages.Message)["role"])
    assert set(roles) == {"system", "developer", "user", "assistant", "tool"}


@pytest.mark.parametrize("name", ["Usage", "PromptTokensDetails", "TokenLogprob", "TopLogprob"])
def test_structs_have_the_fields_of_a_chunk(name):
    ours, theirs = getattr(answers, name), getattr(chunks, name)
    assert set(ours.__struct_fields__) == set(theirs.__struct_fields__)
