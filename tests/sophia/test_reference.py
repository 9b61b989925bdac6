"""ReferenceSophiaG against the authors' loop and update, transcribed from their published sophia.py and train
script."""

import pytest
import torch
from torch import Tensor

from sophia import ReferenceSophiaG, SophiaG


class AuthorsSophiaG:
    """Their _single_tensor_sophiag and update_hessian, in their order of operations."""

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], rho: float, weight_decay: float):
        self.params, self.lr, self.betas, self.rho, self.weight_decay = params, lr, betas, rho, weight_decay
        self.exp_avg = [torch.zeros_like(p) for p in params]
        self.hessian = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def update_hessian(self) -> None:
        for p, hessian in zip(self.params, self.hessian, strict=True):
            hessian.mul_(self.betas[1]).addcmul_(p.grad, p.grad, value=1 - self.betas[1])

    @torch.no_grad()
    def step(self, bs: int) -> None:
        for p, exp_avg, hess in zip(self.params, self.exp_avg, self.hessian, strict=True):
            p.mul_(1 - self.lr * self.weight_decay)
            exp_avg.mul_(self.betas[0]).add_(p.grad, alpha=1 - self.betas[0])
            ratio = (exp_avg.abs() / (self.rho * bs * hess + 1e-15)).clamp(None, 1)
            p.addcmul_(exp_avg.sign(), ratio, value=-self.lr)


@pytest.mark.parametrize("foreach", [False, True])
def test_reference_sophia_equals_the_authors_code(foreach: bool) -> None:
    k, clip, bs = 3, 1.0, 40
    torch.manual_seed(0)
    theirs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 3), (5,))]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    hyper = {"lr": 0.03, "betas": (0.965, 0.99), "rho": 0.04, "weight_decay": 0.1}
    reference = AuthorsSophiaG(theirs, **hyper)
    optimizer = ReferenceSophiaG(ours, **hyper, bs=bs, hessian_interval=k, estimator_clip=clip, foreach=foreach)
    assert not optimizer.hessian_due
    for t in range(1, 20):
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p)
            p.grad[0], p.grad[1] = 0, 1e-15 * p.grad[1]  # as for tokens that have not been seen, or hardly
            q.grad = p.grad.clone()
        reference.step(bs)
        optimizer.step()
        assert optimizer.hessian_due == (t % k == 0)
        if t % k == 0:  # after the step, and clipped
            for p, q in zip(theirs, ours, strict=True):
                p.grad = 2 * torch.randn_like(p)
                p.grad[:2] = 0
                q.grad = p.grad.clone()
            torch.nn.utils.clip_grad_norm_(theirs, clip)
            reference.update_hessian()
            optimizer.update_hessian()
        for p, q, m, h in zip(theirs, ours, reference.exp_avg, reference.hessian, strict=True):
            torch.testing.assert_close(q.detach(), p.detach())
            torch.testing.assert_close(optimizer.state[q]["exp_avg"], m)
            torch.testing.assert_close(optimizer.state[q]["hessian"], h)


def test_the_papers_form_is_the_same_with_gamma_as_the_documentation_says() -> None:
    """γ = ρ·bs/N once the schedule, the floor and the clip are out of the way."""
    torch.manual_seed(0)
    n, rho, bs = 64, 0.04, 480
    ours, theirs = (torch.nn.Parameter(torch.zeros(30, dtype=torch.float64)) for _ in range(2))
    paper = SophiaG([ours], lr=0.01, betas=(0.96, 0.99), gamma=rho * bs / n, eps=1e-30)
    reference = ReferenceSophiaG(
        [theirs], lr=0.01, betas=(0.96, 0.99), rho=rho, bs=bs, weight_decay=0.2, estimator_clip=1e9
    )
    for t in range(20):
        if t % 5 == 0:
            ours.grad = torch.randn(30, dtype=torch.float64)
            theirs.grad = ours.grad.clone()
            paper.update_hessian(num_predictions=n)
            reference.update_hessian()
        ours.grad = torch.randn(30, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        paper.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), theirs.detach())
