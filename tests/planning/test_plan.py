"""A plan: its costs match the ledger's arithmetic, and its remedies fit."""

import pytest

from models import GPT2Config
from planning.cluster import ClusterConfig, compose_for, split_cluster
from planning.plan import (
    UPDATE_ACCESSES,
    RunPlan,
    exposed_seconds,
    newton_schulz_flops,
    plan_optimizer,
    plan_run,
    planned_traffic,
)
from training.compose import compose
from training.config import RunConfig

SMALL = ("model=gpt2_nano", "train.sequence_length=64", "train.global_batch_size=16", "train.micro_batch_size=4")
BF16 = ("train.precision=bf16", "train.compile=false")


def small(*overrides: str) -> RunConfig:
    return compose([*SMALL, *BF16, *overrides])


def shape(n_layer: int = 2) -> GPT2Config:
    return GPT2Config(vocab_size=512, n_layer=n_layer, n_head=2, n_embd=64, block_size=256)


def plan(*overrides: str, optimizers: tuple[str, ...]) -> tuple[RunPlan, ClusterConfig]:
    cluster, others = split_cluster([*SMALL, *BF16, *overrides])
    config, notes = compose_for(others, cluster)
    return plan_run(config, cluster, optimizers, notes), cluster


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, "strategy=ddp"), (4, "strategy=ddp"), (4, "strategy=fsdp"), (4, "strategy=deepspeed strategy.zero_stage=2")],
)
def test_planned_traffic_is_nothing_in_a_world_of_one_and_grows_with_the_micro_batches(
    world_size: int, overrides: str
) -> None:
    fewer, more = (small(*overrides.split(), f"train.micro_batch_size={size}") for size in (4, 1))
    traffic, accumulated = (sum(planned_traffic(c, shape(), world_size).step.values()) for c in (fewer, more))
    assert (traffic > 0) == (world_size > 1)
    assert accumulated >= traffic
    assert (accumulated > traffic) == (world_size > 1 and overrides != "strategy=ddp")


@pytest.mark.parametrize(
    ("strategy", "hidden"),
    [
        ("strategy=ddp", 2 / 3 / 4),
        ("strategy=deepspeed strategy.zero_stage=1", 0.0),
        ("strategy=deepspeed strategy.zero_stage=2", None),
        ("strategy=deepspeed strategy.zero_stage=3", 1.0),
        ("strategy=fsdp", None),
    ],
)
def test_only_what_runs_during_forward_and_backward_is_hidden(strategy: str, hidden: float | None) -> None:
    config, cluster = small(*strategy.split(), "train.micro_batch_size=1"), split_cluster(["cluster.gpus=4"])[0]
    sent = planned_traffic(config, shape(), 4).step
    seconds = {name: size / cluster.link_bandwidth for name, size in sent.items()}
    total = sum(seconds.values())
    for compute in (0.0, 0.5 * total, total, 100 * total):
        if strategy == "strategy=fsdp":
            gathers, reduces = seconds["all-gather of weights"], seconds["reduce-scatter of gradients"]
            expected = max(max(0.0, gathers - compute) + max(0.0, reduces - 2 / 3 / 4 * compute), total - compute)
        elif hidden is None:  # gathers weights after the update
            expected = max(0.0, seconds["reduce-scatter of gradients"] - compute) + seconds["all-gather of weights"]
        else:
            expected = total - hidden * compute
        assert exposed_seconds(config, cluster, sent, compute) == pytest.approx(max(0.0, expected))


def test_a_plan_of_an_offloaded_optimizer_says_what_its_time_leaves_out() -> None:
    planned, _ = plan("strategy=deepspeed", "strategy.offload_optimizer=true", "cluster.gpus=4", optimizers=("adamw",))
    assert any("time and cost leave out the transfers to the CPU" in note for note in planned.notes)


def test_muon_pays_for_its_products() -> None:
    d = 64  # gram matrix r r c, its square r r r, its product r r c; two operations each; five times
    assert newton_schulz_flops(shape(n_layer=1)) == 5 * sum(
        2 * (2 * d * d * columns + d**3) for columns in (3 * d, d, 4 * d, 4 * d)
    )


def test_a_plan_bills_each_optimizer_and_names_what_would_fit() -> None:
    planned, cluster = plan(
        *("optimizer=sophiag", "cluster.gpus=4", "cluster.memory_gib=0.1", "cluster.reserved_gib=0"),
        optimizers=("adamw", "sophiag"),
    )
    by_name = {one.optimizer: one for one in planned.optimizers}
    assert by_name["sophiag"].flops_per_step > by_name["adamw"].flops_per_step == planned.training_flops_per_step
    assert by_name["sophiag"].seconds.curvature > 0 == by_name["adamw"].seconds.curvature
    assert by_name["adamw"].cost == pytest.approx(by_name["adamw"].hours * 4 * cluster.price_per_hour)
    assert not by_name["sophiag"].fits
    assert planned.remedies
    for remedy in planned.remedies:
        assert remedy.peak_bytes <= cluster.usable_bytes
        again, _ = plan(
            *("optimizer=sophiag", "cluster.gpus=4", "cluster.memory_gib=0.1", "cluster.reserved_gib=0"),
            *remedy.overrides,
            optimizers=(),
        )
        assert again.optimizers[0].fits
        assert again.optimizers[0].peak_bytes == remedy.peak_bytes


@pytest.mark.parametrize(
    ("strategy", "gib"),
    [
        ("strategy=fsdp strategy.reshard_after_forward=false train.sequence_length=256", 1.35),
        ("strategy=deepspeed strategy.offload_optimizer=true", 1.45),
    ],
)
def test_a_remedy_keeps_the_strategys_other_keys(strategy: str, gib: float) -> None:
    given = (
        *strategy.split(),
        "cluster.gpus=4",
        "model=gpt2_small",
        f"cluster.memory_gib={gib}",
        "cluster.reserved_gib=0",
    )
    planned, _ = plan(*given, optimizers=("adamw",))
    kept = [one for one in planned.remedies if "strategy=fsdp" not in one.overrides]
    assert len(kept) > 1
    for remedy in kept:
        assert plan(*given, *remedy.overrides, optimizers=())[0].optimizers[0].peak_bytes == remedy.peak_bytes


def test_an_optimizer_that_the_strategy_refuses_is_reported_and_not_planned() -> None:
    planned, _ = plan("strategy=deepspeed", "optimizer=lion", "cluster.gpus=2", optimizers=("lion", "muon"))
    assert [one.optimizer for one in planned.optimizers] == ["lion"]
    assert "whole matrices" in planned.refused["muon"]


def test_exact_hutchinson_becomes_differences_where_weights_are_sharded_and_the_plan_says_so() -> None:
    planned, _ = plan("strategy=fsdp", "optimizer=adamw", "cluster.gpus=2", optimizers=("sophiah",))
    assert planned.optimizers[0].estimator == "hutchinson_differences"
    assert any("hutchinson_differences" in note for note in planned.notes)


def test_an_optimizer_that_the_table_of_updates_lacks_is_planned_as_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = split_cluster([])
    lion = plan_optimizer(small("optimizer=lion"), shape(), cluster)
    adamw = plan_optimizer(small("optimizer=adamw"), shape(), cluster)
    monkeypatch.delitem(UPDATE_ACCESSES, "lion")
    assert plan_optimizer(small("optimizer=lion"), shape(), cluster).seconds == adamw.seconds != lion.seconds
