"""The ring's side of log probabilities: rows that bring them, made of (token id, bytes, value) and their rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from http_rig import Rig, ring_stamps

from minisgl.messages import DeltaBatch, FinishReason, GenerateRequest, Logprobs, Opening

Token: TypeAlias = tuple[int, bytes, float]
Place: TypeAlias = tuple[Token, Sequence[Token]]
"""A token and the likeliest ones at its place."""


def part(places: Sequence[Place], of_prompt: bool = False, row: int = 0) -> Logprobs:
    tokens = [token for token, _ in places]
    top = [rival for _, rivals in places for rival in rivals]
    return Logprobs(
        row=row,
        of_prompt=of_prompt,
        token_ids=[token_id for token_id, _, _ in tokens],
        values=[value for _, _, value in tokens],
        top_ids=[token_id for token_id, _, _ in top],
        top_values=[value for _, _, value in top],
        pieces=[piece for _, piece, _ in (*tokens, *top)],
    )


def send(
    rig: Rig,
    request: GenerateRequest,
    text: str,
    places: Sequence[Place],
    finish: FinishReason = FinishReason.NONE,
    prompt: Sequence[Place] | None = None,
    matched: int | str | None = None,
) -> None:
    """One row; with `prompt` it is the first and brings that of the prompt."""
    token_ids = [token[0] for token, _ in places]
    openings = [] if prompt is None else [Opening(0, len(prompt) or 7, 2, ring_stamps(request))]
    logprobs = [part(places)] if places and request.sampling.logprobs is not None else []
    if prompt:
        logprobs.append(part(prompt, of_prompt=True))
    rig.ring.send(
        DeltaBatch(
            [request.rid],
            [text],
            [len(token_ids)],
            token_ids,
            [finish],
            openings,
            {} if matched is None else {0: matched},
            logprobs=logprobs,
        )
    )
