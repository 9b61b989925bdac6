"""The notebook runs from its first cell to its last."""

import json
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "curves.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_has_the_output_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its cells in one namespace, as a kernel runs them, with shorter runs elsewhere; expressions are evaluated too."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    started: list[list[str]] = []
    run = subprocess.run

    def shorter(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        own = [word for word in command if not word.startswith("output_dir=")]
        started.append(own)
        return run([*own, "train.steps=20", f"output_dir={tmp_path}"], **options)

    monkeypatch.setattr(subprocess, "run", shorter)
    monkeypatch.setattr(plt, "show", lambda: None)
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        if number == 0:
            namespace["output"] = tmp_path
    assert len(started) == 1
    assert {*namespace["metrics"].optimizer} == {"adamw", "lion", "sophiag"}
    assert plt.get_fignums() == [1, 2]
    plt.close("all")
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2
