"""Log probabilities on their way to the client: they wait for the text of their tokens, and get its bytes."""

from __future__ import annotations

from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.messages import Logprobs


class ShownLogprobs:
    """The log probabilities of one request that have arrived and are not shown yet."""

    __slots__ = ("_answer", "_prompt")

    def __init__(self) -> None:
        self._prompt: Logprobs | None = None
        self._answer = Logprobs(0, False, [], [])

    def add(self, part: Logprobs) -> None:
        """Take the next of a TokenBatch; parts come in the order of their tokens."""
        if part.of_prompt:
            self._prompt = part
            return
        answer = self._answer
        answer.token_ids += part.token_ids
        answer.values += part.values
        answer.top_ids += part.top_ids
        answer.top_values += part.top_values

    def show(self, tokens: int, texts: TokenTexts) -> list[Logprobs]:
        """What goes with a row that shows this many tokens more: the prompt's once, and those of its tokens."""
        shown = [] if self._prompt is None else [self._prompt]
        self._prompt = None
        answer = self._answer
        if answer.token_ids and tokens:
            top = tokens * (len(answer.top_ids) // len(answer.token_ids))
            # Tokens behind a stop string are never shown.
            del answer.token_ids[tokens:], answer.values[tokens:], answer.top_ids[top:], answer.top_values[top:]
            shown.append(answer)
            self._answer = Logprobs(0, False, [], [])
        for part in shown:
            part.pieces = [texts.piece(token_id) for token_id in (*part.token_ids, *part.top_ids)]
        return shown
