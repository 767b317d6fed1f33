"""Who may ask: API keys, of which only digests are kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from triptych.errors import ConfigurationError


class ApiKeys:
    """The keys that open the API.

    Args:
        keys: Any number; with none the API is open.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @staticmethod
    def read(keys: Iterable[str], file: str) -> ApiKeys:
        """The keys given, and those in ``file``: one a line, ``#`` begins a comment line.

        Raises:
            ConfigurationError: The file cannot be read or has no key, or a key is empty.
        """
        found = list(keys)
        if file:
            try:
                lines = [line.strip() for line in Path(file).read_text().splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"the API keys cannot be read: {error}") from None
            held = [line for line in lines if line and not line.startswith("#")]
            if not held:
                raise ConfigurationError(f"{file} has no API key")
            found += held
        if not all(key.strip() for key in found):
            raise ConfigurationError("an API key must not be empty")
        return ApiKeys(found)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)})"

    def __contains__(self, key: str) -> bool:
        """Whether ``key`` is one of them, in a time that tells nothing of any of them."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
