"""Prompts to token ids: text, ready-made ids or chat messages, all checked against the model's limits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from minisgl.config import ConfigError
from minisgl.messages import JsonObject
from minisgl.model_files import read_chat_templates, read_named_tokens
from minisgl.tokenizer_proc.chat_template import ChatTemplate, ChatTemplateError, UnknownVariable
from minisgl.tokenizer_proc.known_words import KnownWords
from minisgl.tokenizer_proc.time_limit import TimeLimitExceeded, time_limit
from minisgl.tokenizer_proc.tokenizer_files import load_tokenizer


class PromptRefused(ValueError):
    """The prompt cannot be served; the message says why and what to change.

    Attributes:
        code: one word for programs.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PromptText(NamedTuple):
    """A prompt before tokenization."""

    text: str
    add_special_tokens: bool
    """Whether the tokenizer adds BOS and the like; a chat template has already written them."""


class PromptEncoder:
    """Encodes prompts for one model; equal to transformers' `encode` and `apply_chat_template`.

    Args:
        chat_template: None when the model has none; chat messages are then refused.
        context_length: prompt and answer together, in tokens.
        vocab_size: token ids the model has embeddings for.
        template_seconds: how long the chat template may run for one prompt (see time_limit); None is "as long as it
            takes".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        context_length: int,
        vocab_size: int,
        template_seconds: float | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.template_seconds = template_seconds
        # A token stands for at most as many characters as its own text has; texts beyond that are not even tokenized.
        self.max_characters = context_length * max(map(len, tokenizer.get_vocab(with_added_tokens=True)))
        self._known_words = KnownWords.of(tokenizer)

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        context_length: int,
        vocab_size: int,
        trust_remote_code: bool = False,
        template_seconds: float | None = None,
    ) -> PromptEncoder:
        """Load the tokenizer and chat template files; raises ConfigError when they are missing or broken."""
        sources = read_chat_templates(Path(directory))
        try:
            template = ChatTemplate.of(sources, read_named_tokens(Path(directory))) if "default" in sources else None
        except ChatTemplateError as error:
            raise ConfigError(f"the chat template in {directory} is not valid Jinja: {error}") from error
        tokenizer = load_tokenizer(directory, trust_remote_code)
        return cls(tokenizer, template, context_length, vocab_size, template_seconds)

    def encode(
        self,
        prompt: str | list[int] | list[JsonObject],
        max_new_tokens: int | None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's token ids, at least one; raises PromptRefused.

        Args:
            max_new_tokens: what must fit behind the prompt; None is "whatever is left".
            template_variables: what a chat brings beside its messages; see ChatTemplate.render.
        """
        rendered = self.render(prompt, template_variables)
        ids = self.tokenize(rendered) if isinstance(rendered, PromptText) else rendered
        self.check(ids, max_new_tokens)
        return ids

    def render(
        self, prompt: str | list[int] | list[JsonObject], template_variables: Mapping[str, Any] | None = None
    ) -> PromptText | list[int]:
        """The text to tokenize, or the prompt itself when it is token ids already; raises PromptRefused."""
        if isinstance(prompt, str):
            rendered = PromptText(prompt, add_special_tokens=True)
        else:
            token_ids = [item for item in prompt if isinstance(item, int)]
            if len(token_ids) == len(prompt):
                return token_ids
            messages = [item for item in prompt if isinstance(item, dict)]
            rendered = PromptText(self._render_chat(messages, template_variables or {}), False)
        if len(rendered.text) > self.max_characters:
            raise PromptRefused(
                "prompt_too_long",
                f"the prompt has {len(rendered.text)} characters, more than {self.context_length} tokens "
                f"(this model's context length) can hold: shorten it",
            )
        return rendered

    def tokenize(self, prompt: PromptText) -> list[int]:
        """The token ids of a text. Other threads run while a long one is encoded."""
        if self._known_words is not None:
            known = self._known_words.encode(prompt.text, prompt.add_special_tokens)
            if known is not None:
                return known
        # The batch call releases the interpreter lock and leaves out the character offsets that `encode` computes.
        encodings = self.tokenizer.encode_batch_fast([prompt.text], add_special_tokens=prompt.add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def detokenize(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """The text of token ids. Other threads run meanwhile."""
        texts: list[str] = self.tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def check(self, ids: list[int], max_new_tokens: int | None) -> None:
        """Raise PromptRefused unless there are tokens, the model knows them all, and there is room for the answer."""
        prompt_tokens = len(ids)
        if prompt_tokens == 0:
            raise PromptRefused("empty_prompt", "the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise PromptRefused(
                "invalid_token_id",
                f"this model has token ids 0 to {self.vocab_size - 1}, and the prompt contains "
                f"{min(ids) if min(ids) < 0 else max(ids)}",
            )
        if prompt_tokens >= self.context_length:
            raise PromptRefused(
                "prompt_too_long",
                f"the prompt has {prompt_tokens} tokens and this model's context length is {self.context_length}: "
                f"shorten the prompt to at most {self.context_length - 1}",
            )
        if max_new_tokens is not None and prompt_tokens + max_new_tokens > self.context_length:
            raise PromptRefused(
                "prompt_too_long",
                f"the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together more than "
                f"this model's context length {self.context_length}: shorten the prompt, or lower max_new_tokens "
                f"to at most {self.context_length - prompt_tokens}",
            )

    def warm_up(self) -> None:
        """Run every path once, so that the first request does not pay for it."""
        self.tokenize(PromptText("Hello", add_special_tokens=True))
        # A template may insist on other messages than these.
        with contextlib.suppress(PromptRefused):
            self.render([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])

    def _render_chat(self, messages: list[JsonObject], variables: Mapping[str, Any]) -> str:
        if self.chat_template is None:
            raise PromptRefused("no_chat_template", "this model has no chat template: send prompt instead of messages")
        try:
            with time_limit(self.template_seconds):
                return self.chat_template.render(messages, variables)
        except UnknownVariable as error:
            raise PromptRefused("unknown_template_variable", str(error)) from error
        except (ChatTemplateError, TimeLimitExceeded) as error:
            raise PromptRefused("chat_template_error", f"the model's chat template failed: {error}") from error
