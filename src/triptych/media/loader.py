"""All media behind one call: `MediaLoader.load`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from urllib.parse import unquote, urlsplit

import blake3
import msgspec

from triptych.contract import Modality
from triptych.errors import InternalError, InvalidValue, MediaForbidden, TriptychError
from triptych.media import datauri, image
from triptych.media.base import Loaded, MediaOptions, Planner
from triptych.settings import MediaSettings

logger = logging.getLogger("triptych.media")

MIB = 1 << 20


class MediaLoader:
    """Fetches, checks and decodes what callers name.

    Args:
        settings: The limits.
        planner: The model family, which says what size each medium must have.
    """

    def __init__(self, settings: MediaSettings, planner: Planner) -> None:
        self.settings = settings
        self.planner = planner

    async def load(
        self, modality: Modality, url: str, *, where: str, options: MediaOptions | None = None
    ) -> Loaded:
        """One medium, ready for MEDIA.

        Raises:
            MediaError: Whatever is wrong with it, at ``where``.
        """
        try:
            return await asyncio.to_thread(self._load, modality, url, options or MediaOptions())
        except TriptychError as error:
            raise error.at(where) from None
        except Exception as error:
            logger.exception("loading %s at %s failed", modality, where)
            raise InternalError(f"loading the {modality} failed", where=where) from error

    async def close(self) -> None:
        """Give everything back; a second call does nothing."""

    def _load(self, modality: Modality, url: str, options: MediaOptions) -> Loaded:
        limit = self.settings.max_file_size_mb * MIB
        scheme = url[:5].lower()
        if scheme == "data:":
            data, _ = datauri.decode(url, max_bytes=limit)
        elif scheme == "file:" and self.settings.allowed_local_media_path:
            root = Path(self.settings.allowed_local_media_path).resolve()
            path = Path(unquote(urlsplit(url).path)).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                raise MediaForbidden("the file is not under allowed_local_media_path")
            data = path.read_bytes()[: limit + 1]
        else:
            raise MediaForbidden(f"media from {url.split(':', 1)[0]!r} is not served")
        if modality != "image":
            raise InvalidValue(f"{modality} is not served yet")
        pixels, plan = image.load(
            data, self.planner, max_pixels=self.settings.max_image_pixels, options=options
        )
        digest = blake3.blake3(data)
        digest.update(msgspec.json.encode((modality, plan)))
        return Loaded(modality, pixels, digest.hexdigest(), plan.tokens, plan.grid_thw)
