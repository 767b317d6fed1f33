"""Opening video and sound files with FFmpeg, whose hands are tied.

The demuxer is named from the file's magic bytes and never guessed, so no playlist, concatenation or
image sequence can name other files; protocols are switched off; decoders are listed. FFmpeg has no
exceptions of its own for a broken file that would be worth telling apart: `reading` turns all of
them into `MediaUnreadable`.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import av
import av.container
import av.error
import av.logging

from triptych.errors import MediaTooLarge, MediaType, MediaUnreadable, TriptychError
from triptych.media.sniff import describe, sniff

VIDEO_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4"})
AUDIO_CODECS = frozenset(
    {"aac", "aac_latm", "alac", "flac", "libopus", "libvorbis", "mp2", "mp3", "mp3float"}
    | {"mp2float", "opus", "vorbis", "pcm_alaw", "pcm_mulaw", "pcm_u8"}
    | {
        f"pcm_{sample}{end}"
        for sample in ("s16", "s24", "s32", "f32", "f64")
        for end in ("le", "be")
    }
)
DEMUXERS = frozenset({"mov", "matroska", "avi", "mpegts", "wav", "flac", "ogg", "mp3", "aac"})
_OPTIONS = {"protocol_whitelist": "none", "enable_drefs": "0", "use_absolute_path": "0"}
_MAX_STREAMS = 64

logger = logging.getLogger("triptych.media")
av.logging.set_level(av.logging.PANIC)


def open_media(data: bytes, wanted: str) -> av.container.InputContainer:
    """A container to demux from.

    Args:
        data: The file.
        wanted: What the caller said it is, for the error.

    Raises:
        MediaType: No video or sound file that is served.
    """
    found = sniff(data)
    if found is None or found.name not in DEMUXERS:
        got = found.name if found else describe(data)
        raise MediaType(
            f"the {wanted} must be MP4, MOV, M4A, WebM, Matroska, AVI, MPEG-TS, WAV, FLAC, MP3, "
            f"AAC or Ogg, got {got}"
        )
    container = av.open(
        io.BytesIO(data),
        mode="r",
        format=found.name,
        container_options=_options(found.name),
        metadata_errors="replace",
    )
    if len(container.streams) > _MAX_STREAMS:
        container.close()
        raise MediaTooLarge(f"the {wanted} has more than {_MAX_STREAMS} streams")
    return container


@contextmanager
def reading(wanted: str) -> Iterator[None]:
    """What goes wrong in here is the file's fault, whatever FFmpeg calls it."""
    try:
        yield
    except TriptychError:
        raise
    except MemoryError:
        raise MediaTooLarge(
            f"decoding the {wanted} takes more memory than a worker may use"
        ) from None
    except av.error.FFmpegError as error:
        raise MediaUnreadable(f"the {wanted} is broken: {error.strerror}") from error
    except (AttributeError, ImportError, NameError):
        raise  # ours: for the log, not for the caller
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MediaUnreadable(f"the {wanted} cannot be read: {reason}") from error


def _options(demuxer: str) -> dict[str, str]:
    """Mov alone knows the options that keep it from following references to other files."""
    names = _OPTIONS if demuxer == "mov" else ("protocol_whitelist",)
    return {name: _OPTIONS[name] for name in names}
