"""Prompts to ids: equal to transformers, and refused with numbers where they cannot be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizers import CHATML, LLAMA_CHAT, save
from transformers import AutoTokenizer

from minisgl.config import ConfigError
from minisgl.demo_model import demo_model_dir
from minisgl.tokenizer_proc.encode import PromptEncoder, PromptRefused

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "你好世界 😀 👨‍👩‍👧 e\u0301",
    "<|im_start|>user\nhi<|im_end|> <s> </s> <tool> 世a界",
    "\n\n\t x" * 50,
    "\x00\ufffd\u2028",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 😀"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c <s>"}],
]
MODELS: dict[str, dict[str, Any]] = {
    "byte_level": {"chat_template": CHATML, "eos_token": "<|im_end|>"},
    "llama_style": {"chat_template": LLAMA_CHAT, "bos_token": "<s>", "eos_token": "</s>"},
    "unigram": {"chat_template": LLAMA_CHAT, "bos_token": "<s>", "eos_token": "</s>"},
}
CONTEXT = 4096


@pytest.fixture(scope="module", params=["demo", *MODELS])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return demo_model_dir()
    return save(tmp_path_factory.mktemp("model"), sample_tokenizers.ALL[request.param](), **MODELS[request.param])


@pytest.fixture(scope="module")
def encoder(directory: Path) -> PromptEncoder:
    return PromptEncoder.from_directory(directory, CONTEXT, 2560)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def test_texts_and_chats_equal_transformers(encoder: PromptEncoder, reference: Any) -> None:
    for text in TEXTS:
        assert encoder.encode(text, None) == reference.encode(text)
    for chat in CHATS:
        assert (
            encoder.encode(chat, None) == reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        )


@settings(max_examples=100)
@given(text=st.text(min_size=1, max_size=40))
def test_any_text_equals_transformers(encoder: PromptEncoder, reference: Any, text: str) -> None:
    expected = reference.encode(text)
    if expected:
        assert encoder.encode(text, None) == expected
    else:
        with pytest.raises(PromptRefused, match="empty"):
            encoder.encode(text, None)


def test_a_chat_has_one_bos(tmp_path: Path) -> None:
    """mini-sglang encodes the rendered template with special tokens again."""
    encoder = PromptEncoder.from_directory(
        save(tmp_path, sample_tokenizers.llama_style(), **MODELS["llama_style"]), CONTEXT, 400
    )
    assert encoder.encode("hello", None).count(1) == 1
    assert encoder.encode(CHATS[0], None).count(1) == 1


@pytest.fixture(scope="module")
def demo() -> PromptEncoder:
    return PromptEncoder.from_directory(demo_model_dir(), 100, 2560)


def refusal(encoder: PromptEncoder, prompt: Any, max_new_tokens: int | None = None) -> PromptRefused:
    with pytest.raises(PromptRefused) as caught:
        encoder.encode(prompt, max_new_tokens)
    return caught.value


def test_ids_pass_through_and_are_checked(demo: PromptEncoder) -> None:
    assert demo.encode([0, 2559, 7], 10) == [0, 2559, 7]
    for bad in ([3, 2560], [3, -1]):
        assert refusal(demo, bad).code == "invalid_token_id"
        assert "0 to 2559" in str(refusal(demo, bad))
        assert str(bad[1]) in str(refusal(demo, bad))


def test_a_token_beyond_the_model_s_embeddings_never_reaches_the_model() -> None:
    encoder = PromptEncoder.from_directory(demo_model_dir(), 100, vocab_size=300)
    assert refusal(encoder, "the quick brown fox").code == "invalid_token_id"


def test_lengths_are_checked_with_the_numbers(demo: PromptEncoder) -> None:
    assert demo.encode([5] * 99, None) == [5] * 99
    assert len(demo.encode([5] * 60, 40)) == 60
    too_long = refusal(demo, [5] * 100)
    assert too_long.code == "prompt_too_long"
    assert "100 tokens" in str(too_long)
    no_room = refusal(demo, [5] * 60, 41)
    assert no_room.code == "prompt_too_long"
    assert all(number in str(no_room) for number in ("60 tokens", "41", "100", "at most 40"))


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(demo: PromptEncoder, prompt: Any) -> None:
    assert refusal(demo, prompt).code == "empty_prompt"


def test_a_hopelessly_long_text_is_refused_without_tokenizing(
    demo: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest_token = max(map(len, demo.tokenizer.get_vocab()))
    assert demo.max_characters == 100 * longest_token

    def tokenize(prompt: object) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(demo, "tokenize", tokenize)
    assert refusal(demo, "x" * (demo.max_characters + 1)).code == "prompt_too_long"
    assert refusal(demo, [{"role": "user", "content": "x" * demo.max_characters}]).code == "prompt_too_long"


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    encoder = PromptEncoder.from_directory(save(tmp_path, sample_tokenizers.byte_level()), CONTEXT, 500)
    encoder.warm_up()
    assert "no chat template: send prompt" in str(refusal(encoder, CHATS[0]))


def test_a_template_error_is_the_request_s(tmp_path: Path) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}x"
    encoder = PromptEncoder.from_directory(
        save(tmp_path, sample_tokenizers.byte_level(), chat_template=template), CONTEXT, 500
    )
    assert encoder.encode(CHATS[0], None) == encoder.encode("x", None)
    assert "one message only" in str(refusal(encoder, CHATS[1]))


def test_a_broken_template_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        PromptEncoder.from_directory(
            save(tmp_path, sample_tokenizers.byte_level(), chat_template="{% for %}"), CONTEXT, 500
        )
