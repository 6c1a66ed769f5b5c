"""Trains the byte-level BPE tokenizer on generated text and writes its files.

Run as ``python -m minisgl.demo_model.train_tokenizer --out FOLDER``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from .text_generator import END_OF_TEXT, IM_END, IM_START, documents

# Qwen2's rule: digits stand alone, letters take at most one leading other character.
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY_SIZE = 2560
# Long tokens would hide a word's letters from the model, which has to spell and reverse words.
MAX_TOKEN_BYTES = 7
MAX_POSITIONS = 4096
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]


def texts(seed: int, count: int) -> Iterator[str]:
    """Yield the plain content of training documents, without the special tokens."""
    for document in itertools.islice(documents(seed), count):
        text = "".join(segment.text for segment in document)
        for special in SPECIAL_TOKENS:
            text = text.replace(special, "")
        yield text


def train_tokenizer(seed: int, count: int) -> Tokenizer:
    """Train the tokenizer; the special tokens take the first three ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, count), trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """Return what transformers' AutoTokenizer needs besides ``tokenizer.json``."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main() -> None:
    """Train and write ``tokenizer.json`` and ``tokenizer_config.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--documents", type=int, default=20_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.seed, arguments.documents)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=True)
    (arguments.out / "tokenizer_config.json").write_text(config + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
