"""The objective of each optimiser step: fixed, or with a temperature that steps down and a soft weight that moves.

Between stored temperatures a truncated target is not exact, so a schedule from 3 to 1 is a staircase over those that
are stored, each for an equal share of the run. The soft weight is a factor times `soft_weight`; at step s of S, with
w steps of warmup and d = S // 5 of descent:

    constant   1
    wsd        min(s / w, 1, (S - s) / d): up, level, down, as the learning rate of that name (arXiv 2410.16215)
    cosine     (1 + cos(pi s / S)) / 2
    linear     1 - s / S

All of it is a function of the step alone: a run that is resumed at a step continues as if it had not stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kdcache.errors import ConfigError
from kdcache.losses import Objective, PositionWeights
from kdcache.store.manifest import Manifest
from kdcache.student.config import TrainConfig
from kdcache.student.rollouts import require_rollouts


@dataclass(frozen=True)
class Schedule:
    """What a run minimises at each of its steps.

    Attributes:
        stairs: the objectives, in order; never empty.
        weights: how much each position counts.
        steps: of the whole run.
        soft_schedule: how the soft weight moves.
        warmup, descent: steps that `wsd` takes up and down.
    """

    stairs: tuple[Objective, ...]
    weights: PositionWeights
    steps: int
    soft_schedule: str = "constant"
    warmup: int = 0
    descent: int = 1

    @staticmethod
    def of(
        config: TrainConfig, manifest: Manifest, steps: int, partners: Mapping[str, Manifest] = MappingProxyType({})
    ) -> Schedule:
        """The schedule of a configuration over a cache, and those of other teachers by name.

        Its stairs are temperatures at which all of them are exact.

        Raises:
            ConfigError: a loss, tail or temperature that does not exist or that the cache cannot give.
            TargetError: one that its kind of targets cannot give.
        """
        first, last = config.temperature_ends()
        base = Objective(loss=config.loss, tail=config.tail, soft_weight=config.soft_weight)
        everyone = {"the cache": manifest, **partners}
        for t, (name, each) in itertools.product((first, last), everyone.items()):
            if not base.any_temperature and not each.exact_at(t):
                stored = ", ".join(f"{t:g}" for t in each.temperatures)
                raise ConfigError(
                    f"temperature {t:g} is not exact: {name} stores temperature(s) {stored}; choose one "
                    f"of them, or dump again with temperatures 1,{t:g}"
                )
        stored_by_any = {t for each in everyone.values() for t in each.temperatures}
        between = {t for t in stored_by_any if all(each.exact_at(t) for each in everyone.values())}
        between = {t for t in between if min(first, last) < t < max(first, last)}
        ladder = sorted({first, last} | between, reverse=first > last)
        stairs = tuple(dataclasses.replace(base, temperature=t) for t in ladder)
        weights = PositionWeights(config.position_weights)
        for name, each in everyone.items():
            rule = each.rule
            for stair in stairs:
                stair.require_fit(rule.kind, rule.sampled, rule.target_temperature)
            weights.require_known(each.known)
            if base.takes_label_logprob:
                each.known.require("label_logprob", f"loss {config.loss}", name)
            if config.tail == "label-sample" and rule.labelled:
                raise ConfigError(
                    f"tail label-sample needs labels that are entries only where the selection keeps them, but "
                    f"{name} was dumped with force_label, where a label is never a sample of the tail"
                )
        if base.takes_rollouts:
            require_rollouts(manifest, config.loss)
        return Schedule(stairs, weights, steps, config.soft_schedule, *ramps(config, steps))

    def at(self, step: int) -> Objective:
        """The objective of a step, counted from 0."""
        stair = self.stairs[min(len(self.stairs) - 1, step * len(self.stairs) // self.steps)]
        return dataclasses.replace(stair, soft_weight=stair.soft_weight * self._soft_factor(step))

    def _soft_factor(self, step: int) -> float:
        if self.soft_schedule == "wsd":
            return max(0.0, min(step / self.warmup if self.warmup else 1.0, 1.0, (self.steps - step) / self.descent))
        if self.soft_schedule == "cosine":
            return (1 + math.cos(math.pi * step / self.steps)) / 2
        if self.soft_schedule == "linear":
            return 1 - step / self.steps
        return 1.0


def ramps(config: TrainConfig, steps: int) -> tuple[int, int]:
    """Steps that a `wsd` schedule rises over, and that it falls over: its last fifth."""
    return round(config.warmup * steps), max(1, steps // 5)
