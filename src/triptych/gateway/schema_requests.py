"""OpenAI's requests as the document shows them.

None is decoded into these: the stage ``preprocess`` reads them (`triptych.chat.request`), and a
test holds the two against each other.

Source: https://platform.openai.com/docs/api-reference/chat and
https://platform.openai.com/docs/api-reference/completions, with ``video_url``, ``audio_url``,
``image_embeds``, ``uuid`` and the sampling fields of vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from triptych.chat.request import (
    INT32_MAX,
    INT32_MIN,
    INT64_MAX,
    INT64_MIN,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
)
from triptych.chat.tools import MAX_TOOLS
from triptych.gateway.asked import MAX_CHOICES

Name = Annotated[str, Meta(max_length=256)]
Filled = Annotated[str, Meta(min_length=1)]
FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]


class ImageURL(Struct, forbid_unknown_fields=True):
    """Where a picture is."""

    url: Filled
    """``https:``, ``http:``, ``data:``, or ``file:`` where the server allows it."""
    detail: Literal["auto", "low", "high"] | None = None


class VideoURL(Struct, forbid_unknown_fields=True):
    """Where a clip is, and which of its frames to take."""

    url: Filled
    num_frames: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    """Evenly over the clip; not with ``fps``."""
    fps: Annotated[float, Meta(gt=0, le=1000)] | None = None


class AudioURL(Struct, forbid_unknown_fields=True):
    """Where a sound is."""

    url: Filled
    sampling_rate: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None


class InputAudio(Struct, forbid_unknown_fields=True):
    """A sound in base64."""

    data: Filled
    format: Literal["wav", "mp3", "flac", "ogg"] | None = None


class TensorPlace(Struct, forbid_unknown_fields=True):
    """A piece of Triton's input ``TENSORS``."""

    shape: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=2, max_length=2)]
    """Tokens, width."""
    dtype: Literal["bfloat16", "float16", "float32"]
    offset: Annotated[int, Meta(ge=0)] | None = None
    """Bytes from its start."""


class Embeds(Struct, forbid_unknown_fields=True):
    """A picture's embeddings: a file of them, or a piece of a tensor."""

    url: Filled | None = None
    """Where they are, as safetensors."""
    tensor: TensorPlace | None = None
    """In place of ``url``. Triton's own API takes such a tensor beside the request; over HTTP there
    is none, so here it is refused."""
    image_grid_thw: (
        Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=3, max_length=3)] | None
    ) = None
    """With ``tensor``: patches in time, height and width; a file has its own."""


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Text between media."""

    text: str


class ImagePart(Struct, tag_field="type", tag="image_url", forbid_unknown_fields=True):
    """A picture."""

    image_url: ImageURL
    uuid: Name | None = None
    """The caller's own name for the content."""


class VideoPart(Struct, tag_field="type", tag="video_url", forbid_unknown_fields=True):
    """A clip."""

    video_url: VideoURL
    uuid: Name | None = None


class AudioPart(Struct, tag_field="type", tag="audio_url", forbid_unknown_fields=True):
    """A sound."""

    audio_url: AudioURL
    uuid: Name | None = None


class InputAudioPart(Struct, tag_field="type", tag="input_audio", forbid_unknown_fields=True):
    """A sound in base64."""

    input_audio: InputAudio
    uuid: Name | None = None


class EmbedsPart(Struct, tag_field="type", tag="image_embeds", forbid_unknown_fields=True):
    """A picture's embeddings in place of the picture."""

    image_embeds: Embeds
    uuid: Name | None = None


Part = TextPart | ImagePart | VideoPart | AudioPart | InputAudioPart | EmbedsPart


class CalledFunction(Struct, forbid_unknown_fields=True):
    """What was to be called."""

    name: FunctionName
    arguments: str
    """A JSON object."""


class ToolCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call that the model asked for."""

    id: Filled
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Struct, forbid_unknown_fields=True):
    """One turn; media may stand in any."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Meta(min_length=1)] | None = None
    """May be missing where there are ``tool_calls``."""
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Meta(min_length=1)] | None = None
    """Of an assistant's turn."""
    tool_call_id: Filled | None = None
    """Of a tool's turn: which call it answers."""


class FunctionDefinition(Struct, forbid_unknown_fields=True):
    """What may be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; none: there are no arguments."""
    strict: bool | None = None
    """Whether arguments that break the schema must not come."""


class Tool(Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may ask its caller to call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionChoice(Struct, forbid_unknown_fields=True):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(Struct, forbid_unknown_fields=True, kw_only=True):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionChoice


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class ObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """A JSON object."""


class JSONSchema(Struct, forbid_unknown_fields=True):
    """A schema, and what it is called."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: dict[str, Any]
    """It may refer to itself alone, and have 64 KiB."""
    description: str | None = None
    strict: bool | None = None
    """The schema is held either way."""


class SchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that fulfils a schema."""

    json_schema: JSONSchema


ResponseFormat = TextFormat | ObjectFormat | SchemaFormat


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    """Whether the last chunk tells the usage; false unless given."""


class _Drawn(Struct, forbid_unknown_fields=True, kw_only=True):
    """How an answer is drawn, whatever it answers."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    """One of ``GET /v1/models``."""
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    """0 and -1 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    seed: Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)] | None = None
    """With ``n``, each further answer has the next seed."""
    stop: Filled | Annotated[list[Filled], Meta(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Answers, each a generation of its own."""
    response_format: ResponseFormat | None = None
    """Where the engine can hold an answer to it; else refused."""
    priority: Annotated[int, Meta(ge=INT32_MIN, le=INT32_MAX)] | None = None
    """The lower goes first where requests wait, if the engine has priorities; else refused."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Needs ``stream``."""
    user: Name | None = None
    metadata: dict[str, str] | None = None
    """The caller's own labels: 16, names of 64 characters, texts of 512."""


class ChatCompletionRequest(_Drawn, forbid_unknown_fields=True, kw_only=True):
    """A conversation, and how to go on with it. Other fields are refused by name."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Needs ``logprobs``."""
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    """Where the model's chat template takes them; else refused."""
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """Needs ``tools``; without it ``auto``. A call that must come needs an engine that can hold
    an answer to a schema."""
    parallel_tool_calls: bool | None = None
    """Needs ``tools``; true unless given."""


_TOKEN_IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX},
    "minItems": 1,
}
_TEXT = {"type": "string", "minLength": 1}
_PROMPTS = {
    "anyOf": [
        _TEXT,
        _TOKEN_IDS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}


class CompletionRequest(_Drawn, forbid_unknown_fields=True, kw_only=True):
    """Prompts that the model goes on with as they are. Other fields are refused by name."""

    prompt: Annotated[Any, Meta(extra_json_schema=_PROMPTS)]
    """Text or token ids, one or several: with ``n``, 128 answers at most."""
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    """16 unless given."""
    echo: bool | None = None
    """Whether the answer begins with the prompt, which is text then; not with ``logprobs``."""
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Served where it is ``n``."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """So many of the likeliest tokens at each place, with theirs."""
