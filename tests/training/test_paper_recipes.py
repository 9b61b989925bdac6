"""The paper's recipes, value by value against the published table (arXiv 2305.14342 and the authors' configurations)."""

import pytest

from training.compose import compose

SHAPES = {"125m": (12, 12, 768), "355m": (24, 16, 1024), "770m": (36, 20, 1280)}
# lr; Sophia: lr, gamma, weight decay
ADAMW = {"125m": 6e-4, "355m": 3e-4, "770m": 2e-4}
LION = {"125m": 1e-4, "355m": 1e-4, "770m": 8e-5}
SOPHIA_G = {"125m": (6e-4, 0.05, 0.2), "355m": (7e-4, 0.08, 0.2), "770m": (3e-4, 0.05, 0.2)}
SOPHIA_H = {"125m": (6e-4, 0.01, 0.2), "355m": (4e-4, 0.01, 0.2), "770m": (3e-4, 0.01, 0.2)}
ARMS = ("adamw", "lion", "sophiag", "sophiah")


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("arm", ARMS)
def test_recipe_has_the_published_values(size: str, arm: str) -> None:
    config = compose([f"experiment=paper/{size}_{arm}"])
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == SHAPES[size]
    assert (config.model.bias, config.model.dropout, config.model.attention_layer_scaling) == (False, 0.0, True)
    assert (config.train.global_batch_size, config.train.sequence_length, config.train.steps) == (480, 1024, 100_000)
    assert (config.train.grad_clip, config.train.precision) == (1.0, "bf16")
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 2000)
    assert config.schedule.final_ratio == (0.1 if arm == "sophiah" else 0.05)
    assert (config.data.name, config.tokenizer.name) == ("openwebtext", "gpt2")
    optimizer = config.optimizer
    assert optimizer.name == arm
    assert not optimizer.decay_embeddings  # as in the authors' code
    match arm:
        case "adamw":
            assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (ADAMW[size], (0.9, 0.95), 0.1)
        case "lion":
            assert (optimizer.lr, optimizer.betas) == (LION[size], (0.95, 0.98))
        case "sophiag" | "sophiah":
            table = SOPHIA_G if arm == "sophiag" else SOPHIA_H
            assert (optimizer.lr, optimizer.gamma, optimizer.weight_decay) == table[size]
            assert (optimizer.betas, optimizer.eps, optimizer.hessian_interval) == ((0.96, 0.99), 1e-12, 10)
            sequences = round(optimizer.batch_fraction * config.train.global_batch_size)
            assert (optimizer.estimator, sequences) == (("gnb", 240) if arm == "sophiag" else ("hutchinson", 32))


@pytest.mark.slow
def test_arms_of_one_size_differ_in_the_optimizer_alone() -> None:
    for size in SHAPES:
        recipes = [compose([f"experiment=paper/{size}_{arm}"]).identity() for arm in ("adamw", "lion", "sophiag")]
        for recipe in recipes:
            del recipe["optimizer"]
        assert recipes[0] == recipes[1] == recipes[2]


def test_openwebtext_is_nanogpts_split_at_a_pinned_revision() -> None:
    data = compose(["data=openwebtext"]).data
    assert (data.repository, len(data.revision)) == ("Skylion007/openwebtext", 40)
    assert (data.validation.rule, data.validation.fraction, data.validation.seed) == ("nanogpt", 0.0005, 2357)
