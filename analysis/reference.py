"""The published numbers that a study is held against, from results/reference.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCE_FILE = Path(__file__).resolve().parent.parent / "results" / "reference.json"


@dataclass(frozen=True)
class PublishedLoss:
    """A final validation loss (nats) somebody published."""

    source: str  # key of `Reference.sources`
    model: str | None  # our name of the same model, where there is one
    size: str
    arm: str
    loss: float
    steps: int | None
    chinchilla: float | None  # tokens in multiples of 20 a parameter, where the source counts so


@dataclass(frozen=True)
class Reference:
    """Published losses, the paper's sensitivity grid and its claims, with their sources."""

    sources: dict[str, str]
    losses: tuple[PublishedLoss, ...]
    sensitivity_grid: dict[str, Any]
    claims: dict[str, Any]

    def of(self, model: str, *, source: str = "paper") -> list[PublishedLoss]:
        """What the source gives for one of our models, best first."""
        found = [one for one in self.losses if one.model == model and one.source == source]
        return sorted(found, key=lambda one: one.loss)


def load_reference(path: Path = REFERENCE_FILE) -> Reference:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Reference(
        sources=content["sources"],
        losses=tuple(
            PublishedLoss(
                source=one["source"],
                model=one["model"],
                size=one["size"],
                arm=one["arm"],
                loss=one["loss"],
                steps=one.get("steps"),
                chinchilla=one.get("chinchilla"),
            )
            for one in content["final_losses"]
        ),
        sensitivity_grid=content["sensitivity_grid"],
        claims=content["claims"],
    )
