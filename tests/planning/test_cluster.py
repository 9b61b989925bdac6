"""The planner's input: the cluster, and the run's configuration on it."""

import pytest

from planning.cluster import compose_for, gpu_kinds, split_cluster


def test_cluster_keys_reach_no_run_and_change_no_name() -> None:
    cluster, others = split_cluster(["model=gpt2_nano", "cluster.gpus=8", "cluster.gpu=a100_40gb", "seed=3"])
    assert others == ["model=gpt2_nano", "seed=3"]
    assert (cluster.gpus, cluster.gpu) == (8, "a100_40gb")


@pytest.mark.parametrize("kind", gpu_kinds())
def test_every_gpu_kind_is_complete(kind: str) -> None:
    cluster, _ = split_cluster([f"cluster.gpu={kind}"])
    assert cluster.gpu == kind
    assert cluster.usable_bytes > 0


def test_a_model_without_a_recipe_gets_the_papers_and_the_plan_says_so() -> None:
    cluster, overrides = split_cluster(["model=gpt2_nano", "train.steps=7"])
    config, notes = compose_for(overrides, cluster)
    train = config.train
    assert (train.global_batch_size, train.sequence_length, train.steps) == (480, 256, 7)  # nano's context is 256
    assert notes[0].startswith("assumed, as in the paper: train.global_batch_size=480 train.sequence_length=256 (")


def test_a_recipe_is_planned_as_it_is() -> None:
    cluster, overrides = split_cluster(["experiment=paper/770m_sophiag", "cluster.gpus=8"])
    config, notes = compose_for(overrides, cluster)
    assert config.train.global_batch_size == 480
    assert not any("assumed" in note for note in notes)


def test_an_indivisible_batch_is_planned_with_the_nearest_valid_one_and_noted() -> None:
    cluster, overrides = split_cluster(
        ["model=gpt2_nano", "train.global_batch_size=16", "train.sequence_length=64", "cluster.gpus=5"]
    )
    config, notes = compose_for(overrides, cluster)
    assert config.train.global_batch_size == 15
    assert any("is not divisible by 5 ranks" in note for note in notes)


@pytest.mark.parametrize("removed", ["train.precision", "train.compile"])
def test_a_key_that_is_removed_has_its_default(removed: str) -> None:
    cluster, overrides = split_cluster(["+cluster.gpus=4", f"~{removed}"])
    config, _ = compose_for(overrides, cluster)
    assert cluster.gpus == 4
    assert (config.train.precision, config.train.compile) == ("bf16", True)
