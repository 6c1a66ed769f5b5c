"""How much prompt a step may compute beside running streams, learnt from how long steps take."""

from __future__ import annotations

STRETCH = 2.0
"""How long a step with prompt tokens may take, in steps without. What is promised is 3, and steps vary."""
CROWD_STRETCH = 4.0
"""How many steps longer one may be for a crowd that waits. With no bound all of 32 had their first token after 600 ms;
with this one half of them had it after 350, the last after 750 (0.5B's shape, two cores), at the same throughput."""
QUIET_WEIGHT = 0.2
LOWERED_WEIGHT = 0.5


class PromptPacer:
    """Learns the time of a step without prompt tokens, and what each prompt token adds to it.

    A later chunk of a long prompt costs more than an early one, since it sees more positions; a rise is therefore
    believed at once, a fall by and by.
    """

    def __init__(self) -> None:
        self._quiet: float | None = None
        self._per_token: float | None = None

    def observe(self, decode_rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that has been computed."""
        if not prompt_tokens:
            # A hiccup of the machine is no news about the model.
            quiet = seconds if self._quiet is None else min(seconds, 2 * self._quiet)
            self._quiet = quiet if self._quiet is None else self._quiet + QUIET_WEIGHT * (quiet - self._quiet)
            return
        if decode_rows and self._quiet is None:
            return
        if not decode_rows and self._per_token is not None:
            return
        added = seconds - self._quiet if decode_rows and self._quiet is not None else seconds
        cost = max(added, 0.0) / prompt_tokens
        if self._per_token is None or cost > self._per_token:
            self._per_token = cost
        else:
            self._per_token += LOWERED_WEIGHT * (cost - self._per_token)

    def prompt_tokens(self, waiting_for_each: float = 0.0) -> int | None:
        """Most prompt tokens beside decoding rows; None while that is unknown, or if they cost nothing.

        Args:
            waiting_for_each: how many requests, for each one that decodes, could get their first token in one step. Up
                to so many quiet steps more cost those that run less than they spare those that wait.
        """
        if self._quiet is None or not self._per_token:
            return None
        return int(max(STRETCH - 1, min(waiting_for_each, CROWD_STRETCH)) * self._quiet / self._per_token)
