"""OpenAI's forms of an answer, and what is asked of Triton for them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from triptych.chat import chunks
from triptych.chat.chunks import Stages
from triptych.errors import InvalidRequest
from triptych.gateway import asked, prompts
from triptych.gateway.answers import ChatForm, Form, TextForm
from triptych_client.answers import Chunk, read_chunk


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def completion(**fields: Any) -> TextForm:
    return TextForm(prompts.read(body(**{"prompt": "Once", **fields})))


def chat(**fields: Any) -> ChatForm:
    return ChatForm(asked.read(body(messages=[], **fields)))


def piece(text: str = "", *, answer: int = 0, tokens: int = 0, **choice: Any) -> Chunk:
    """A chunk as the stages write it; with ``tokens`` the answer's last."""
    usage: Any = msgspec.UNSET
    if tokens:
        details = chunks.PromptTokensDetails(cached_tokens=1, image_tokens=2)
        usage = chunks.Usage(5, tokens, 5 + tokens, details)
    written = chunks.Chunk(
        id=f"id-{answer}",
        created=answer,
        model="m",
        choices=[chunks.Choice(chunks.Delta(content=text), **choice)],
        usage=usage,
        triptych=Stages(1, 2, 3, 4, 1, 0) if tokens else msgspec.UNSET,
    )
    return read_chunk(msgspec.json.encode(written))


def end(text: str = "", *, answer: int = 0, tokens: int = 3) -> Chunk:
    return piece(text, answer=answer, tokens=tokens, finish_reason="stop")


def whole(form: Form, *pieces: Chunk) -> dict[str, Any]:
    return dict(json.loads(form.whole([chunks.decode(each.json) for each in pieces])))


def logprobs(*tokens: str) -> chunks.ChoiceLogprobs:
    top = [chunks.TopLogprob.of("x", -0.5)]
    return chunks.ChoiceLogprobs([chunks.TokenLogprob.of(token, -1.0, top) for token in tokens])


# Chats.


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_stream_of_chats(n: int, wanted: bool) -> None:
    form = chat(stream=True, n=n, stream_options={"include_usage": wanted})
    told = [form.piece(answer, piece("a", answer=answer)) for answer in range(n)]
    told += [form.piece(answer, end("b", answer=answer)) for answer in range(n)]
    read = [ChatCompletionChunk.model_validate_json(each, strict=True) for each in told]
    assert {chunk.id for chunk in read} == {"id-0"}
    assert [chunk.choices[0].index for chunk in read] == [*range(n), *range(n)]
    assert all(("usage" in json.loads(each)) is wanted for each in told)
    assert not any("triptych" in json.loads(each) for each in told)
    last = json.loads(form.last())
    assert (last["id"], last["choices"]) == ("id-0", [])
    assert last["usage"]["prompt_tokens"] == 5
    assert last["usage"]["completion_tokens"] == 3 * n
    assert ("triptych" in last) is (n == 1)
    assert form.usage is not None
    assert form.usage.prompt_tokens_details == chunks.PromptTokensDetails(1, 2)


def test_a_piece_in_which_nothing_changes_goes_on_as_it_came() -> None:
    given = piece("a")
    assert chat(stream=True).piece(0, given) is given.json


def test_a_whole_chat_with_calls() -> None:
    call = chunks.ToolCallDelta(0, chunks.FunctionDelta("f", '{"a": 1}'), "call_1", "function")
    written = chunks.Chunk(
        id="i",
        created=1,
        model="m",
        choices=[
            chunks.Choice(
                chunks.Delta("assistant", "", tool_calls=[call]), finish_reason="tool_calls"
            )
        ],
        usage=chunks.Usage(1, 2, 3),
    )
    told = whole(chat(), read_chunk(msgspec.json.encode(written)))
    choice = ChatCompletion.model_validate(told).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [read] = choice.message.tool_calls or []
    assert (read.id, read.function.name, read.function.arguments) == ("call_1", "f", '{"a": 1}')
    assert "tool_calls" not in whole(chat(), end("a"))["choices"][0]["message"]


# Completions.


def test_a_whole_completion_of_several_prompts() -> None:
    form = completion(prompt=["Once", "Twice"], n=2, echo=True)
    told = whole(form, *(end(f" {number}", answer=number) for number in range(4)))
    read = Completion.model_validate(told, strict=True)
    assert read.object == "text_completion"
    assert [choice.text for choice in read.choices] == ["Once 0", "Once 1", "Twice 2", "Twice 3"]
    assert [choice.index for choice in read.choices] == [0, 1, 2, 3]
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (10, 12)
    assert read.usage.prompt_tokens_details.image_tokens == 4


@pytest.mark.parametrize("wanted", [True, False])
def test_a_stream_of_completions(wanted: bool) -> None:
    form = completion(stream=True, echo=True, stream_options={"include_usage": wanted})
    told = [form.piece(0, piece(" a")), form.piece(0, end(" b"))]
    assert [json.loads(each)["choices"][0]["text"] for each in told] == ["Once a", " b"]
    assert all(("usage" in json.loads(each)) is wanted for each in told)
    last = Completion.model_validate_json(form.last(), strict=True)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_logprobs_in_the_form_of_completions() -> None:
    form = completion(stream=True, logprobs=1)
    form.piece(0, piece("ab", logprobs=logprobs("a", "b")))
    told = json.loads(form.piece(0, piece("ccd", logprobs=logprobs("cc", "d"))))
    assert told["choices"][0]["logprobs"] == {
        "tokens": ["cc", "d"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"x": -0.5, "cc": -1.0}, {"x": -0.5, "d": -1.0}],
        "text_offset": [2, 4],
    }


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("Once", ["Once"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: object, sent: list) -> None:
    found = prompts.read(body(prompt=prompt, n=2, seed=5, top_p=0.5, echo=False, suffix=None))
    bodies = [json.loads(each) for each in found.bodies]
    assert [each["prompt"] for each in bodies] == [each for each in sent for _ in range(2)]
    assert [each["seed"] for each in bodies] == [5, 6] * len(sent)
    assert bodies[0] == {
        "model": "m", "prompt": sent[0], "n": 1, "seed": 5, "top_p": 0.5, "max_tokens": 16
    }  # fmt: skip


def test_what_a_completion_asks_of_the_stages() -> None:
    [sent] = prompts.read(body(prompt="a", logprobs=0, best_of=1, stream=True, stop=["x"])).bodies
    assert json.loads(sent) == {
        "model": "m",
        "prompt": "a",
        "logprobs": True,
        "top_logprobs": 0,
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"usage_with_finish": True},
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": [1], "echo": True}, "echo"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"prompt": "a", "top_logprobs": 1}, "top_logprobs"),
        ({"prompt": "a", "model": None}, "model"),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(fields: dict, where: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        prompts.read(body(**fields))
    assert error.value.where == where
