"""Text to token ids with the ``tokenizers`` library, without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from triptych.chat.template import read_json
from triptych.errors import ConfigurationError


class PromptTokenizer:
    """A checkpoint's tokenizer; its ids equal those of Hugging Face's for the same text.

    Args:
        checkpoint: Directory that holds tokenizer.json.

    Raises:
        ConfigurationError: tokenizer.json is missing or broken.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        file = Path(checkpoint) / "tokenizer.json"
        if not file.is_file():
            raise ConfigurationError(f"{file} does not exist")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigurationError(f"{file} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_missing(read_json(Path(checkpoint) / "tokenizer_config.json"))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: A rendered prompt, whose special tokens are those in it.
            special: Whether those are added that the tokenizer puts around a text, such as a
                token that begins it.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def has(self, token_id: int) -> bool:
        """Whether there is a token of that id."""
        return self._tokenizer.id_to_token(token_id) is not None

    def token_id(self, token: str) -> int:
        """The id of one token.

        Raises:
            ConfigurationError: The vocabulary does not have it.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ConfigurationError(f"the tokenizer has no token {token!r}")
        return int(found)

    def _add_missing(self, config: Mapping[str, object]) -> None:
        """Tokens that only tokenizer_config.json has, which Hugging Face adds on loading."""
        listed = config.get("added_tokens_decoder")
        if not isinstance(listed, dict):
            return
        for _, entry in sorted(listed.items(), key=lambda pair: int(pair[0])):
            if self._tokenizer.token_to_id(entry["content"]) is not None:
                continue
            flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
            token = AddedToken(entry["content"], **{f: entry[f] for f in flags if f in entry})
            self._tokenizer.add_tokens([token])
