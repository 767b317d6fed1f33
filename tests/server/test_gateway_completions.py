"""Raw prompts through the gateway and a real tritonserver, by the official SDK."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from gateways import MODEL, before, events
from triptych.server import Server

pytestmark = pytest.mark.server

PROMPT = "Once there was a red circle."


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def test_a_prompt_goes_to_the_engine_as_it_is(sdk: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """The echo says back all that it was given: there is no template about it."""
    ids = tokenizer.encode(PROMPT).ids
    answer = sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    first, _, said = choice.text.partition("\n")
    assert said == PROMPT
    assert f"{len(ids)} tokens" in first
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)

    same = sdk.completions.create(model=MODEL, prompt=ids, max_tokens=100)
    assert same.choices[0].text == choice.text


def test_an_answer_has_sixteen_tokens_unless_more_are_asked_for(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt=PROMPT * 5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_answers_each(sdk: openai.OpenAI, stream: bool) -> None:
    prompts = ["first", "second one", "and the third"]
    options = {"model": MODEL, "prompt": prompts, "n": 2, "echo": True, "max_tokens": 50}
    if stream:
        chunks = list(
            sdk.completions.create(stream=True, stream_options={"include_usage": True}, **options)
        )
        texts = [""] * 6
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        usage = chunks[-1].usage
    else:
        answer = sdk.completions.create(**options)
        texts = [choice.text for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == list(range(6))
        usage = answer.usage
    expected = [prompt for prompt in prompts for _ in range(2)]
    assert all(text.startswith(f"{prompt}prompt: ") for text, prompt in zip(texts, expected))  # noqa: B905
    assert all(text.endswith(f"\n{prompt}") for text, prompt in zip(texts, expected))  # noqa: B905
    one = [sdk.completions.create(**{**options, "prompt": each, "n": 1}).usage for each in prompts]
    assert usage.prompt_tokens == sum(each.prompt_tokens for each in one)
    assert usage.completion_tokens == 2 * sum(each.completion_tokens for each in one)


def test_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt=PROMPT, logprobs=1, max_tokens=4)
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == choice.text
    starts = [len("".join(logprobs.tokens[:index])) for index in range(4)]
    assert logprobs.text_offset == starts
    assert logprobs.token_logprobs == [0.0] * 4
    assert logprobs.top_logprobs == [{token: 0.0} for token in logprobs.tokens]


def test_a_stream_is_events_and_done(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "stream": True, "stop": " red"}
    with http.stream("POST", "/v1/completions", json=body) as response:
        *found, done = events(response)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert done == "[DONE]"
    assert all(event["object"] == "text_completion" for event in found)
    assert not any("usage" in event for event in found)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(event["choices"][0]["text"] for event in found).endswith("there was a")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": [9999]}, "invalid_value", "prompt[0]"),
        ({"prompt": "a <|image_pad|>"}, "invalid_value", "prompt"),
        ({"prompt": PROMPT * 1000}, "context_too_long", "prompt"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 100_000}, "context_too_long", "max_tokens"),
        ({"suffix": "end"}, "unknown_field", "suffix"),
        ({"best_of": 2}, "invalid_value", "best_of"),
        ({"logit_bias": {"5": 1}}, "unknown_field", "logit_bias"),
        ({"extra_body": {"messages": []}}, "unknown_field", "messages"),
        ({"extra_body": {"promt": 1}}, "unknown_field", "promt"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "unknown_field",
         "response_format"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_the_sdks_exceptions(
    sdk: openai.OpenAI, stream: bool, options: dict, code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        sdk.completions.create(**{"model": MODEL, "prompt": PROMPT, "stream": stream, **options})
    assert (error.value.code, error.value.param) == (code, param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "param"),
    [([[1], [1, 9999]], "prompt[1][1]"), (["a", "b <|video_pad|>"], "prompt[1]")],
)
def test_one_bad_prompt_among_several_is_named(
    sdk: openai.OpenAI, stream: bool, prompt: list, param: str
) -> None:
    """A stream may have begun with another by then; the SDK raises an event with an error too."""
    with pytest.raises(openai.APIError) as error:
        list(sdk.completions.create(model=MODEL, prompt=prompt, stream=stream))
    assert (error.value.code, error.value.param) == ("invalid_value", param)


def test_a_prompt_that_is_a_placeholder_token_is_refused(
    sdk: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    with pytest.raises(openai.BadRequestError, match="stands for a medium") as error:
        sdk.completions.create(model=MODEL, prompt=[5, tokenizer.token_to_id("<|image_pad|>")])
    assert error.value.param == "prompt[1]"


@pytest.mark.engine
def test_vllm_goes_on_with_text_and_token_ids(vllm_server: Server, tokenizer: Tokenizer) -> None:
    """A chat's own prompt, written out, gets the chat's answer."""
    question = "Which colour is the background?"
    written = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    options = {"model": "chat_vllm", "temperature": 0, "max_tokens": 12}
    with (
        before(vllm_server) as gateway,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = client.chat.completions.create(
            messages=[{"role": "user", "content": question}], logprobs=True, **options
        )
        prompts = [tokenizer.encode(written).ids, tokenizer.encode(written).ids]
        ids = client.completions.create(prompt=prompts, logprobs=2, **options)
        stream = client.completions.create(prompt=written, stream=True, **options)
        streamed = "".join(chunk.choices[0].text for chunk in stream)
        for token in (
            "<|vision_start|>",
            "<|im_start|>",
        ):  # tokens that mean something to the model
            odd = client.completions.create(prompt=token, **options)
            assert odd.choices[0].finish_reason
            given = json.loads(json.dumps([tokenizer.token_to_id(token)] * 3))
            assert client.completions.create(prompt=given, **options).choices
    said = chat.choices[0].message.content
    assert streamed == said
    assert [choice.text for choice in ids.choices] == [said, said]
    logprobs = ids.choices[1].logprobs
    assert logprobs is not None
    expected = [entry.logprob for entry in chat.choices[0].logprobs.content]
    assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
