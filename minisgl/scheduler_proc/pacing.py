"""How much prompt a step may compute beside running streams, learnt from how long steps take."""

from __future__ import annotations

MOST_ADDED, LEAST_ADDED = 1.0, 0.5
"""How much longer a step may get by prompt tokens, in quiet steps from before they came, and by how much always."""
ALTOGETHER = 2.5
"""How long such a step is to be when streams grow meanwhile, counted likewise. Promised are 3, and steps vary."""
CROWD_STRETCH = 4.0
"""How many steps longer one may be for a crowd that waits. With no bound all of 32 had their first token after 600 ms;
with this one half of them had it after 350, the last after 750 (0.5B's shape, two cores), at the same throughput."""
PROBE_STEPS = 16
"""After so many steps with prompt tokens comes one without. Streams grow while a long prompt is computed, and so does
their part of a step; it would be blamed on the prompt, which would get on ever more slowly."""
QUIET_WEIGHT = 0.2
PROBE_WEIGHT = 0.5
LOWERED_WEIGHT = 0.5


class PromptPacer:
    """Learns the time of a step without prompt tokens, and what each prompt token adds to it.

    A later chunk of a long prompt costs more than an early one, since it sees more positions; a rise is therefore
    believed at once, a fall by and by. How much longer a step may get is a share of a quiet one before the prompt came,
    as that is what streams compare with. While a crowd begins, no step is without prompt tokens: what more rows decode
    than in the last quiet steps is taken to cost as much as prompt tokens do.
    """

    def __init__(self) -> None:
        self._quiet: float | None = None
        self._quiet_rows = 0.0
        self._before, self._before_rows = 0.0, 0.0
        """What these were when prompt tokens last began to come, or are."""
        self._prompt_steps = 0
        """Since the last quiet one."""
        self._probing = False
        self._per_token: float | None = None

    def observe(self, decode_rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that has been computed."""
        if not prompt_tokens:
            if self._quiet is None:
                self._quiet, self._quiet_rows = seconds, float(decode_rows)
            weight = PROBE_WEIGHT if self._probing else QUIET_WEIGHT
            # A hiccup of the machine is no news about the model.
            self._quiet += weight * (min(seconds, 2 * self._quiet) - self._quiet)
            self._quiet_rows += weight * (decode_rows - self._quiet_rows)
            if not self._probing:
                self._before, self._before_rows = self._quiet, self._quiet_rows
            self._probing, self._prompt_steps = False, 0
            return
        self._prompt_steps += 1
        if decode_rows and self._quiet is None:
            return
        if not decode_rows and self._per_token is not None:
            return
        added = seconds - self._quiet if decode_rows and self._quiet is not None else seconds
        cost = max(added, 0.0) / (prompt_tokens + max(decode_rows - self._quiet_rows, 0.0))
        if self._per_token is None or cost > self._per_token:
            self._per_token = cost
        else:
            self._per_token += LOWERED_WEIGHT * (cost - self._per_token)

    def prompt_tokens(self, decode_rows: int = 0, waiting_for_each: float = 0.0) -> int | None:
        """Most prompt tokens beside decoding rows; None while that is unknown, or if they cost nothing; 0 for a probe.

        Args:
            decode_rows: how many there are.
            waiting_for_each: how many requests, for each one that decodes, could get their first token in one step. Up
                to so many quiet steps more cost those that run less than they spare those that wait.
        """
        if self._quiet is None or not self._per_token:
            return None
        self._probing = self._prompt_steps >= PROBE_STEPS
        if self._probing:
            return 0
        before = self._before + max(decode_rows - self._before_rows, 0.0) * self._per_token
        now = self._quiet + max(decode_rows - self._quiet_rows, 0.0) * self._per_token
        added = min(max(ALTOGETHER * before - now, LEAST_ADDED * before), MOST_ADDED * before)
        added = max(added, min(waiting_for_each, CROWD_STRETCH) * before)
        return max(int(added / self._per_token), 1)
