"""Sophia-G in a plain PyTorch loop: a small character-level language model memorises a text.

    python examples/plain_loop.py --steps 200
    python examples/plain_loop.py --text my.txt --steps 2000

The marks enclose what Sophia adds to a training loop: every k steps, a backward pass with labels sampled from the
model. `update_hessian` turns its gradient and the number of predictions into a curvature estimate.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia import SophiaG, gauss_newton_bartlett

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the
season of Darkness, it was the
spring of hope, it was the winter of despair, we had everything before us, we had nothing before us."""


class CharacterModel(nn.Module):
    """A causal two-layer Transformer over characters."""

    def __init__(self, vocab_size: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, V)
        length = tokens.shape[1]
        x = self.characters(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        return self.head(self.layers(x, mask=mask, is_causal=True))


def main(arguments: list[str] | None = None) -> list[float]:
    """Return the training losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file (default: a sentence by Dickens)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    text = options.text.read_text() if options.text else TEXT
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(character) for character in text])
    torch.manual_seed(options.seed)
    model = CharacterModel(len(alphabet), options.length)

    optimizer = SophiaG(model.parameters(), lr=options.lr, gamma=1.0, weight_decay=0.1, hessian_interval=10)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, eta_min=0.05 * options.lr)
    losses = []
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(data) - options.length - 1, (options.batch, 1))
        window = data[starts + torch.arange(options.length + 1)]
        x, y = window[:, :-1], window[:, 1:]

        # ---- Sophia: refresh the curvature at the weights before the step
        if optimizer.hessian_due:
            half = x[: options.batch // 2]
            n = gauss_newton_bartlett(lambda: model(half), seed=options.seed, step=step)  # noqa: B023
            optimizer.update_hessian(num_predictions=n)
            optimizer.zero_grad()
        # ----

        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step == 1 or step % 20 == 0:
            unclipped = float(optimizer.unclipped_count) / optimizer.numel
            print(f"step {step:5d}  loss {losses[-1]:.3f}  unclipped {unclipped:.2f}")
    return losses


if __name__ == "__main__":
    main()
