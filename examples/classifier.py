"""Sophia on a classifier: a network learns to separate three spirals, with either estimator.

    python examples/classifier.py --estimator gnb
    python examples/classifier.py --estimator hutchinson

A classifier makes one prediction per example, so N counts examples; in a language model it counts tokens. For a
regression pass likelihood=Gaussian(variance=0.5), for several binary labels likelihood=Bernoulli()
(sophia.likelihoods).
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH, gauss_newton_bartlett, hutchinson


def spirals(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """(3 · per_class, 2) points on three noisy spiral arms, and (3 · per_class,) their arms."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(3, per_class, generator=generator).sqrt()
    angle = 2 * math.pi * (torch.arange(3).unsqueeze(1) / 3 + radius)
    points = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
    points += 0.02 * torch.randn(points.shape, generator=generator)
    return points.flatten(0, 1), torch.arange(3).repeat_interleave(per_class)


def main(arguments: list[str] | None = None) -> float:
    """Return the accuracy on new points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", choices=("gnb", "hutchinson"), default="gnb")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    x, y = spirals(300, options.seed)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    make = SophiaG if options.estimator == "gnb" else SophiaH
    optimizer = make(model.parameters(), lr=options.lr, gamma=1.0, weight_decay=0.0, hessian_interval=5)
    for step in range(1, options.steps + 1):
        optimizer.param_groups[0]["lr"] = options.lr * (1 - (step - 1) / options.steps)
        rows = torch.randint(len(x), (128,))
        inputs, targets = x[rows], y[rows]

        # ---- Sophia
        if optimizer.hessian_due and options.estimator == "gnb":
            n = gauss_newton_bartlett(lambda: model(inputs), seed=options.seed, step=step)  # noqa: B023
            optimizer.update_hessian(num_predictions=n)
            optimizer.zero_grad()
        elif optimizer.hessian_due:
            estimates = hutchinson(
                lambda: F.cross_entropy(model(inputs), targets),  # noqa: B023
                model.parameters(),
                seed=options.seed,
                step=step,
            )
            optimizer.update_hessian(estimates=estimates)
        # ----

        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0:
            unclipped = float(optimizer.unclipped_count) / optimizer.numel
            print(f"step {step:4d}  loss {loss.item():.3f}  unclipped {unclipped:.2f}")
    test_x, test_y = spirals(300, options.seed + 1)
    accuracy = (model(test_x).argmax(-1) == test_y).float().mean().item()
    print(f"accuracy on new points {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
