"""Sophia, the scalable stochastic second-order optimizer; its curvature estimators; the baselines Lion, AdaHessian."""

from sophia.adahessian import AdaHessian
from sophia.estimators import (
    empirical_fisher,
    gauss_newton_bartlett,
    hutchinson,
    hutchinson_differences,
    sample_labels,
)
from sophia.lion import Lion
from sophia.optimizer import Sophia, SophiaG, SophiaH

__all__ = [
    "AdaHessian",
    "Lion",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "empirical_fisher",
    "gauss_newton_bartlett",
    "hutchinson",
    "hutchinson_differences",
    "sample_labels",
]
