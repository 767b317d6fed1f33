"""Reads a checkpoint directory in Hugging Face's layout, without transformers.

config.json                        what the model is
processor_config.json              how its media are prepared, as transformers 5 writes it
preprocessor_config.json           the same for images or sounds, as the hub has it
video_preprocessor_config.json     the same for videos
generation_config.json             the tokens that end an answer
tokenizer.json                     the ids of the special tokens
model.safetensors                  the weights, or
model.safetensors.index.json       a map from each weight's name to its file
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from triptych.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    """The little of tokenizer.json that is read here; the vocabulary is passed over."""

    added_tokens: list[_AddedToken] = []


class Checkpoint:
    """One checkpoint directory: its JSON files, and its tensors by name.

    Light and picklable: it holds the path and what was read of the JSON files. The weights are
    opened only by `names` and `tensors`.

    Args:
        path: The directory.

    Raises:
        ConfigurationError: There is no such directory, or no readable config.json in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigurationError(f"the checkpoint {self.path} is not a directory")
        if not (self.path / "config.json").is_file():
            raise ConfigurationError(f"{self.path} is not a checkpoint: it holds no config.json")
        self.config: dict[str, Any] = self._read_json("config.json")
        """config.json as it is."""

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, model_type={self.model_type!r})"

    @property
    def model_type(self) -> str:
        """Config.json's ``model_type``, which names the architecture; empty if it has none."""
        return str(self.config.get("model_type", ""))

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part: the hub has it flat in config.json, transformers 5 nested."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def image_processor(self) -> dict[str, Any]:
        """How images are prepared, looked for where Hugging Face looks; empty if nowhere."""
        return self._processor("image_processor", "preprocessor_config.json")

    @cached_property
    def video_processor(self) -> dict[str, Any]:
        """How videos are prepared; the settings for images where there are none of its own."""
        return self._processor(
            "video_processor", "video_preprocessor_config.json", "preprocessor_config.json"
        )

    @cached_property
    def feature_extractor(self) -> dict[str, Any]:
        """How sounds are prepared, looked for where Hugging Face looks; empty if nowhere."""
        return self._processor("feature_extractor", "preprocessor_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or empty."""
        return self._read_json("generation_config.json", missing_ok=True)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, generation_config.json before config.json."""
        for config in (self.generation_config, self.text_config, self.config):
            ids = config.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
        return ()

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens by their text, from tokenizer.json."""
        file = self.path / "tokenizer.json"
        try:
            tokenizer = msgspec.json.decode(file.read_bytes(), type=_Tokenizer)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(f"{file} cannot be read: {error}") from error
        return {token.content: token.id for token in tokenizer.added_tokens}

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """The file that holds each weight, by the weight's name.

        Raises:
            ConfigurationError: No safetensors, a broken index, or a file that it names is not
                there.
        """
        if (self.path / INDEX_FILE).is_file():
            return self._read_index()
        single = self.path / SINGLE_FILE
        if not single.is_file():
            raise ConfigurationError(f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        return dict.fromkeys(_keys(single), single)

    def names(self, prefix: str = "") -> list[str]:
        """The names of the weights that start with ``prefix``, sorted."""
        return sorted(name for name in self.weight_files if name.startswith(prefix))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the named weights, and no others, file by file.

        A tensor may be a view of the mapped file: copy it before the file can change.

        Raises:
            ConfigurationError: A weight or file is missing, or a file is broken or truncated.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.weight_files:
                raise ConfigurationError(f"the checkpoint {self.path} has no weight {name!r}")
            by_file.setdefault(self.weight_files[name], []).append(name)
        for file, wanted in by_file.items():
            yield from _read(file, wanted)

    def _processor(self, key: str, *files: str) -> dict[str, Any]:
        # The order of transformers' `get_image_processor_dict`: nested first, then each file.
        nested = self._read_json("processor_config.json", missing_ok=True).get(key)
        if isinstance(nested, dict):
            return nested
        for file in files:
            if found := self._read_json(file, missing_ok=True):
                return found
        return {}

    def _read_json(self, name: str, *, missing_ok: bool = False) -> dict[str, Any]:
        file = self.path / name
        try:
            return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            if missing_ok:
                return {}
            raise ConfigurationError(f"{file} does not exist") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigurationError(f"{file} cannot be read: {error}") from error

    def _read_index(self) -> dict[str, Path]:
        weight_map = self._read_json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigurationError(f"{self.path / INDEX_FILE} has no weight_map")
        files = {name: self.path / str(file) for name, file in weight_map.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ConfigurationError(
                    f"{file} does not exist, but {INDEX_FILE} says that it holds weights"
                )
        return files


def _read(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error


def _keys(file: Path) -> list[str]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
