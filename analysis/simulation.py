"""Simulated studies with a known truth: how often intervals cover it, and how often a verdict is wrong."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.comparison import Contrast, Endpoints, compare, fit_baseline, smallest_detectable

Array = NDArray[np.float64]
STEPS = (1000, 2000, 4000, 8000)
ARM_STEPS = 4000
TRUTHS = (1.0, 1.2)  # how many times as fast the arm is
LEVEL = 0.95
_TOKENS_PER_STEP = 1000.0


@dataclass(frozen=True)
class Scenario:
    """Standard deviations (nats) of final losses over seeds, and the baseline's true loss."""

    name: str
    baseline: tuple[float, float, float, float]  # by horizon
    arm: float
    shared: float = 0.0  # what runs of one seed have in common
    bend: float = 0.0  # nats by which the true loss is off a power law

    def loss(self, steps: float) -> float:
        """The true loss (nats) of the baseline."""
        millions = steps * _TOKENS_PER_STEP / 1e6
        return float(2.4 + millions**-0.35 + self.bend * np.cos(2.5 * np.log(millions)))


SCENARIOS = (
    Scenario("equal variances", (0.002,) * 4, 0.002, shared=0.002),
    Scenario("the spreads of cpu_scale", (0.0462, 0.0380, 0.0102, 0.0147), 0.0177),
    Scenario("variances that differ 30-fold", (0.011, 0.002, 0.011, 0.002), 0.002),
    # By about what the seeds' noise hides, and by far more.
    Scenario("a slight bend, no power law", (0.002,) * 4, 0.002, shared=0.002, bend=0.004),
    Scenario("a strong bend, no power law", (0.002,) * 4, 0.002, shared=0.002, bend=0.03),
)


@dataclass(frozen=True)
class Rates:
    """Shares of simulated studies. Coverage is that of intervals at the 95 % level; NaN where no study has one."""

    same: float  # the interval at equal steps covers the true difference of loss
    half: float  # at half the steps
    ratios: float  # the self-test lets a ratio be computed
    ratio: float  # of these, the interval covers the true ratio
    faster: float  # the verdict is "faster"


def simulate(scenario: Scenario, truth: float, seeds: int, studies: int) -> Rates:
    """Simulate studies of one arm, `truth` times as fast as the baseline, with so many seeds."""
    rng = np.random.default_rng([seeds, studies])
    mean = scenario.loss(truth * ARM_STEPS)
    found = []
    for _ in range(studies):
        shared = rng.normal(0, scenario.shared, seeds)
        baseline = [
            _cell("baseline", steps, scenario.loss(steps) + shared + rng.normal(0, spread, seeds))
            for steps, spread in zip(STEPS, scenario.baseline, strict=True)
        ]
        arm = _cell("arm", ARM_STEPS, mean + shared + rng.normal(0, scenario.arm, seeds))
        (one,) = compare([arm], baseline, fit_baseline(baseline), LEVEL)
        assert isinstance(one.same, Contrast)
        found.append(
            Rates(
                same=_covers(one.same, mean - scenario.loss(ARM_STEPS)),
                half=_covers(one.half, mean - scenario.loss(2 * ARM_STEPS)),
                ratios=not isinstance(one.ratio, str),
                ratio=math.nan if isinstance(one.ratio, str) else one.ratio.covers(truth),
                faster=one.same.word == "lower",
            )
        )
    return Rates(**pd.DataFrame(found).astype(float).mean())


def coverage(studies: int) -> pd.DataFrame:
    """Return a row of `Rates`, in percent, for each scenario, number of seeds and true ratio."""
    scenarios, seeds, truths = zip(*itertools.product(SCENARIOS, (3, 5), TRUTHS), strict=True)
    with ProcessPoolExecutor(2) as pool:
        rates = list(pool.map(simulate, scenarios, truths, seeds, itertools.repeat(studies)))
    shares = pd.DataFrame(rates)
    shares.columns = pd.Index(["at equal steps", "at half the steps", "ratios given", "ratio", 'verdict "faster"'])
    cases = {
        "scenario": [scenario.name for scenario in scenarios],
        "seeds": seeds,
        "true ratio": [f"{truth:.1f}" for truth in truths],
    }
    return pd.DataFrame(cases).join(shares.map(lambda share: "–" if np.isnan(share) else f"{share:.1%}"))


def power_by_seeds() -> pd.DataFrame:
    """Return the true difference that is found four times in five, in standard deviations of one seed's difference."""
    return pd.DataFrame(
        {"seeds": n}
        | {
            f"{m} arm{'s' if m > 1 else ''}": f"{smallest_detectable(1.0, n, 1 - (1 - LEVEL) / m):.2f}"
            for m in (1, 3, 6)
        }
        for n in (2, 3, 5, 8, 12, 20)
    )


def _cell(arm: str, steps: int, losses: Array) -> Endpoints:
    tokens = np.full(len(losses), steps * _TOKENS_PER_STEP)
    return Endpoints(arm, "simulated", steps, tuple(range(len(losses))), losses, tokens, tokens)


def _covers(one: Contrast | str, truth: float) -> bool:
    assert not isinstance(one, str)
    return one.interval is not None and one.interval.low <= truth <= one.interval.high
