"""One request on its way from token ids to shown text: incremental decoding, stop strings, and how it ends.

No process and no channel is involved: the detokenizer process and the in-process Engine both drive this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisgl.detokenizer_proc.incremental import TokenTexts
from minisgl.detokenizer_proc.stop_strings import StopMatcher
from minisgl.messages import FinishReason


@dataclass(slots=True)
class Delta:
    """What a request's client gets next."""

    text: str
    token_ids: list[int]
    """The tokens that brought the text, with those before them that brought none."""
    finish: FinishReason
    matched: int | str | None
    """What matched, when finish is STOP: the stop string, or the EOS or stop token id."""


class StreamDecoder:
    """The text of one request.

    Invariant: all deltas' texts, joined, are the tokenizer's own decode of all deltas' token ids - without the token
    that ended the request, and cut at the first stop string, unless no_stop_trim.

    Args:
        texts: made once per tokenizer.
        stop: stop strings; none of them empty.
        min_new_tokens: the text of this many tokens is not looked at for stop strings.
    """

    __slots__ = ("_held_ids", "_keep_stop", "_stops", "_text", "_unstoppable")

    def __init__(
        self,
        texts: TokenTexts,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        no_stop_trim: bool = False,
        min_new_tokens: int = 0,
    ) -> None:
        self._text = texts.open(skip_special_tokens)
        self._stops = StopMatcher(stop, keep_match=no_stop_trim) if stop else None
        self._keep_stop = no_stop_trim
        self._unstoppable = min_new_tokens
        self._held_ids: list[int] = []

    def advance(self, token_ids: Sequence[int], finish: FinishReason = FinishReason.NONE) -> Delta:
        """Take the request's next tokens (without NO_TOKEN); `finish` is how it ended with the last of them, if it did.

        The returned finish may be STOP although NONE was given: a stop string matched. Then, as after any finish, the
        request is over, and tokens after the one that completed the match are not part of it.
        """
        if not finish and self._stops is None:
            text = self._text.push(token_ids)
            return self._delta(text, token_ids, finish, None)
        ended_by = token_ids[-1] if finish is FinishReason.STOP and token_ids else None
        visible = token_ids if ended_by is None or self._keep_stop else token_ids[:-1]
        matched: int | str | None = ended_by
        if self._stops is None:
            text = self._text.push(visible) + self._text.flush()
        else:
            text, taken = self._push_until_stop(self._stops, visible, ends=bool(finish))
            if self._stops.matched is not None:
                finish, matched = FinishReason.STOP, self._stops.matched
                token_ids = token_ids[:taken]
        return self._delta(text, token_ids, finish, matched)

    def _delta(self, text: str, token_ids: Sequence[int], finish: FinishReason, matched: int | str | None) -> Delta:
        """Send the tokens along if there is text for them or nothing follows, else keep them for the next delta."""
        if not (text or finish):
            self._held_ids.extend(token_ids)
            return Delta("", [], finish, None)
        shown_ids = [*self._held_ids, *token_ids]
        self._held_ids.clear()
        return Delta(text, shown_ids, finish, matched)

    def _push_until_stop(self, stops: StopMatcher, token_ids: Sequence[int], ends: bool) -> tuple[str, int]:
        """The text to show, and how many of the tokens were taken until a stop string matched."""
        parts: list[str] = []
        for taken, token_id in enumerate(token_ids, 1):
            text = self._text.push((token_id,))
            if self._unstoppable:
                self._unstoppable -= 1
                parts.append(text)
                continue
            parts.append(stops.feed(text))
            if stops.matched is not None:
                return "".join(parts), taken
        if ends:
            parts.append(stops.feed(self._text.flush()))
            parts.append(stops.flush())
        return "".join(parts), len(token_ids)
