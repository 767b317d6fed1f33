from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from triptych.chat.chunks import Chunk, ChunkWriter, TokenLogprob, TopLogprob, Usage, decode
from triptych.contract import Prompt, PromptItem, Sampling


def prompt(*, stream=True, include_usage=True, items=(), **fields):
    return Prompt(
        id="chatcmpl-1",
        created=1_700_000_000,
        model="tiny",
        token_ids=[1, 2, 3],
        items=list(items),
        sampling=Sampling(max_tokens=5),
        stream=stream,
        include_usage=include_usage,
        **fields,
    )


def end(writer, reason="stop", **what):
    """All that ends an answer of two tokens."""
    return writer.end(reason, writer.count(2), **what)


def openai(data):
    """The chunk as OpenAI's own client types it, with nothing left over."""
    chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
    assert not chunk.model_extra
    return chunk


def test_a_stream():
    writer = ChunkWriter(prompt())
    first, second = openai(writer.delta("Thr")), openai(writer.delta("ee é"))
    last, usage = map(openai, end(writer))
    for chunk in (first, second, last, usage):
        assert (chunk.id, chunk.object) == ("chatcmpl-1", "chat.completion.chunk")
        assert (chunk.created, chunk.model) == (1_700_000_000, "tiny")
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "Thr")
    assert (second.choices[0].delta.role, second.choices[0].delta.content) == (None, "ee é")
    assert [chunk.choices[0].finish_reason for chunk in (first, second, last)] == [
        None,
        None,
        "stop",
    ]
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (3, 2)
    assert usage.usage.total_tokens == 5


def test_usage_is_null_until_the_last_chunk_and_absent_when_not_wanted():
    with_usage, without = ChunkWriter(prompt()), ChunkWriter(prompt(include_usage=False))
    assert json.loads(with_usage.delta("a"))["usage"] is None
    assert json.loads(end(with_usage)[0])["usage"] is None
    assert "usage" not in json.loads(without.delta("a"))
    assert ["usage" in json.loads(chunk) for chunk in end(without)] == [False]
    quiet = ChunkWriter(prompt(stream=False, include_usage=False))
    assert ["usage" in json.loads(chunk) for chunk in end(quiet, text="a")] == [False]


@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_may_come_with_the_reason_and_save_a_chunk(include_usage):
    writer = ChunkWriter(prompt(include_usage=include_usage, usage_with_finish=True))
    assert "usage" not in json.loads(writer.delta("a"))
    [last] = map(openai, end(writer))
    assert last.choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == 2


def test_the_last_text_may_come_with_the_reason():
    writer = ChunkWriter(prompt())
    writer.delta("a")
    choice = openai(end(writer, "length", text="b")[0]).choices[0]
    assert (choice.delta.content, choice.finish_reason) == ("b", "length")


def test_an_answer_without_text_still_has_its_role():
    choice = openai(end(ChunkWriter(prompt()))[0]).choices[0]
    assert (choice.delta.role, choice.delta.content) == ("assistant", "")


def test_a_whole_answer():
    [chunk] = map(openai, end(ChunkWriter(prompt(stream=False)), text="Three."))
    choice = chunk.choices[0]
    assert (choice.delta.role, choice.delta.content) == ("assistant", "Three.")
    assert choice.finish_reason == "stop"
    assert chunk.usage.total_tokens == 5


CALLS = """Well.
<tool_call>
{"name": "paint", "arguments": {"colour": "red"}}
</tool_call>
<tool_call>
{"name": "wash", "arguments": {}}
</tool_call>"""


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_of_tools_are_read_out_of_the_text(size):
    """OpenAI's clients put a call together by its index."""
    writer = ChunkWriter(prompt(tools=("paint", "wash")))
    pieces = [CALLS[start : start + size] for start in range(0, len(CALLS), size)]
    chunks = [openai(writer.delta(piece)) for piece in pieces]
    chunks.append(openai(end(writer)[0]))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls: dict[int, list[str]] = {}
    for call in (call for delta in deltas for call in delta.tool_calls or ()):
        if call.id:
            assert call.index not in calls
            assert call.type == "function"
            calls[call.index] = [call.function.name, ""]
        else:
            assert call.function.name is None
        calls[call.index][1] += call.function.arguments
    assert calls == {0: ["paint", '{"colour": "red"}'], 1: ["wash", "{}"]}
    assert "".join(delta.content or "" for delta in deltas) == "Well.\n"
    assert deltas[0].role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "reason", "said"),
    [
        ("Nothing to call.", "stop", "stop"),
        (CALLS[:70], "length", "length"),  # in the middle of the arguments
        (CALLS, "length", "length"),
    ],
)
def test_the_reason_tells_of_calls_only_where_they_end_the_answer(text, reason, said):
    writer = ChunkWriter(prompt(stream=False, tools=("paint", "wash")))
    [chunk] = map(openai, end(writer, reason, text=text))
    assert chunk.choices[0].finish_reason == said


def test_usage_counts_places_of_media():
    items = [
        PromptItem(modality="image", position=0, tokens=10, hash="a"),
        PromptItem(modality="image", position=1, tokens=5, hash="b"),
        PromptItem(modality="audio", position=2, tokens=7, hash="c"),
    ]
    usage = ChunkWriter(prompt(items=items)).count(3, cached_tokens=4)
    assert usage.prompt_tokens == 22
    assert usage.total_tokens == 25
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.video_tokens, details.audio_tokens) == (15, 0, 7)
    assert details.cached_tokens == 4


def test_logprobs():
    top = [TopLogprob.of("a", -0.1), TopLogprob.of("\ufffd", -math.inf, b"\xf0")]
    data = ChunkWriter(prompt()).delta("a", [TokenLogprob.of("a", -0.1, top)])
    entry = openai(data).choices[0].logprobs.content[0]
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.1, [97])
    assert entry.top_logprobs[1].logprob == -9999.0
    assert entry.top_logprobs[1].bytes == [0xF0]


@given(st.text(), st.integers(0, 10**6))
def test_chunks_come_back_from_their_json(text, count):
    writer = ChunkWriter(prompt(stream=False))
    [data] = writer.end("length", writer.count(count), text=text)
    chunk = decode(data)
    assert isinstance(chunk, Chunk)
    assert isinstance(chunk.usage, Usage)
    assert chunk.choices[0].delta.content == text
    assert chunk.usage.completion_tokens == count
    assert msgspec.json.encode(chunk) == data


def test_what_is_no_chunk_is_refused():
    with pytest.raises(msgspec.ValidationError, match="finish_reason"):
        decode(end(ChunkWriter(prompt()))[0].replace(b'"stop"', b'"tired"'))
