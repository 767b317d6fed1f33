from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from triptych.chat.tokenizer import PromptTokenizer
from triptych.errors import ConfigurationError

TEXTS = [
    "",
    "How many red circles are there?",
    "  two  spaces,\ttab\r\nand lines\n\n",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n",
    "naïve café \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 中文 e\u0301 \x00 \u2028",
    "don't I'll WE'VE 1234567 3.14 <|im_start <|im_end|><|im_end|>",
]


@pytest.fixture(scope="module")
def hugging_face(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return PromptTokenizer(checkpoint)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(tokenizer, hugging_face, text):
    assert tokenizer.encode(text) == hugging_face.encode(text, add_special_tokens=False)


@given(st.text() | st.lists(st.sampled_from([*TEXTS, "<|image_pad|>", " "])).map("".join))
def test_ids_equal_those_of_transformers_for_any_text(tokenizer, hugging_face, text):
    assert tokenizer.encode(text) == hugging_face.encode(text, add_special_tokens=False)


def test_long_text_is_not_truncated(tokenizer):
    assert len(tokenizer.encode("a b " * 10_000)) >= 10_000


def test_token_ids(tokenizer, hugging_face):
    token = "<|image_pad|>"
    assert tokenizer.token_id(token) == hugging_face.convert_tokens_to_ids(token)
    with pytest.raises(ConfigurationError, match="no token '<nothing>'"):
        tokenizer.token_id("<nothing>")


def test_tokens_of_tokenizer_config_alone_are_added(checkpoint, tmp_path, hugging_face):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    first = len(hugging_face)
    config["added_tokens_decoder"][str(first)] = {
        "content": "<|extra|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    file.write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path).encode("a<|extra|>b")
    assert PromptTokenizer(tmp_path).encode("a<|extra|>b") == expected
    assert first in expected


@pytest.mark.parametrize(("content", "what"), [(None, "does not exist"), ("{}", "cannot be read")])
def test_a_broken_tokenizer_is_found_on_loading(tmp_path, content, what):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=what):
        PromptTokenizer(tmp_path)
