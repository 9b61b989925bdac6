"""The motivating figure of the Sophia paper: five optimizers on a loss with a sharp direction, a flat one and a saddle.

    python scripts/toy_landscape.py --output results/toy_landscape

L(θ1, θ2) = 8 (θ1-1)² (1.3 θ1² + 2 θ1 + 1) + ½ (θ2-4)² has its minimum at (1, 4), where the curvature is 68.8 in θ1
and 1 in θ2, and a saddle at (0, 4): its curvature in θ1 is negative on (-0.366, 0.596), where all five start. Each
method except Newton's uses the learning rate of a grid with the lowest loss after the last step.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from data.files import write_json, written_beside
from sophia import Sophia

START = (0.17, 0.0)
MINIMUM, SADDLE = (1.0, 4.0), (0.0, 4.0)
STEPS = 50


def loss(theta: Tensor) -> Tensor:
    """(2, …) -> (…)"""
    first, second = theta
    return 8 * (first - 1) ** 2 * (1.3 * first**2 + 2 * first + 1) + (second - 4) ** 2 / 2


class Method(NamedTuple):
    """A method's optimizer, and how it changes the gradient before the step; the Hessian is exact."""

    make: Callable[[Tensor, float], torch.optim.Optimizer]
    learning_rates: tuple[float, ...]
    prepare: Callable[[torch.optim.Optimizer, Tensor, Tensor], None]  # optimizer, gradient (2,), point (2,)
    color: str


def _sgd(theta: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([theta], lr=lr)


def _adam(theta: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.95))


def _sophia(theta: Tensor, lr: float) -> torch.optim.Optimizer:
    # Gradients and curvature are exact, so there is nothing to average.
    return Sophia([theta], lr=lr, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0, hessian_interval=1)


def _hessian(theta: Tensor) -> Tensor:
    """(2,) -> (2, 2)"""
    return torch.func.hessian(loss)(theta)


def _as_it_is(optimizer: torch.optim.Optimizer, gradient: Tensor, theta: Tensor) -> None:
    pass


def _sign(optimizer: torch.optim.Optimizer, gradient: Tensor, theta: Tensor) -> None:
    gradient.sign_()


def _newton(optimizer: torch.optim.Optimizer, gradient: Tensor, theta: Tensor) -> None:
    gradient.copy_(torch.linalg.solve(_hessian(theta), gradient))


def _refresh(optimizer: torch.optim.Optimizer, gradient: Tensor, theta: Tensor) -> None:
    assert isinstance(optimizer, Sophia)
    optimizer.update_hessian(estimates=[_hessian(theta).diagonal()])


METHODS = {
    "GD": Method(_sgd, (0.005, 0.01, 0.015, 0.02, 0.025), _as_it_is, "tab:purple"),
    "SignGD": Method(_sgd, (0.05, 0.1, 0.2, 0.3), _sign, "tab:orange"),
    "Adam": Method(_adam, (0.05, 0.1, 0.2, 0.3), _as_it_is, "tab:green"),
    "Newton": Method(_sgd, (1.0,), _newton, "tab:blue"),
    "Sophia": Method(_sophia, (0.1, 0.2, 0.3, 0.5), _refresh, "tab:red"),
}


class Trajectory(NamedTuple):
    learning_rate: float
    theta: Tensor  # (steps + 1, 2)
    loss: Tensor  # (steps + 1,)


def descend(method: Method, learning_rate: float, steps: int = STEPS) -> Trajectory:
    """Take `steps` steps from START with a constant learning rate."""
    theta = torch.tensor(START, dtype=torch.float64).requires_grad_()
    optimizer = method.make(theta, learning_rate)
    path = [theta.detach().clone()]
    for _ in range(steps):
        (theta.grad,) = torch.autograd.grad(loss(theta), theta)
        method.prepare(optimizer, theta.grad, theta.detach())
        optimizer.step()
        path.append(theta.detach().clone())
    thetas = torch.stack(path)
    return Trajectory(learning_rate, thetas, loss(thetas.T))


def best(method: Method, steps: int = STEPS) -> Trajectory:
    """The trajectory with the lowest final loss over the method's learning rates."""
    return min((descend(method, lr, steps) for lr in method.learning_rates), key=lambda t: float(t.loss[-1]))


def draw(trajectories: dict[str, Trajectory]) -> plt.Figure:
    """Draw trajectories over contours on the left, loss against steps on the right."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.25, 1), layout="constrained")
    first, second = torch.meshgrid(torch.linspace(-1.1, 1.6, 400), torch.linspace(-0.6, 5.2, 400), indexing="ij")
    heights = loss(torch.stack([first, second]))
    plane.contour(
        first, second, heights, levels=torch.logspace(-1.2, 1.6, 22).tolist(), cmap="Greys_r", alpha=0.6, linewidths=0.7
    )
    for name, trajectory in trajectories.items():
        color = METHODS[name].color
        x, y = trajectory.theta.T
        label = f"{name}, lr {trajectory.learning_rate:g}"
        plane.plot(x, y, "o-", color=color, markersize=2.6, linewidth=1.1, label=label)
        curve.plot(trajectory.loss, color=color, linewidth=1.6, label=label)
    places = (("*", "minimum", MINIMUM, (26, -3)), ("X", "saddle", SADDLE, (7, 7)), ("s", "start", START, (7, -13)))
    for marker, name, point, offset in places:
        plane.plot(*point, marker, color="black", markersize=9 if marker == "*" else 6, zorder=5)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        plane.annotate(name, point, xytext=offset, textcoords="offset points", bbox=box)
    plane.set(xlabel="θ1 (sharp)", ylabel="θ2 (flat)", xlim=(-1.1, 1.6), ylim=(-0.6, 5.2))
    curve.set(xlabel="step", ylabel="loss", yscale="log", ylim=(1e-6, 40))
    curve.grid(alpha=0.3)
    curve.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/toy_landscape"), help="directory of the figure")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    trajectories = {name: best(method, arguments.steps) for name, method in METHODS.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    with written_beside(arguments.output / "toy_landscape.png") as file:
        draw(trajectories).savefig(file, format="png", dpi=160, metadata={"Software": None})
    table = {
        name: {
            "learning_rate": trajectory.learning_rate,
            "end": [round(value, 6) for value in trajectory.theta[-1].tolist()],
            "loss": float(trajectory.loss[-1]),
        }
        for name, trajectory in trajectories.items()
    }
    write_json(arguments.output / "toy_landscape.json", table)
    for name, row in table.items():
        print(f"{name:8} lr {row['learning_rate']:<6g} ends at {row['end']}, loss {row['loss']:.2e}")


if __name__ == "__main__":
    main()
