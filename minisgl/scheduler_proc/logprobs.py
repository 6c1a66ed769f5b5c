"""Log probabilities for the rows that ask for them: float32, of the model's own distribution.

They are taken of the logits as the model gives them, before penalties, masks and temperature (as in vLLM, and in sglang
for greedy requests).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from minisgl.messages import Logprobs
from minisgl.scheduler_proc.models.forward_batch import to_device, to_host
from minisgl.scheduler_proc.request import Request, RowLogprobs, StepRow, scored_positions

ROWS_AT_ONCE = 64
"""Rows whose logits are in float32 at once."""


class Owner(NamedTuple):
    """Whose tokens these are, how many, and the position of the first."""

    request: Request
    position: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log probabilities on their way to the host.

    Attributes:
        owners: the requests of the tokens, in order.
        token_ids, values: int64 and float32 [tokens].
        top_ids, top_values: int64 and float32 [tokens, most], the likeliest tokens in their place, likeliest first.
    """

    owners: list[Owner]
    token_ids: torch.Tensor
    values: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    def arrived(self) -> Iterator[RowLogprobs]:
        """What each owner gets; on CUDA valid once the step is done."""
        token_ids, values = self.token_ids.tolist(), self.values.tolist()
        top_ids, top_values = self.top_ids.tolist(), self.top_values.tolist()
        end = 0
        for request, position, tokens in self.owners:
            begin, end = end, end + tokens
            most = request.sampling.logprobs or 0
            part = Logprobs(
                row=0,
                of_prompt=position < request.prompt_len,
                token_ids=token_ids[begin:end],
                values=values[begin:end],
                top_ids=[token_id for ids in top_ids[begin:end] for token_id in ids[:most]],
                top_values=[value for likeliest in top_values[begin:end] for value in likeliest[:most]],
            )
            yield RowLogprobs(request, position, part)


def score_rows(rows: Sequence[StepRow], logits: torch.Tensor, sampled: torch.Tensor) -> list[PendingLogprobs]:
    """Start computing what some rows of a step ask for.

    Args:
        logits: [n, vocab], any float dtype: first of the rows that sample, then of the rows' scored positions.
        sampled: int64 [rows that sample], their tokens.
    """
    if not any(row.request.asks_logprobs for row in rows):
        return []
    pending = []
    sampling = [row for row in rows if row.sample]
    asking = [index for index, row in enumerate(sampling) if row.request.sampling.logprobs is not None]
    if asking:
        owners = [Owner(row.request, row.start + row.length, 1) for row in (sampling[index] for index in asking)]
        (places,) = to_device([np.array(asking, np.int32)], logits.device)
        pending.append(_score(logits, places, sampled[places], owners))
    scored = [(row.request, positions) for row in rows if (positions := scored_positions(row))]
    if scored:
        owners = [Owner(request, positions.start + 1, len(positions)) for request, positions in scored]
        prompt = [token_id for request, at in scored for token_id in request.token_ids[at.start + 1 : at.stop + 1]]
        numbers = np.arange(len(sampling), len(sampling) + len(prompt), dtype=np.int32)
        places, token_ids = to_device([numbers, np.array(prompt, np.int32)], logits.device)
        pending.append(_score(logits, places, token_ids.long(), owners))
    return pending


def _score(logits: torch.Tensor, places: torch.Tensor, token_ids: torch.Tensor, owners: list[Owner]) -> PendingLogprobs:
    """Log probabilities of `token_ids` (int64 [tokens]) in the rows `places` (int32 [tokens]) of logits."""
    most = min(max(owner.request.sampling.logprobs or 0 for owner in owners), logits.shape[1])
    values, top_ids, top_values = [], [], []
    for rows, ids in zip(torch.split(places, ROWS_AT_ONCE), torch.split(token_ids, ROWS_AT_ONCE), strict=True):
        raw = logits.index_select(0, rows).float()
        total = raw.logsumexp(dim=-1, keepdim=True)
        likeliest = raw.topk(most, dim=-1)
        values.append((raw.gather(1, ids[:, None]) - total).squeeze(-1))
        top_ids.append(likeliest.indices)
        top_values.append(likeliest.values - total)
    columns = (token_ids, torch.cat(values), torch.cat(top_ids), torch.cat(top_values))
    return PendingLogprobs(owners, *(to_host(column) for column in columns))
