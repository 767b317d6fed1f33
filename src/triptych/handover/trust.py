"""By which a reader knows that a ticket's metadata come from an encoder of ours.

NIXL parses metadata in C++ and connects to the addresses in them, so a caller of ``decode_*`` must
not be able to bring its own. The encoder adds a keyed hash that only those who know the key can
make: the setting ``handover_key``, or else a file that only this user can read.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

import blake3

from triptych.errors import ConfigurationError

_CONTEXT = "triptych 2026 hand-over of embeddings: proof of an agent"


def load_key(setting: str) -> bytes:
    """The key, 32 bytes.

    Args:
        setting: ``handover_key``.

    Raises:
        ConfigurationError: There is none, and the shared file cannot be made or trusted.
    """
    secret = setting.encode() or _shared_secret()
    return blake3.blake3(secret, derive_key_context=_CONTEXT).digest()


def prove(key: bytes, metadata: bytes) -> bytes:
    """The proof of ``metadata``, 32 bytes."""
    return blake3.blake3(metadata, key=key).digest()


def proven(key: bytes, metadata: bytes, proof: bytes) -> bool:
    """Whether ``proof`` was made with the same key."""
    return hmac.compare_digest(prove(key, metadata), proof)


def _shared_secret() -> bytes:
    folder = Path(tempfile.gettempdir()) / f"triptych-{os.geteuid()}"
    path = folder / "handover.key"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _check(folder, stat.S_ISDIR)
        if not path.exists():
            # Written apart and linked, so that nobody ever reads half of it; who comes second
            # uses what the first one made.
            with tempfile.NamedTemporaryFile(dir=folder) as fresh:
                fresh.write(secrets.token_bytes(32))
                fresh.flush()
                if not path.exists():
                    os.link(fresh.name, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigurationError(
            f"no key for the hand-over by NIXL: {error}; set handover_key"
        ) from None
    _check(path, stat.S_ISREG)
    return path.read_bytes()


def _check(path: Path, kind: object) -> None:
    found = os.lstat(path)
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:  # type: ignore[operator]
        raise ConfigurationError(
            f"{path} may be read by others than this user; remove it, or set handover_key"
        )
