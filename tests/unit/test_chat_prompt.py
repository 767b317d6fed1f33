from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.chat.prompt import MediumSize, PromptBuilder
from triptych.chat.request import parse
from triptych.contract import Sampling
from triptych.errors import (
    ConfigurationError,
    ContextTooLong,
    InvalidRequest,
    InvalidValue,
    UnsupportedMedium,
)

PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
LIMIT = 200
URLS = {"image": "image_url", "video": "video_url", "audio": "audio_url"}


def medium(modality="image"):
    return {"type": URLS[modality], URLS[modality]: {"url": "data:,"}}


def text(words="hi"):
    return {"type": "text", "text": words}


def request(*content, **fields):
    return parse(json.dumps({"messages": [{"role": "user", "content": content}], **fields}))


def sizes(*tokens):
    return [MediumSize(count, f"{index:x}") for index, count in enumerate(tokens)]


@pytest.fixture(scope="module")
def builder(checkpoint):
    return PromptBuilder(checkpoint, PLACEHOLDERS, max_model_len=LIMIT)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint with another template or generation_config."""

    def make(*, template=None, generation=None):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(checkpoint / name, tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return PromptBuilder(tmp_path, PLACEHOLDERS, max_model_len=LIMIT, model="named")

    return make


def build(builder, asked, *tokens):
    return builder.build(asked, builder.render(asked), sizes(*tokens))


def test_a_prompt_of_text(builder, checkpoint):
    prompt = build(builder, request(text("How many?"), stream=True, seed=3, stop="."))
    assert prompt.items == []
    assert prompt.length == len(prompt.token_ids) == len(prompt.expanded())
    assert prompt.model == checkpoint.name
    assert prompt.id.startswith("chatcmpl-")
    assert prompt.stream
    assert (prompt.sampling.seed, prompt.sampling.stop) == (3, (".",))
    assert prompt.sampling.max_tokens == LIMIT - prompt.length


def test_ids_are_unique(builder):
    asked = request(text())
    assert len({build(builder, asked).id for _ in range(100)}) == 100


def test_the_callers_model_is_repeated(builder):
    assert build(builder, request(text(), model="mine")).model == "mine"


def test_every_medium_has_one_placeholder(builder):
    asked = request(medium(), text("a"), medium("video"), medium(), text("b"))
    prompt = build(builder, asked, 4, 9, 1)
    assert [(item.modality, item.tokens, item.hash) for item in prompt.items] == [
        ("image", 4, "0"),
        ("video", 9, "1"),
        ("image", 1, "2"),
    ]
    ids = {item.modality: prompt.token_ids[item.position] for item in prompt.items}
    assert len(set(ids.values())) == 2
    expanded = prompt.expanded()
    assert (expanded.count(ids["image"]), expanded.count(ids["video"])) == (5, 9)
    assert prompt.length == len(expanded)
    assert prompt.sampling.max_tokens == LIMIT - len(expanded)


def test_items_follow_the_prompt_where_the_template_moves_media(copy):
    builder = copy(
        template="{% for message in messages %}{% for kind in ['video', 'image', 'text'] %}"
        "{% for part in message.content | selectattr('type', 'equalto', kind) %}"
        "{{ part.text if kind == 'text' else '<|' ~ kind ~ '_pad|>' }}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    asked = request(medium(), text("a"), medium("video"), medium())
    prompt = build(builder, asked, 4, 9, 1)
    assert [item.hash for item in prompt.items] == ["1", "0", "2"]
    assert [item.position for item in prompt.items] == [0, 1, 2]
    assert [slot.medium for slot in builder.render(asked).slots] == [1, 0, 2]


def test_a_template_that_drops_media_is_refused(copy):
    builder = copy(
        template="{% for message in messages %}"
        "{{ '<|image_pad|>' if message.content[0].type == 'image' }}"
        "{{ message.content if message.content is string else message.content[-1].text }}"
        "{% endfor %}"
    )
    builder.render(request(medium(), text()))
    with pytest.raises(InvalidRequest, match="0 places for 1 media of kind image"):
        builder.render(request(text(), medium(), text()))


@pytest.mark.parametrize("token", PLACEHOLDERS.values())
@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"content": "see {}"}, "messages[1].content"),
        ({"content": [text(), text("{}!")]}, "messages[1].content[1].text"),
        ({"content": "hi", "name": "{}"}, "messages[1].name"),
        ({"content": "{}", "role": "system"}, "messages[1].content"),
    ],
)
def test_text_cannot_forge_a_medium(builder, token, message, where):
    forged = json.loads(json.dumps({"role": "user", **message}).replace("{}", token))
    asked = parse(json.dumps({"messages": [{"role": "user", "content": "a"}, forged]}))
    with pytest.raises(InvalidValue) as error:
        builder.render(asked)
    assert error.value.where == where
    assert token in error.value.what


def test_a_medium_cannot_be_forged_in_two_halves(builder):
    with pytest.raises(InvalidRequest, match="1 places for 0 media"):
        builder.render(request(text("<|image_"), text("pad|>")))


def test_a_modality_that_the_model_does_not_take(builder):
    with pytest.raises(UnsupportedMedium, match="takes no audio; it takes image, video") as error:
        builder.render(request(medium(), medium("audio")))
    assert error.value.where == "messages[0].content[1].audio_url.url"


def test_a_refusal_names_the_family_and_the_reason(checkpoint):
    builder = PromptBuilder(
        checkpoint,
        {"video": PLACEHOLDERS["video"]},
        max_model_len=LIMIT,
        family="A-VL",
        unserved={"image": "no engine serves them"},
    )
    with pytest.raises(UnsupportedMedium, match=r"A-VL takes no image; it takes video: no engine"):
        builder.render(request(medium()))
    with pytest.raises(UnsupportedMedium, match=r"A-VL takes no audio; it takes video$"):
        builder.render(request(medium("audio")))


def test_a_prompt_that_fills_the_context(builder):
    with pytest.raises(ContextTooLong, match=rf"the prompt has \d+ tokens, .* is {LIMIT}") as error:
        builder.render(request(text("a b c " * LIMIT)))
    assert error.value.where == "messages"


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_context_is_counted_to_the_token(builder, over):
    asked = request(medium(), text())
    tokens = LIMIT - build(builder, asked, 1).length + over
    if over < 0:
        prompt = build(builder, asked, tokens + 1)
        assert (prompt.length, prompt.sampling.max_tokens) == (LIMIT - 1, 1)
        return
    with pytest.raises(ContextTooLong) as error:
        build(builder, asked, tokens + 1)
    assert error.value.what == (
        f"the prompt has {LIMIT + over} tokens ({tokens + 1} of them for media), and with at "
        f"least 1 token of answer the limit is {LIMIT}"
    )


def test_max_tokens_must_fit(builder):
    length = build(builder, request(medium(), text()), 10).length
    rest = LIMIT - length
    fits = build(builder, request(medium(), text(), max_tokens=rest), 10)
    assert fits.sampling.max_tokens == rest
    with pytest.raises(ContextTooLong) as error:
        build(builder, request(medium(), text(), max_completion_tokens=rest + 1), 10)
    assert error.value.where == "max_tokens"
    for number in (rest + 1, length, 10, rest, LIMIT):
        assert str(number) in error.value.what


def test_a_request_that_gives_nothing_is_sampled_as_the_checkpoint_says(copy):
    builder = copy(
        generation={
            "temperature": 0.1,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": None,
            "repetition_penalty": 1.05,
            "max_new_tokens": 50,
            "do_sample": True,
            "eos_token_id": [1, 2],
        }
    )
    assert build(builder, request(text())).sampling == Sampling(
        max_tokens=50, temperature=0.1, top_p=0.9, top_k=20, repetition_penalty=1.05
    )
    given = {"temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": 1, "max_tokens": 60}
    assert build(builder, request(text(), **given)).sampling == Sampling(
        max_tokens=60, temperature=0.0
    )


def test_the_defaults_without_generation_config(copy):
    assert build(copy(), request(text(), max_tokens=5)).sampling == Sampling(max_tokens=5)


def test_do_sample_false_is_greedy(copy):
    builder = copy(generation={"do_sample": False})
    assert build(builder, request(text())).sampling.temperature == 0
    assert build(builder, request(text(), temperature=0.5)).sampling.temperature == 0.5


@pytest.mark.parametrize("generation", [{"temperature": -1}, {"top_p": 0}, {"top_k": "x"}, []])
def test_a_broken_generation_config_is_found_on_loading(copy, generation):
    with pytest.raises(ConfigurationError, match=r"generation_config\.json"):
        copy(generation=generation)


def test_a_placeholder_that_the_tokenizer_has_not(checkpoint):
    with pytest.raises(ConfigurationError, match="no token '<image>'"):
        PromptBuilder(checkpoint, {"image": "<image>"}, max_model_len=LIMIT)


@given(st.lists(st.sampled_from(["image", "video", "text"]), min_size=1, max_size=8), st.data())
def test_what_is_expanded_is_what_the_media_take(builder, kinds, data):
    asked = request(*(text() if kind == "text" else medium(kind) for kind in kinds))
    counts = [data.draw(st.integers(1, 12)) for kind in kinds if kind != "text"]
    prompt = build(builder, asked, *counts)
    assert [item.tokens for item in prompt.items] == counts
    assert len(prompt.expanded()) == prompt.length
    assert prompt.length + prompt.sampling.max_tokens == LIMIT
