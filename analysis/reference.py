"""Published numbers to compare a study with, from results/reference.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

REFERENCE_FILE = Path(__file__).resolve().parent.parent / "results" / "reference.json"


class PublishedLoss(BaseModel):
    """A published final validation loss (nats)."""

    source: str  # key of `Reference.sources`
    model: str | None  # our name of the same model, if any
    size: str
    arm: str
    loss: float
    steps: int | None = None
    chinchilla: float | None = None  # tokens in multiples of 20 per parameter, if the source uses this unit


class OtherFinding(BaseModel):
    """A published result that is not a final loss."""

    source: str
    size: str
    finding: str


class Reference(BaseModel):
    """Published results with their sources and the flaws of these, the paper's sensitivity grid and its claims."""

    sources: dict[str, str]
    flaws: dict[str, str]  # by source
    losses: list[PublishedLoss] = Field(alias="final_losses")
    others: list[OtherFinding] = Field(alias="other_findings")
    sensitivity_grid: dict[str, Any]
    claims: dict[str, Any]

    def of(self, model: str) -> list[PublishedLoss]:
        """Return the paper's losses for one of our models, best first."""
        found = [one for one in self.losses if one.model == model and one.source == "paper"]
        return sorted(found, key=lambda one: one.loss)


def load_reference() -> Reference:
    return Reference.model_validate_json(REFERENCE_FILE.read_bytes())
