"""A model's tokenizer files, as the `tokenizers` library needs them.

The tokenizer and the detokenizer process both load through here, and so does the in-process Engine. The behaviour is
that of transformers' fast tokenizers, without importing transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from minisgl.config import ConfigError
from minisgl.model_files import read_json


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> Tokenizer:
    """The model's tokenizer; raises ConfigError when the directory has none that can be used."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        return _convert_with_transformers(directory, trust_remote_code)
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{directory / 'tokenizer.json'} cannot be read ({error}): fetch it again") from error
    listed = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    _add_missing_tokens(tokenizer, listed)
    # A truncating or padding tokenizer.json would change prompts silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add_missing_tokens(tokenizer: Tokenizer, listed: dict[str, dict[str, Any]]) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks or describes differently, in id order."""
    present = tokenizer.get_added_tokens_decoder()
    for token_id, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        token = AddedToken(**{name: value for name, value in fields.items() if name != "__type"})
        if repr(present.get(int(token_id))) != repr(token):
            tokenizer.add_tokens([token])


def _convert_with_transformers(directory: Path, trust_remote_code: bool) -> Tokenizer:
    """The fast tokenizer that transformers makes from older file formats (vocab.json, tokenizer.model, ...)."""
    # The import costs seconds, so only a model without tokenizer.json pays for it.
    from transformers import AutoTokenizer

    try:
        slow_or_fast = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except Exception as error:  # anything can go wrong in a converter
        raise ConfigError(
            f"{directory} has no tokenizer.json, and transformers cannot make one from its other files: {error}"
        ) from error
    tokenizer = getattr(slow_or_fast, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"{directory} has no tokenizer.json, and its tokenizer cannot be converted into one")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
