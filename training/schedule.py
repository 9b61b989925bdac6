"""Learning-rate schedules as a pure function of the step."""

import math

from training.config import ScheduleConfig


def learning_rate_factor(
    schedule: ScheduleConfig,
    step: int,  # t = 1, 2, …: the update about to be made
    steps: int,  # the run's length
) -> float:  # share of the peak learning rate
    """Linear warm-up to 1 at step `warmup`, then cosine, stable-then-linear-decay (wsd) or constant.

    The last step of cosine and wsd has `final_ratio`. Source: nanoGPT's cosine with warm-up; Hu et al. 2024 (MiniCPM) for wsd.
    """
    warmup = schedule.warmup(steps)
    if step <= warmup:
        return step / warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        progress = (step - warmup) / (steps - warmup)
        return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = min(max(1, round(schedule.decay_share * steps)), steps - warmup)
    if step <= steps - decay_steps:
        return 1.0
    return 1 - (1 - schedule.final_ratio) * (step - (steps - decay_steps)) / decay_steps
