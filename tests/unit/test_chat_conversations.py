"""Conversations by name, and templates that a person chooses."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from triptych.chat.conversations import CONVERSATIONS
from triptych.chat.messages import Message
from triptych.chat.prompt import PromptBuilder
from triptych.chat.request import parse
from triptych.chat.template import ChatTemplate
from triptych.errors import ConfigurationError

PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def messages(*turns: object) -> list[Message]:
    return parse(msgspec.json.encode({"messages": turns})).messages


def test_a_conversation_is_written_as_its_name_says(checkpoint: Path) -> None:
    asked = messages({"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]})
    assert ChatTemplate(checkpoint, PLACEHOLDERS, "qwen2-vl").render(asked) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_file_takes_the_place_of_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<|image_pad|>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}!"
    )
    asked = messages({"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]})
    assert ChatTemplate(checkpoint, PLACEHOLDERS, str(file)).render(asked) == "<|image_pad|>What?!"


@pytest.mark.parametrize("name", ["vicuna_v1.1", "chatml-llava", "qwen2-audio"])
def test_a_conversation_of_another_model_is_refused_at_load(checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} has no placeholder.*image_pad"):
        ChatTemplate(checkpoint, PLACEHOLDERS, name)


def test_a_template_without_pictures_is_refused_at_load(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jinja"
    file.write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ConfigurationError, match=r"text\.jinja has no placeholder for images"):
        ChatTemplate(checkpoint, PLACEHOLDERS, str(file))


def test_a_name_that_is_nothing_is_told_with_those_there_are(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        ChatTemplate(checkpoint, PLACEHOLDERS, "chatml")
    assert "'chatml'" in str(error.value)
    assert all(name in str(error.value) for name in CONVERSATIONS)


def test_what_begins_a_text_is_left_to_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """As SGLang does; a Jinja template writes it itself."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, tmp_path)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    begin = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    request = parse(msgspec.json.encode({"messages": [{"role": "user", "content": "a"}]}))
    found = {
        chosen: PromptBuilder(tmp_path, PLACEHOLDERS, max_model_len=100, chat_template=chosen)
        .render(request)
        .token_ids
        for chosen in ("", "qwen2-vl")
    }
    assert found["qwen2-vl"][0] == begin
    assert begin not in found[""]
    assert found["qwen2-vl"].count(begin) == 1
