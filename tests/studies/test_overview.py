"""The planned cost of a study, against a count by hand."""

from typing import Any

import pytest

from studies.overview import costs, curvature_share, plan_table, speeds_of
from studies.spec import StudySpec, validate_spec
from tests.studies.small import small
from training.compose import compose
from training.config import ConfigurationError


def spec() -> StudySpec:
    values: dict[str, Any] = small()
    values["base"] += ["eval.interval=40", "eval.tokens=3000"]
    return validate_spec(values, "small.yaml")


def test_trials_steps_tokens_and_hours_are_those_of_the_file() -> None:
    found = costs(spec(), {"gpt2_nano": 1000.0}, start_seconds=5.0)
    adamw = found["gpt2_nano", "adamw"]
    # Tuned: 6 at 50 steps, 3 at 25 and 3 at 100. Reported: three seeds at each.
    assert (adamw.tuning, adamw.reporting) == (12, 9)
    assert adamw.steps == 9 * 50 + 6 * 25 + 6 * 100
    assert adamw.tokens == 8 * 64 * adamw.steps
    # Evaluations at the start, every 40 steps and at the end, a third of a training token each.
    evaluations = 9 * 3 + 6 * 2 + 6 * 4
    assert adamw.seconds == pytest.approx(21 * 5 + adamw.tokens / 1000 + evaluations * 3000 / 3 / 1000)


def test_the_plan_includes_the_curvature_pass() -> None:
    found = costs(spec(), {"gpt2_nano": 1000.0}, start_seconds=0.0)
    sophia, k1 = found["gpt2_nano", "sophiag"], found["gpt2_nano", "sophiag_k1"]
    evaluated = 9 * 3 + 6 * 4
    assert sophia.seconds == pytest.approx(1.05 * sophia.tokens / 1000 + evaluated)
    assert k1.seconds == pytest.approx(1.5 * k1.tokens / 1000 + 2 * 3)


def test_a_model_of_unknown_speed_has_no_hours() -> None:
    found = costs(spec(), {"gpt2_nano": 1000.0}, start_seconds=0.0)
    assert found["gpt2_micro", "adamw"].seconds is None
    assert found["gpt2_micro", "adamw"].steps == 50 * (3 + 2)


@pytest.mark.parametrize(("tokens", "said"), [("null", True), ("3000", False)])
def test_the_hours_say_when_they_lack_the_evaluations(tokens: str, said: bool) -> None:
    values = small()
    values["base"] += [f"eval.tokens={tokens}"]
    caption = plan_table(validate_spec(values, "small.yaml"), {"gpt2_nano": 1000.0}, 0.0).caption
    assert (", evaluations not counted (eval.tokens=null)" in str(caption)) is said


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        (["optimizer=adamw"], 0.0),
        (["optimizer=sophiag"], 0.05),
        (["optimizer=sophiah"], 0.02),
        (["optimizer=adahessian", "optimizer.estimator=hutchinson_differences"], 2 / 150),
    ],
)
def test_the_share_of_curvature_is_that_of_its_flops(overrides: list[str], share: float) -> None:
    assert curvature_share(compose(overrides)) == pytest.approx(share)


@pytest.mark.parametrize("given", ["gpt2_xl=3", "gpt2_nano", "gpt2_nano=fast", "gpt2_nano=0", "gpt2_nano=-1"])
def test_a_speed_that_cannot_be_used_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="expected <model>=<tokens per second> with one of gpt2_nano"):
        speeds_of(spec(), [given])
