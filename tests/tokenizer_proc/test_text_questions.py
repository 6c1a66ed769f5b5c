"""The real tokenizer process asked for token ids, for texts, and to have the prefix caches flushed."""

from __future__ import annotations

from pathlib import Path

import sample_tokenizers
from test_tokenizer_process import Stack, rid
from worker_process import demo_model_spec, take

from minisgl.config import ModelSpec
from minisgl.demo_model import demo_model_dir
from minisgl.messages import DetokenizeRequest, FlushCache, RequestError, TextAnswer, TokenizeRequest
from minisgl.tokenizer_proc.encode import PromptEncoder, PromptText

HELLO = [{"role": "user", "content": "Hello"}]
TEXT = "Hello, 你好 <|im_end|>"


def test_answers_equal_the_tokenizers_own() -> None:
    encoder = PromptEncoder.from_directory(demo_model_dir(), 4096, 2560)
    chat = encoder.render(HELLO)
    assert isinstance(chat, PromptText)
    with Stack(demo_model_spec(demo_model_dir())) as stack:
        stack.worker.send(
            TokenizeRequest(rid(1), TEXT, {}, True),
            TokenizeRequest(rid(2, http_index=1), HELLO, {}, False),
            TokenizeRequest(rid(3), "", {}, True),
        )
        ids = encoder.tokenizer.encode(TEXT).ids
        assert take(stack.http[0], 2) == [TextAnswer(rid(1), TEXT, ids), TextAnswer(rid(3), "", [])]
        chat_ids = encoder.tokenizer.encode(chat.text, add_special_tokens=False).ids
        assert take(stack.http[1]) == [TextAnswer(rid(2, http_index=1), chat.text, chat_ids)]
        for skip in (True, False):
            stack.worker.send(DetokenizeRequest(rid(4), ids, skip))
            text = encoder.tokenizer.decode(ids, skip_special_tokens=skip)
            assert take(stack.http[0]) == [TextAnswer(rid(4), text, ids)]
            assert ("<|im_end|>" in text) == (not skip)


def test_special_tokens_are_added_where_asked_for(tmp_path: Path) -> None:
    tokenizer = sample_tokenizers.llama_style()
    sample_tokenizers.save(tmp_path, tokenizer)
    with Stack(ModelSpec(str(tmp_path), "m", "m", 1000, 500, (2,), "m")) as stack:
        stack.worker.send(*(TokenizeRequest(rid(1), "Hello", {}, add) for add in (True, False)))
        with_bos, without = (answer.token_ids for answer in take(stack.http[0], 2))
        assert without == tokenizer.encode("Hello", add_special_tokens=False).ids
        assert with_bos == [tokenizer.token_to_id("<s>"), *without]


def test_what_cannot_be_answered_is_refused() -> None:
    with Stack(demo_model_spec(demo_model_dir())) as stack:
        stack.worker.send(
            TokenizeRequest(rid(1), [{"role": "user", "content": 5}], {}, False),
            TokenizeRequest(rid(2), "x" * 1_000_000, {}, False),
            TokenizeRequest(rid(3), [], {}, False),
            TokenizeRequest(rid(4, http_index=9), "Hello", {}, False),
        )
        errors = take(stack.http[0], 3)
        assert [type(error) for error in errors] == [RequestError] * 3
        assert [(error.rid, error.status, error.code) for error in errors] == [
            (rid(1), 400, "chat_template_error"),
            (rid(2), 400, "prompt_too_long"),
            (rid(3), 400, "empty_prompt"),
        ]


def test_a_long_text_holds_no_short_one_up(tmp_path: Path) -> None:
    sample_tokenizers.save(tmp_path, sample_tokenizers.byte_level())
    with Stack(ModelSpec(str(tmp_path), "m", "m", 1_000_000, 500, (2,), "m")) as stack:
        long = "one long prompt " * 30_000
        stack.worker.send(TokenizeRequest(rid(1), long, {}, True), TokenizeRequest(rid(2), "Hello", {}, True))
        short, answer = take(stack.http[0], 2)
        assert (short.rid, answer.rid) == (rid(2), rid(1))
        stack.worker.send(
            DetokenizeRequest(rid(3), answer.token_ids, True), DetokenizeRequest(rid(4), answer.token_ids[:9], True)
        )
        first, second = take(stack.http[0], 2)
        assert (first.rid, second.rid, second.text) == (rid(4), rid(3), long)


def test_a_flush_reaches_every_replica_even_one_that_is_starting() -> None:
    with Stack(demo_model_spec(demo_model_dir())) as stack:
        first = stack.scheduler(0)
        stack.worker.send(FlushCache(rid(1)))
        assert take(first) == [FlushCache(rid(1))]
        assert take(stack.scheduler(1)) == [FlushCache(rid(1))]
