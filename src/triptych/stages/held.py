"""What the encoder holds, for the media loader: leases in place of pixels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import blake3
import msgspec
import numpy as np

from triptych.contract import DType, GridTHW, Modality
from triptych.encode.keys import content_key
from triptych.encode.lookup_client import LookupClient
from triptych.media.base import PRIORITY, Loaded
from triptych.settings import PreprocessSettings

INLINE_BYTES = 4 << 20
"""Up to this size hashing costs less than a thread does."""
_NOTHING = np.empty(0, np.uint8)


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the encoder keeps for preprocess: a `Loaded` without its array."""

    modality: Modality
    hash: str
    dtype: DType
    shape: tuple[int, ...]
    tokens: int
    grid_thw: GridTHW | None = None
    second_per_grid: float | None = None
    timestamps: tuple[float, ...] = ()


class EncoderHoldings:
    """The media that an encoder needs no pixels of; a `triptych.media.base.Holder`.

    Args:
        client: Asks the encoder.
        settings: Of this stage: all of them go into the names, because a medium that another
            stage has admitted or scaled by other settings is another one.
        versions: What else shapes the pixels.
    """

    def __init__(
        self, client: LookupClient, settings: PreprocessSettings, versions: Iterable[str] = ()
    ) -> None:
        self._client = client
        self._prefix = msgspec.json.encode((settings, [*versions]))

    async def find(self, key: str) -> Loaded | None:
        """The medium with a lease for its embeddings, from whichever instance holds them."""
        found = await self._client.find(self._claim(key))
        if found is None:
            return None
        note = msgspec.json.decode(found.note, type=Note)
        return Loaded(
            modality=note.modality,
            array=_NOTHING,
            hash=note.hash,
            tokens=note.tokens,
            grid_thw=note.grid_thw,
            second_per_grid=note.second_per_grid,
            dtype=note.dtype,
            timestamps=note.timestamps,
            lease=found.lease,
            leased_shape=note.shape,
            cached=True,
        )

    async def bring(self, key: str, loaded: Loaded) -> Loaded | None:
        """The same medium with a lease, once the encoder has made its embeddings.

        Precomputed embeddings are not brought, since there is nothing to make, nor what its
        origin forbids to store.
        """
        if loaded.precomputed or not loaded.keep:
            return None
        item = loaded.item(0)
        data = loaded.array.reshape(-1).view(np.uint8).data
        if data.nbytes <= INLINE_BYTES:
            content = content_key(item, data)
        else:
            content = await asyncio.to_thread(content_key, item, data)
        note = Note(
            modality=loaded.modality,
            hash=loaded.hash,
            dtype=loaded.dtype,
            shape=item.shape,
            tokens=loaded.tokens,
            grid_thw=loaded.grid_thw,
            second_per_grid=loaded.second_per_grid,
            timestamps=loaded.timestamps,
        )
        text = msgspec.json.encode(note).decode()
        found = await self._client.bring(
            self._claim(key), content, text, item, data, PRIORITY.get()
        )
        if found is None:
            return None
        return replace(loaded, array=_NOTHING, lease=found.lease, leased_shape=item.shape)

    async def close(self) -> None:
        """Hang up."""
        await self._client.close()

    def _claim(self, key: str) -> str:
        return blake3.blake3(self._prefix).update(key.encode()).hexdigest()
