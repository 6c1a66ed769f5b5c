"""Small tokenizers of every kind that matters, built in memory, and their files as a model directory has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, and all is well!",
    "Streaming text, token by token: hello hello world, the end of the world.",
    "你好世界，今天天气很好。我们去公园吧！",
    "Smile 😀 and wave 👋 at the family 👨‍👩‍👧.",
    "    indented\n\n\tlines  with   spaces\n",
] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """GPT-2, Qwen: byte-level BPE, with special, ordinary and non-ASCII added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é", normalized=False), "世a界"])
    return tokenizer


def llama_style() -> Tokenizer:
    """Llama 2, Mistral: BPE over characters with byte fallback, leading space stripped, BOS by post-processor."""
    specials = ["<unk>", "<s>", "</s>"]
    characters = sorted({char for text in CORPUS[:2] for char in text} - {" "})
    pieces = [*specials, *BYTES, "▁", *characters, "th", "▁th", "▁the", "he", "ll", "llo", "hello", "▁hello"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("▁", "hello")]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Gemma, T5: Unigram with Metaspace and byte fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    characters = sorted({char for text in CORPUS[:2] for char in text} - {" "})
    words = ["▁", "▁the", "▁hello", "▁world", "hello", "ing", *characters]
    pieces = [(piece, 0.0) for piece in specials + BYTES] + [(piece, -float(1 + n)) for n, piece in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT: WordPiece with clean-up of spaces before punctuation."""
    pieces = ["[UNK]", "[CLS]", "the", "##re", "do", "n't", "not", "'", "s", "'s", ".", ",", "?", "world", "##s", "##"]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def bpe_with_suffix() -> Tokenizer:
    """OpenAI GPT: BPE whose last pieces of words carry a suffix, which the decoder turns into spaces."""
    pieces = ["<unk>", "the</w>", "w", "or", "ld</w>", ".</w>", "</w>", "x"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def without_decoder() -> Tokenizer:
    """A word-level vocabulary; tokens are joined by spaces."""
    pieces = ["<unk>", "the", "world", "ends", "你好"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


ALL = {
    build.__name__: build for build in (byte_level, llama_style, unigram, wordpiece, bpe_with_suffix, without_decoder)
}


def save(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json (with a class that makes transformers read the former)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
