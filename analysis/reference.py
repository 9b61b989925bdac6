"""Published numbers to compare a study with, from results/reference.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCE_FILE = Path(__file__).resolve().parent.parent / "results" / "reference.json"


@dataclass(frozen=True)
class PublishedLoss:
    """A published final validation loss (nats)."""

    source: str  # key of `Reference.sources`
    model: str | None  # our name of the same model, if any
    size: str
    arm: str
    loss: float
    steps: int | None
    chinchilla: float | None  # tokens in multiples of 20 per parameter, if the source uses this unit


@dataclass(frozen=True)
class OtherFinding:
    """A published result that is not a final loss."""

    source: str
    size: str
    finding: str


@dataclass(frozen=True)
class Reference:
    """Published results with their sources and the flaws of these, the paper's sensitivity grid and its claims."""

    sources: dict[str, str]
    flaws: dict[str, str]  # by source
    losses: tuple[PublishedLoss, ...]
    others: tuple[OtherFinding, ...]
    sensitivity_grid: dict[str, Any]
    claims: dict[str, Any]

    def of(self, model: str, *, source: str = "paper") -> list[PublishedLoss]:
        """Return the source's losses for one of our models, best first."""
        found = [one for one in self.losses if one.model == model and one.source == source]
        return sorted(found, key=lambda one: one.loss)


def load_reference(path: Path = REFERENCE_FILE) -> Reference:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Reference(
        sources=content["sources"],
        flaws=content["flaws"],
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
        others=tuple(OtherFinding(**one) for one in content["other_findings"]),
        sensitivity_grid=content["sensitivity_grid"],
        claims=content["claims"],
    )
