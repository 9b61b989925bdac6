"""Sophia-G with the Hugging Face Trainer: the optimizer, and a callback that refreshes its curvature.

    python examples/huggingface_trainer.py --steps 60

The callback draws its own batches from the training set as a function of the step, so resuming needs only the
optimizer's state. Padding and the last token, which has no successor, do not count as predictions. It supports only one
process: under DistributedDataParallel, its backward pass would have to go through the wrapped model.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)

from sophia import SophiaG, gauss_newton_bartlett
from sophia.random import uniforms


class SophiaCallback(TrainerCallback):
    """Makes a Gauss-Newton-Bartlett estimate before every step at which the curvature is due.

    Args:
        optimizer: the Trainer's optimizer.
        dataset: the Trainer's training set.
        collate: turns a list of items into a batch with `input_ids` (B, T) and optionally `attention_mask` (B, T).
        batch_size: sequences per estimate; half of the training batch is enough.
        seed: of the choice of sequences and of the sampled labels.
    """

    def __init__(
        self,
        optimizer: SophiaG,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise RuntimeError(
                f"SophiaCallback supports one process, not {args.world_size}; see the module's docstring"
            )
        if not self.optimizer.hessian_due:
            return
        model, step = kwargs["model"], state.global_step + 1
        chosen = uniforms(self.seed, step, torch.arange(self.batch_size), stream="curvature batch")
        items = [self.dataset[int(index)] for index in (chosen * len(self.dataset)).long()]  # type: ignore[arg-type]
        inputs = {key: value.to(model.device) for key, value in self.collate(items).items() if key != "labels"}
        tokens = inputs["input_ids"]
        positions = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        positions = positions.masked_fill(inputs.get("attention_mask", torch.ones_like(tokens)) == 0, -1)
        n = gauss_newton_bartlett(
            lambda: model(**inputs).logits[:, :-1], seed=self.seed, step=step, positions=positions[:, :-1]
        )
        self.optimizer.update_hessian(num_predictions=n)
        self.optimizer.zero_grad()


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from a random number, modulo the vocabulary."""

    def __init__(self, size: int, length: int, vocab_size: int) -> None:
        starts = torch.randint(vocab_size, (size, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (starts + torch.arange(length)) % vocab_size

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def main(arguments: list[str] | None = None) -> list[float]:
    """Return the losses that the Trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    dataset = Counting(512, 24, vocab_size=50)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    optimizer = SophiaG(model.parameters(), lr=3e-3, gamma=0.05, weight_decay=0.1, hessian_interval=10)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            data_collator=collate,
            optimizers=(optimizer, schedule),
            callbacks=[SophiaCallback(optimizer, dataset, collate, batch_size=options.batch // 2)],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
