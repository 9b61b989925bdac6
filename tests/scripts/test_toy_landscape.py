"""The motivation figure shows what it is meant to show."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import toy_landscape
from scripts.toy_landscape import METHODS, MINIMUM, SADDLE, START, best, loss


@functools.cache
def found(name: str) -> Any:
    """The best path of a method."""
    return best(METHODS[name])


def test_the_landscape_has_the_minimum_saddle_and_curvatures_of_the_paper() -> None:
    for point, curvature in ((MINIMUM, (68.8, 1.0)), (SADDLE, None)):
        theta = torch.tensor(point, dtype=torch.float64)
        torch.testing.assert_close(torch.func.grad(loss)(theta), torch.zeros(2, dtype=torch.float64))
        hessian = torch.func.hessian(loss)(theta)
        if curvature is None:
            assert hessian[0, 0] < 0 < hessian[1, 1]
        else:
            torch.testing.assert_close(hessian.diagonal(), torch.tensor(curvature, dtype=torch.float64))
    assert torch.func.hessian(loss)(torch.tensor(START))[0, 0] < 0


def test_newton_converges_to_the_saddle_and_sophia_to_the_minimum() -> None:
    for name, point in (("Newton", SADDLE), ("Sophia", MINIMUM)):
        end = found(name).theta[-1]
        torch.testing.assert_close(end, torch.tensor(point, dtype=torch.float64), rtol=0, atol=1e-6)


def test_gd_crawls_in_the_flat_direction_while_signgd_and_adam_bounce_in_the_sharp_one() -> None:
    gd = found("GD").theta
    assert (gd[-1, 0] - 1).abs() < 1e-6
    assert gd[-1, 1] < 3
    for name in ("SignGD", "Adam"):
        sharp = found(name).theta[20:, 0] - 1
        assert (sharp.sign().diff() != 0).sum() >= 4
    losses = {name: found(name).loss[-1] for name in METHODS}
    assert min(losses, key=lambda name: losses[name]) == "Sophia"


def test_the_script_writes_its_figure_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["toy_landscape.py", "--output", str(tmp_path), "--steps", "5"])
    toy_landscape.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy_landscape.json", "toy_landscape.png"]
    assert "Newton   lr 1" in capsys.readouterr().out
