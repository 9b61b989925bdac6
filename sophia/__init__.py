"""Sophia, a scalable stochastic second-order optimizer, with its curvature estimators and the baselines Lion and AdaHessian.

optimizer = SophiaG(model.parameters(), lr=6e-4)
for step, (x, y) in enumerate(batches, start=1):
    if optimizer.hessian_due:
        n = gauss_newton_bartlett(lambda: model(x), seed=0, step=step)
        optimizer.update_hessian(num_predictions=n)
        optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
"""

from sophia.adahessian import AdaHessian
from sophia.diagnostics import UnclippedAlarm, curvature_summary, curvature_sums
from sophia.estimators import (
    empirical_fisher,
    gauss_newton_bartlett,
    hutchinson,
    hutchinson_differences,
)
from sophia.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, sample_labels
from sophia.lion import Lion
from sophia.reference import ReferenceSophiaG
from sophia.sophia import Sophia, SophiaG, SophiaH, refresh_due

__version__ = "0.1.0"

__all__ = [
    "AdaHessian",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Lion",
    "ReferenceSophiaG",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "UnclippedAlarm",
    "curvature_summary",
    "curvature_sums",
    "empirical_fisher",
    "gauss_newton_bartlett",
    "hutchinson",
    "hutchinson_differences",
    "refresh_due",
    "sample_labels",
]
