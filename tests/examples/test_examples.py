"""The examples run unchanged and learn their tasks."""

import pytest

from examples import classifier, plain_loop


def test_the_plain_loop_learns_its_text() -> None:
    losses = plain_loop.main(["--steps", "60", "--batch", "8"])
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_the_classifier_separates_the_spirals(estimator: str) -> None:
    assert classifier.main(["--estimator", estimator, "--steps", "150"]) > 0.95


@pytest.mark.slow
def test_the_trainer_learns_with_the_callback() -> None:
    from examples import huggingface_trainer

    losses = huggingface_trainer.main(["--steps", "30"])
    assert losses[-1] < losses[0] - 0.5


def test_the_callback_counts_only_tokens_that_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import huggingface_trainer

    counted: list[int] = []
    update = huggingface_trainer.SophiaG.update_hessian

    def recording(self: huggingface_trainer.SophiaG, num_predictions: int) -> None:
        counted.append(num_predictions)
        update(self, num_predictions=num_predictions)

    monkeypatch.setattr(huggingface_trainer.SophiaG, "update_hessian", recording)
    huggingface_trainer.main(["--steps", "11", "--batch", "4"])
    assert counted == [
        2 * 23,
        2 * 23,
    ]  # at steps 1 and 11: two sequences of 24 tokens, whose last has no successor
