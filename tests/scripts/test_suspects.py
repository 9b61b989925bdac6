"""Contrasts over several studies, paired by seed."""

import shutil
from pathlib import Path

import pytest

from scripts import suspects
from scripts.suspects import SUSPECTS, main
from studies.spec import load_spec
from tests.analysis.synthetic import write_run, write_tables


def test_every_cell_is_an_arm_of_its_study() -> None:
    for study, arm in {cell for rows in SUSPECTS.values() for row in rows for cell in (*row.plus, *row.minus)}:
        spec = load_spec(study)
        assert arm in {*spec.arms, *spec.ablations}


def test_a_page_and_a_figure_for_each_suspect_are_written(tmp_path: Path) -> None:
    for study in (suspects.EPS, suspects.KINDS, suspects.POWER, suspects.SMALL, suspects.LARGE):
        spec = load_spec(study)
        values = {"name": study, "baseline": spec.baseline, "models": {"tiny": {"seeds": [31, 32]}}}
        values |= {"tuning": {"method": "grid", "trials": 1}, "arms": {arm: {"search": {}} for arm in spec.arms}}
        values |= {"ablations": {arm: {"of": one.of, "values": {"seed": 1}} for arm, one in spec.ablations.items()}}
        trials = []
        for place, arm in enumerate([*spec.arms, *spec.ablations]):
            for seed in (31, 32):
                final = 4.0 + 0.01 * place + (0.001 if seed == 32 else 0.0) * place
                optimizer = "adamw" if arm.startswith("adamw") else "sophiag"
                run = write_run(
                    tmp_path / "runs" / f"{study}-{arm}-{seed}",
                    optimizer=optimizer,
                    seed=seed,
                    steps=4,
                    final=final,
                    train_lines=False,
                )
                row = {"arm": arm, "phase": "reporting", "model": "tiny", "horizon": 4, "seed": seed}
                trials.append((row, run))
        write_tables(tmp_path / "results" / study, values, trials)
    assert main(["--records", str(tmp_path / "results"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "why.md").read_text()
    # Places of the arms of claim_kinds: adamw 0, sophiag 1, signum 2, on_embedding 3, on_attention 4, on_mlp 5.
    assert "| Sophia-G − AdamW | +0.010 [-0.021, +0.042] | 2 |" in page
    assert "| momentum-sign (h = 0) − Sophia-G | +0.010 [-0.021, +0.042] | 2 |" in page
    assert "| last − first | +0.000 [+0.000, +0.000] | 2 |" in page
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"why.md", *(f"why_{one}.png" for one in SUSPECTS)}
    shutil.rmtree(tmp_path / "results" / suspects.POWER)  # as if it had not begun
    assert main(["kinds", "eps", "--records", str(tmp_path / "results"), "--output", str(tmp_path / "two")]) == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"why.md", "why_kinds.png", "why_eps.png"}
    with pytest.raises(SystemExit):
        main(["kind"])
