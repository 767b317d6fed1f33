"""OpenAI's objects: those that are answered, and the request as the document shows it.

A request is not decoded into these: the stage ``preprocess`` reads it (`triptych.chat.request`),
and a test holds the two against each other.

Source: https://platform.openai.com/docs/api-reference/chat, with ``video_url``, ``audio_url``,
``image_embeds``, ``uuid`` and the sampling fields of vLLM.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from triptych.chat.chunks import ChoiceLogprobs, Stages, Usage
from triptych.gateway.asked import MAX_CHOICES


class Error(Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    """Kind of error, by its status: ``invalid_request_error``, ``server_error``, …."""
    param: str | None
    """JSON path of the field at fault, such as ``messages[0].content[1].image_url.url``."""
    code: str
    """Name of the error, such as ``media_too_large``."""


class ErrorResponse(Struct, frozen=True):
    """The answer to a request that is not served; in a stream, its last event."""

    error: Error


class AssistantMessage(Struct, frozen=True):
    """An answer's message."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class CompletionChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """The answer to a request that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    triptych: Stages | UnsetType = UNSET
    """What the stages took; not with several answers."""


class Model(Struct, frozen=True, kw_only=True):
    """A name that goes into ``model``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the gateway started, seconds since the epoch."""
    owned_by: str = "triptych"
    root: str
    """The ensemble behind it."""


class ModelList(Struct, frozen=True, kw_only=True):
    """What there is to ask."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Struct, frozen=True):
    """The answer to a look at the gateway's health."""

    status: Literal["ok"] = "ok"


Name = Annotated[str, Meta(max_length=256)]
Filled = Annotated[str, Meta(min_length=1)]
Int32 = (1 << 31) - 1


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


class EmbedsURL(Struct, forbid_unknown_fields=True):
    """Where a picture's embeddings are, as safetensors."""

    url: Filled


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

    image_embeds: EmbedsURL
    uuid: Name | None = None


Part = TextPart | ImagePart | VideoPart | AudioPart | InputAudioPart | EmbedsPart


class Message(Struct, forbid_unknown_fields=True):
    """One turn; media may stand in any."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Meta(min_length=1)]
    name: Name | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Of a streamed answer."""

    include_usage: bool | None = None
    """Whether the last chunk tells the usage; false unless given."""


class ChatCompletionRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A conversation, and how to go on with it. Other fields are refused by name."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    """One of ``GET /v1/models``."""
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=Int32)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=Int32)] | None = None
    """The older name of ``max_completion_tokens``."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=Int32)] | None = None
    """0 and -1 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    """With ``n``, each further answer has the next seed."""
    stop: Filled | Annotated[list[Filled], Meta(max_length=4)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Answers, each a generation of its own."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Needs ``logprobs``."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Needs ``stream``."""
    user: Name | None = None
    metadata: dict[str, str] | None = None
    """The caller's own labels: 16, names of 64 characters, texts of 512."""
