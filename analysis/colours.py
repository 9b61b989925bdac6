"""One colour and one label for each arm, the same in every figure, table and page."""

from __future__ import annotations

from collections.abc import Iterable

# Distinguishable with the common colour vision deficiencies, and legible as thin lines on white.
_COLOURS = {
    "adamw": "#1f4e9c",
    "lion": "#c98a00",
    "sophiag": "#c2342b",
    "sophiah": "#7b3fa0",
    "muon": "#1b7f5c",
    "signum": "#6b6b6b",
    "adahessian": "#8c564b",
}
_OTHERS = ("#0f8ea8", "#b5478f", "#5d7a12", "#3d3d8f", "#a0522d")
_LABELS = {
    "adamw": "AdamW",
    "lion": "Lion",
    "sophiag": "Sophia-G",
    "sophiah": "Sophia-H",
    "sophia": "Sophia",
    "muon": "Muon",
    "signum": "Momentum-sign",
    "adahessian": "AdaHessian",
}


def label(arm: str) -> str:
    """Return the display name of an arm: "sophiag" -> "Sophia-G"; an unknown arm keeps its name."""
    return _LABELS.get(arm, arm)


def colours(arms: Iterable[str]) -> dict[str, str]:
    """Return a colour ("#rrggbb") for each arm: known optimizers have fixed colours, other arms take the next free one."""
    arms = list(dict.fromkeys(arms))
    others = [arm for arm in arms if arm not in _COLOURS]
    return {arm: _COLOURS.get(arm) or _OTHERS[others.index(arm) % len(_OTHERS)] for arm in arms}
