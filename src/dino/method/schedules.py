"""The schedules of section 3.2, each a function of the step: no state, so a resumed run needs none.

The learning rate warms up linearly and then follows a cosine, weight decay and teacher momentum follow a cosine, and
the teacher's temperature warms up linearly, epoch by epoch.
"""

import math
from typing import NamedTuple

from dino.config import Config, parse_duration, to_steps


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Cosine from ``start`` (at step 0) towards ``end`` (reached at ``steps``, one step after the last).

    >>> cosine(0, 1.0, 0.0, 4), round(cosine(2, 1.0, 0.0, 4), 12), cosine(4, 1.0, 0.0, 4)
    (1.0, 0.5, 0.0)
    """
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def ramp(step: int, start: float, end: float, steps: int) -> float:
    """Linear ramp over ``steps`` points, both ends included; a single point gives ``start``.

    >>> [ramp(s, 0.0, 1.0, 3) for s in range(3)], ramp(0, 0.0, 1.0, 1)
    ([0.0, 0.5, 1.0], 0.0)
    """
    return start + (end - start) * step / max(steps - 1, 1)


def warmup_cosine(step: int, peak: float, end: float, steps: int, warmup: int, start: float = 0.0) -> float:
    """Linear warm-up from ``start`` to ``peak`` over the first ``warmup`` steps, then a cosine to ``end``."""
    if step < warmup:
        return ramp(step, start, peak, warmup)
    return cosine(step - warmup, peak, end, steps - warmup)


class Now(NamedTuple):
    """What the schedules say at one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    backbone_share: float = 1.0  # Of the learning rate: 0 while only the head is trained.


class Schedules:
    """All schedules of one run.

    A warm-up that does not fit into the run (a short run of a long recipe) is cut to half of it; ``notes`` says so.

    Args:
        config: the run's configuration.
        steps_per_epoch: optimizer steps in one pass over the images.

    Raises:
        ValueError: the run is shorter than one step.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        self.notes: list[str] = []
        self._optim, self._method = config.optim, config.method
        self._steps_per_epoch = steps_per_epoch
        self.total_steps = self.steps(config.optim.length, "optim.length")
        if self.total_steps < 1:
            raise ValueError(
                f"--optim.length {config.optim.length!r} is less than one step of {config.optim.batch_size} images"
            )
        self.warmup_steps = self._fit(self.steps(config.optim.warmup, "optim.warmup"), "learning-rate warm-up")
        self.freeze_steps = self._fit(
            self.steps(config.optim.freeze_last_layer, "optim.freeze-last-layer"), "last-layer freeze"
        )
        self._warm_head = self._fit(self.steps(config.adapt.warm_head, "warm-head"), "head's warm-up")
        # The released code raises the temperature once an epoch. A warm-up given in steps or images rises every step.
        by_epoch = parse_duration(config.method.warmup_teacher_temp_for)[1] == "ep"
        self._temp_stage = steps_per_epoch if by_epoch else 1
        warmup = self.steps(config.method.warmup_teacher_temp_for, "method.warmup-teacher-temp-for")
        self._temp_stages = math.ceil(self._fit(warmup, "teacher-temperature warm-up") / self._temp_stage)
        self.peak_lr = config.optim.base_lr * config.optim.batch_size / 256  # Linear scaling rule, section 3.2.

    def steps(self, duration: str, name: str) -> int:
        """A duration of this run in steps."""
        return to_steps(duration, self._steps_per_epoch, self._optim.batch_size, name)

    def _fit(self, steps: int, what: str) -> int:
        if steps <= self.total_steps or steps == 0:
            return steps
        self.notes.append(
            f"the {what} of {steps} steps is cut to {self.total_steps // 2}: the run has {self.total_steps}"
        )
        return self.total_steps // 2

    def at(self, step: int) -> Now:
        """The values used in step ``step``, 0 <= step < total_steps."""
        optim, method = self._optim, self._method
        stage = step // self._temp_stage
        warming = stage < self._temp_stages
        return Now(
            lr=warmup_cosine(step, self.peak_lr, optim.min_lr, self.total_steps, self.warmup_steps),
            weight_decay=cosine(step, optim.weight_decay, optim.weight_decay_end, self.total_steps),
            teacher_momentum=cosine(step, method.teacher_momentum, 1.0, self.total_steps),
            teacher_temp=ramp(stage, method.warmup_teacher_temp, method.teacher_temp, self._temp_stages)
            if warming
            else method.teacher_temp,
            backbone_share=min(max(step / self._warm_head - 1, 0.0), 1.0) if self._warm_head else 1.0,
        )
