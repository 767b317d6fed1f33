"""SGLang's conversations by name: how a chat is written, where no Jinja template says so.

Those for models that are served here.

Source: ``sglang/srt/parser/conversation.py`` of SGLang 0.5.17 (Apache-2.0), after FastChat; a test
holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from triptych.chat.messages import MediaPart, Message
from triptych.chat.tools import Tool
from triptych.contract import Modality

MANY_IMAGES = 16
"""Of one message; if there are more, a line begins before each of its texts."""


class Conversation(msgspec.Struct, frozen=True):
    """How the turns of a chat stand one after another."""

    system: tuple[str, str]
    """Before and after the system's message."""
    greeting: str
    """The system's message where a request has none."""
    turns: Mapping[str, str]
    """Before a message, by its role. Spaces at the end go where the message is empty, and where
    the answer begins."""
    ends: tuple[str, str]
    """After the first message, the third and so on; after the others."""
    media: Mapping[Modality, str]
    """What stands for a medium; ``{}`` is its number in the chat."""
    drops_empty_system: bool = False
    """Whether nothing is written of an empty system's message."""
    strips: bool = False
    """Whether white space about a message goes."""

    def shows(self, modality: Modality, placeholder: str) -> bool:
        """Whether a medium of that modality stands as one ``placeholder``."""
        return self.media.get(modality, "").count(placeholder) == 1

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt up to the answer; of several messages of the system the last one counts."""
        system, seen = self.greeting, 0
        turns: list[str] = []
        for message in messages:
            text, seen = self._text(message, seen)
            if message.role == "system":
                system = text
                continue
            opening, end = self.turns[message.role], self.ends[len(turns) % 2]
            shown = text.strip() if self.strips else text
            turns.append(opening + shown + end if text else opening.rstrip(" "))
        before, after = ("", "") if self.drops_empty_system and not system else self.system
        answer = self.turns["assistant"].rstrip(" ")
        return before + system + after + "".join(turns) + answer

    def _text(self, message: Message, seen: int) -> tuple[str, int]:
        """A message with the places of its media, and how many media there are up to here."""
        if isinstance(message.content, str):
            return message.content, seen
        media = [part for part in message.content if isinstance(part, MediaPart)]
        many = sum(part.modality == "image" for part in media) > MANY_IMAGES
        text = ""
        for part in message.content:
            if isinstance(part, MediaPart):
                seen += 1
                text += self.media.get(part.modality, "").replace("{}", str(seen))
            else:
                text += ("\n" if many else "") + part.text
        return text, seen


_CHATML = {"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"}
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
_SYSTEM = ("<|im_start|>system\n", "<|im_end|>\n")
_HELPFUL = "You are a helpful assistant."
_LLAVA: Mapping[Modality, str] = {"image": "<image>\n", "video": "<video>"}

CONVERSATIONS: Mapping[str, Conversation] = {
    "qwen2-vl": Conversation(
        system=_SYSTEM,
        greeting=_HELPFUL,
        turns=_CHATML,
        ends=("<|im_end|>\n", "<|im_end|>\n"),
        media={
            "image": "<|vision_start|><|image_pad|><|vision_end|>",
            "video": "<|vision_start|><|video_pad|><|vision_end|>",
        },
        drops_empty_system=True,
    ),
    "qwen2-audio": Conversation(
        system=_SYSTEM,
        greeting=_HELPFUL,
        turns=_CHATML,
        ends=("<|im_end|>\n", "<|im_end|>\n"),
        media={"audio": "Audio {}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"},
    ),
    "chatml-llava": Conversation(
        system=_SYSTEM,
        greeting=_HELPFUL,
        turns=_CHATML,
        ends=("<|im_end|>\n", "<|im_end|>\n"),
        media=_LLAVA,
    ),
    "vicuna_v1.1": Conversation(
        system=("", " "),
        greeting="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        turns={"user": "USER: ", "assistant": "ASSISTANT: "},
        ends=(" ", "</s>"),
        media=_LLAVA,
    ),
    "llava_llama_3": Conversation(
        system=(_LLAMA_3.format("system"), "<|eot_id|>"),
        greeting="You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.",
        turns={role: _LLAMA_3.format(role) for role in ("user", "assistant")},
        ends=("<|eot_id|>", "<|eot_id|>"),
        media=_LLAVA,
        drops_empty_system=True,
        strips=True,
    ),
}
"""By SGLang's name."""
