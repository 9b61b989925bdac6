"""Learning-rate schedules at the points where their definition is exact."""

import pytest

from training.compose import compose, validate_recorded
from training.config import ConfigurationError, ScheduleConfig
from training.schedule import learning_rate_factor


def schedule(**values: object) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"name": "cosine", "warmup_steps": 10, "final_ratio": 0.05, **values})


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(name: str) -> None:
    factors = [learning_rate_factor(schedule(name=name), step, 100) for step in range(1, 11)]
    assert factors == pytest.approx([step / 10 for step in range(1, 11)])


def test_cosine_is_half_way_in_the_middle_and_final_at_the_end() -> None:
    assert learning_rate_factor(schedule(), 55, 100) == pytest.approx((1 + 0.05) / 2)
    assert learning_rate_factor(schedule(), 100, 100) == pytest.approx(0.05)


def test_wsd_is_flat_then_linear_to_the_final_ratio() -> None:
    config = schedule(name="wsd", decay_share=0.2)
    assert learning_rate_factor(config, 80, 100) == 1.0
    assert learning_rate_factor(config, 90, 100) == pytest.approx((1 + 0.05) / 2)
    assert learning_rate_factor(config, 100, 100) == pytest.approx(0.05)


def test_wsd_decays_from_the_end_of_the_warmup_where_its_share_would_begin_before() -> None:
    config = schedule(name="wsd", warmup_steps=90, decay_share=0.2)
    assert [learning_rate_factor(config, step, 100) for step in (90, 95, 100)] == pytest.approx([1.0, 0.525, 0.05])


def test_warmup_steps_win_over_the_share() -> None:
    assert schedule(warmup_steps=None, warmup_share=0.25).warmup(100) == 25
    assert schedule(warmup_steps=None, warmup_share=0.19).warmup(8) == 2
    assert schedule(warmup_steps=3, warmup_share=0.25).warmup(100) == 3
    assert learning_rate_factor(schedule(warmup_steps=0), 1, 100) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "key", "value", "used_by"),
    [
        ("constant", "final_ratio", 0.1, "cosine or wsd"),
        ("constant", "decay_share", 0.5, "wsd"),
        ("cosine", "decay_share", 0.5, "wsd"),
    ],
)
def test_a_key_that_the_schedule_ignores_is_refused_unless_it_has_a_default(
    name: str, key: str, value: float, used_by: str
) -> None:
    line = (
        rf"schedule\.{key}={value}: has no effect with schedule={name}; leave it out .*, or choose schedule={used_by}$"
    )
    with pytest.raises(ConfigurationError, match=line):
        compose([f"schedule={name}", f"schedule.{key}={value}"])
    for accepted in ("wsd", *used_by.split(" or ")):
        assert getattr(compose([f"schedule={accepted}", f"schedule.{key}={value}"]).schedule, key) == value


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_what_studies_and_records_hold_is_accepted(name: str) -> None:
    recorded = compose([f"schedule={name}"]).model_dump(mode="json")
    assert {"final_ratio", "decay_share"} <= recorded["schedule"].keys()
    assert validate_recorded(recorded) == compose([f"schedule={name}"])
    compose(["schedule.final_ratio=0.05", f"schedule={name}"])  # the studies' base, whatever an arm chooses


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_rate_ends_at_a_twentieth_where_nothing_else_is_said(name: str) -> None:
    assert compose([f"schedule={name}"]).schedule.final_ratio == 0.05
    assert ScheduleConfig.model_validate({"name": name}).final_ratio == 0.05


@pytest.mark.parametrize(("steps", "share"), [(1, 0.9), (2, 0.8), (3, 0.99), (50, 0.999)])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_last_step_has_the_final_ratio_in_the_shortest_runs_too(name: str, steps: int, share: float) -> None:
    config = schedule(name=name, warmup_steps=None, warmup_share=share)
    assert learning_rate_factor(config, steps, steps) == pytest.approx(0.05)
