"""Conversations by name are those of SGLang, which runs in its own environment."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_engine import run
from triptych.chat.conversations import CONVERSATIONS, MANY_IMAGES
from triptych.chat.request import parse

pytestmark = pytest.mark.engine

PROGRAM = """
import json, sys
from triptych.engines import sglang_cpu
sglang_cpu.prepare()
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.conversation import generate_chat_conv
asked = json.load(sys.stdin)
print(json.dumps([
    generate_chat_conv(ChatCompletionRequest(model="m", messages=messages), name).get_prompt()
    for name, messages in asked
]))
"""
URL = {"url": "data:,"}


def user(*parts: str) -> dict[str, Any]:
    """A message; words are text, the rest media."""
    return {
        "role": "user",
        "content": [
            {"type": f"{part}_url", f"{part}_url": URL}
            if part in ("image", "video", "audio")
            else {"type": "text", "text": part}
            for part in parts
        ],
    }


def chats(media: list[str]) -> list[list[dict[str, Any]]]:
    first, last = media[0], media[-1]
    said = {"role": "assistant", "content": " Red. "}
    text = {"role": "user", "content": "  And now? "}
    return [
        [text],
        [user(first, "What?")],
        [user("This", first, "or this", last, "?")],
        [{"role": "system", "content": "Be brief."}, user("a", first), said, user(last, "b")],
        [{"role": "system", "content": ""}, text],
        [text, text, said, said, text],
        [user(*[first] * (MANY_IMAGES + 1), "How many?", "Really?")],
        [text, {"role": "system", "content": "Too late?"}, said, {"role": "user", "content": ""}],
    ]


def test_they_are_written_as_sglang_writes_them() -> None:
    asked = [
        (name, messages)
        for name, conversation in CONVERSATIONS.items()
        for messages in chats(list(conversation.media))
    ]
    for (name, messages), expected in zip(asked, run(PROGRAM, asked), strict=True):
        ours = parse(msgspec.json.encode({"messages": messages})).messages
        assert CONVERSATIONS[name].render(ours) == expected, (name, messages)
