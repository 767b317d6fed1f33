"""Chat with a Triptych server: text, pictures, clips and sounds in, streamed text out.

from triptych_client import Client, image, user

with Client("localhost:8001") as client:
    for chunk in client.chat([user("How many circles?", image("picture.png"))]):
        print(chunk.text, end="", flush=True)
"""

from triptych_client.answers import (
    Answer,
    Chunk,
    PromptTokensDetails,
    Stages,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from triptych_client.client import AsyncChatStream, AsyncClient, ChatStream, Client
from triptych_client.encoded import Encoded
from triptych_client.errors import (
    Cancelled,
    ConfigurationError,
    ConnectionFailed,
    ContextTooLong,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    InvalidValue,
    LeaseLost,
    MediaError,
    MediaForbidden,
    MediaTimeout,
    MediaTooLarge,
    MediaType,
    MediaUnreachable,
    MediaUnreadable,
    NotFound,
    Overloaded,
    TriptychClientError,
    Unavailable,
    UnknownField,
    UnsupportedMedium,
)
from triptych_client.messages import (
    Message,
    Part,
    assistant,
    audio,
    image,
    image_embeds,
    system,
    text,
    tool,
    user,
    video,
)
from triptych_client.requests import Sampling
from triptych_client.transport import ModelInfo

__all__ = [
    "Client",
    "AsyncClient",
    "ChatStream",
    "AsyncChatStream",
    "Chunk",
    "Answer",
    "Usage",
    "PromptTokensDetails",
    "Stages",
    "TokenLogprob",
    "TopLogprob",
    "ToolCall",
    "ModelInfo",
    "Encoded",
    "Message",
    "Part",
    "Sampling",
    "user",
    "system",
    "assistant",
    "tool",
    "text",
    "image",
    "image_embeds",
    "video",
    "audio",
    "TriptychClientError",
    "InvalidRequest",
    "InvalidValue",
    "UnknownField",
    "ContextTooLong",
    "UnsupportedMedium",
    "MediaError",
    "MediaUnreadable",
    "MediaType",
    "MediaTooLarge",
    "MediaForbidden",
    "MediaUnreachable",
    "MediaTimeout",
    "NotFound",
    "Cancelled",
    "Overloaded",
    "DeadlineExceeded",
    "Unavailable",
    "LeaseLost",
    "ConnectionFailed",
    "ConfigurationError",
    "InternalError",
]
