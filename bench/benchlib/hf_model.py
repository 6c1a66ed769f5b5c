"""Hugging Face `generate` as people stream from it - a thread and a TextIteratorStreamer - reporting token ids too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


class TokenStreamer(TextIteratorStreamer):
    """Yields (new token ids, new text) for every token.

    The text is TextIteratorStreamer's own, which holds words back until a space follows; the ids say when the tokens
    were really there, so that the baseline's latency is not judged by its word boundaries.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._text = ""

    def put(self, value: torch.Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)  # type: ignore[no-untyped-call]
        if not is_prompt:
            self.text_queue.put((value.tolist(), self._take_text()))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        if stream_end:
            self.text_queue.put(([], self._take_text()))
            self.text_queue.put(self.stop_signal)

    def fail(self, error: Exception) -> None:
        self.text_queue.put(error)

    def _take_text(self) -> str:
        text, self._text = self._text, ""
        return text


class _Cancelled(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@dataclass
class HfModel:
    """A loaded model with its tokenizer and the EOS ids its files name."""

    model: Any
    tokenizer: Any
    eos_token_ids: list[int]

    @classmethod
    def load(cls, directory: Path, device: str, dtype: str) -> HfModel:
        """Load onto one device; `dtype` is a torch name or `auto` (as the checkpoint says)."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        model = model.to(device).eval()
        eos = model.generation_config.eos_token_id
        # With the ids out of the default config, each request decides for itself whether they count.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return cls(model, tokenizer, eos if isinstance(eos, list) else [] if eos is None else [eos])

    def stream(
        self, input_ids: list[int], max_new_tokens: int, ignore_eos: bool = True, temperature: float = 0.0
    ) -> Iterator[tuple[list[int], str]]:
        """Generate in a thread and yield (ids, text) as the streamer gives them; closing the iterator stops it."""
        streamer = TokenStreamer(self.tokenizer)
        cancelled = _Cancelled()
        ids = torch.tensor([input_ids], device=self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=None if ignore_eos else self.eos_token_ids,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([cancelled]),
                    **sampling,
                )
            except Exception as error:
                streamer.fail(error)

        thread = threading.Thread(target=generate, name="generate", daemon=True)
        thread.start()
        try:
            for item in streamer:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            cancelled.event.set()
            thread.join()
