"""The planner: its memory against torch's own tracker, its arithmetic against the ledger's, its remedies against itself."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import GPT2Config
from training.cluster import gpu_kinds, split_cluster
from training.compose import compose
from training.config import ConfigurationError, RunConfig
from training.memory_trace import MemoryTrace
from training.plan_tables import TOLERANCE, check_case
from training.planned_memory import planned_memory
from training.planner import (
    UPDATE_ACCESSES,
    largest_micro_batch,
    make_plan,
    newton_schulz_flops,
    plan_optimizer,
    planned_traffic,
)

SMALL = ("model=gpt2_nano", "train.sequence_length=64", "train.global_batch_size=16", "train.micro_batch_size=4")
BF16 = ("train.precision=bf16", "train.compile=false")


def small(*overrides: str) -> RunConfig:
    return compose([*SMALL, *BF16, *overrides])


def shape(n_layer: int = 2, vocab_size: int = 512) -> GPT2Config:
    return GPT2Config(vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_embd=64, block_size=256)


def peak(config: RunConfig, world_size: int = 1, n_layer: int = 2) -> int:
    memory = planned_memory(config, shape(n_layer), world_size, "cpu")
    return max(sum(by_kind.values()) for by_kind in memory.values())


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, "train.precision=bf16 optimizer=sophiag strategy=ddp"),
        (2, "train.precision=fp32 optimizer=adamw strategy=ddp"),
        (2, "train.precision=bf16 optimizer=sophiag strategy=fsdp strategy.activation_checkpointing=true"),
    ],
)
def test_planned_memory_is_within_fifteen_percent_of_what_real_ranks_take(
    ranks: int, overrides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.plan_tables.CHECK_BASE", SMALL)
    monkeypatch.setattr("training.plan_tables.CHECK_SHAPE", {"n_layer": 3, "vocab_size": 1024})
    case = check_case(ranks, overrides)
    assert abs(case["planned_over_tracked"] - 1) <= TOLERANCE
    assert abs(case["planned_over_allocated"] - 1) <= TOLERANCE


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        "strategy=ddp",
        "strategy=fsdp",
        "strategy=fsdp strategy.activation_checkpointing=true",
        "strategy=fsdp strategy.activation_checkpointing=true train.micro_batch_size=2",
        "strategy=deepspeed strategy.zero_stage=3",
    ],
)
def test_two_models_of_few_layers_tell_what_a_deep_one_takes(
    overrides: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("train.sequence_length=256", *overrides.split())
    deep = GPT2Config(vocab_size=512, n_layer=6, n_head=4, n_embd=256, block_size=256)  # the blocks weigh most
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": compiled})})
    extrapolated = planned_memory(config, deep, 4, "cuda")
    monkeypatch.setattr("training.planned_memory.SAMPLED_LAYERS", (2, 6))
    for phase, by_kind in planned_memory(config, deep, 4, "cuda").items():
        assert sum(extrapolated[phase].values()) == pytest.approx(sum(by_kind.values()), rel=0.01)


def test_state_is_counted_by_what_it_is_for() -> None:
    size = 4 * sum(p.numel() for p in _parameters())
    sophia = planned_memory(small("optimizer=sophiag"), shape(), 1, "cpu")["training"]
    adamw = planned_memory(small("optimizer=adamw"), shape(), 1, "cpu")["training"]
    assert sophia["weights"] == adamw["weights"] == size
    assert sophia["curvature"] == size
    assert adamw["curvature"] == 0
    assert adamw["optimizer"] == pytest.approx(2 * size, rel=0.01)  # and the counts of steps
    assert sophia["optimizer"] == pytest.approx(size, rel=0.01)


def test_fsdp_shards_weights_and_state_over_the_ranks() -> None:
    one, four = (planned_memory(small("strategy=fsdp"), shape(), ranks, "cpu")["training"] for ranks in (1, 4))
    for kind in ("weights", "optimizer", "curvature"):
        assert four[kind] == pytest.approx(one[kind] / 4, rel=0.02)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_more_at_each_stage(stage: int) -> None:
    config = small("strategy=deepspeed", f"strategy.zero_stage={stage}")
    memory = planned_memory(config, shape(), 4, "cpu")["training"]
    size = sum(p.numel() for p in _parameters())
    master = size  # a quarter of float32
    assert memory["curvature"] == pytest.approx(size, rel=0.02)
    whole_weights = 4 * size if stage == 1 else 2 * size if stage == 2 else size // 2
    assert memory["weights"] == pytest.approx(whole_weights + master, rel=0.02)
    assert memory["gradients"] == pytest.approx(4 * size if stage == 1 else size, rel=0.02)


def test_checkpointed_activations_and_smaller_micro_batches_need_less() -> None:
    plain = peak(small("strategy=fsdp"), 4, n_layer=6)
    assert peak(small("strategy=fsdp", "strategy.activation_checkpointing=true"), 4, n_layer=6) < plain
    assert peak(small("strategy=fsdp", "train.micro_batch_size=1"), 4, n_layer=6) < plain


def test_exact_hutchinson_needs_the_memory_of_attention_maps() -> None:
    memory = planned_memory(small("optimizer=sophiah", "optimizer.batch_fraction=0.5"), shape(), 1, "cpu")
    assert sum(memory["curvature"].values()) > sum(memory["training"].values())


def test_compiled_blocks_keep_less_than_eager_ones() -> None:
    config = small("model.attention_layer_scaling=true")
    compiled = config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})
    scaled = GPT2Config(**{**vars(shape(4)), "attention_layer_scaling": True})
    eager_memory, compiled_memory = (planned_memory(c, scaled, 1, "cuda")["training"] for c in (config, compiled))
    assert 0 < compiled_memory["activations"] < eager_memory["activations"]


def test_a_trace_sees_every_storage_and_its_end() -> None:
    with FakeTensorMode(), MemoryTrace() as trace:
        with trace.phase("work", "activations"):
            first = torch.empty(1000)
            second = first + 1
            view = second[10:]
            del first
            third = torch.empty(500)
        trace.label(third, "weights")
        assert trace.now()["activations"] == 4000
        assert trace.now()["weights"] == 2000
        assert sum(trace.peaks["work"].values()) == 8000
        del second, third
        assert sum(trace.now().values()) == 4000
        del view
        assert sum(trace.now().values()) == 0


def test_cluster_keys_reach_no_run_and_change_no_name() -> None:
    cluster, others = split_cluster(["model=gpt2_nano", "cluster.gpus=8", "cluster.gpu=a100_40gb", "seed=3"])
    assert others == ["model=gpt2_nano", "seed=3"]
    assert (cluster.gpus, cluster.gpu) == (8, "a100_40gb")


@pytest.mark.parametrize("kind", gpu_kinds())
def test_every_gpu_kind_is_complete(kind: str) -> None:
    cluster, _ = split_cluster([f"cluster.gpu={kind}"])
    assert cluster.gpu == kind
    assert cluster.usable_bytes > 0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("cluster.gpu=h10", "h100"),
        ("cluster.gpus=0", "cluster.gpus=0"),
        ("cluster.gpuz=3", "did you mean cluster.gpu?"),
        ("cluster.utilisation=1.5", "cluster.utilisation=1.5"),
        ("cluster.gpus", "cluster.gpus=<value>"),
    ],
)
def test_a_wrong_cluster_is_one_line_with_the_remedy(override: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named) as error:
        split_cluster([override])
    assert "\n" not in str(error.value)


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


def test_muon_pays_for_its_products() -> None:
    d = 64  # gram matrix r r c, its square r r r, its product r r c; two operations each; five times
    assert newton_schulz_flops(shape(n_layer=1)) == 5 * sum(
        2 * (2 * d * d * columns + d**3) for columns in (3 * d, d, 4 * d, 4 * d)
    )


def test_the_largest_micro_batch_that_fits_is_found_in_few_tries() -> None:
    tried: list[int] = []

    def takes(config: RunConfig) -> int:
        assert config.train.micro_batch_size is not None
        tried.append(config.train.micro_batch_size)
        return config.train.micro_batch_size

    config = small("train.global_batch_size=64", "train.micro_batch_size=64")
    assert largest_micro_batch(config, 1, takes, usable=9) == (8, 8)
    assert len(tried) <= 4
    assert largest_micro_batch(config, 1, takes, usable=0) is None


def test_a_plan_bills_each_optimizer_and_names_what_would_fit() -> None:
    cluster, overrides = split_cluster(
        [*SMALL, *BF16, "optimizer=sophiag", "cluster.gpus=4", "cluster.memory_gib=0.04", "cluster.reserved_gib=0"]
    )
    plan = make_plan(overrides, cluster, ("adamw", "sophiag"))
    by_name = {one.optimizer: one for one in plan.optimizers}
    assert by_name["sophiag"].flops_per_step > by_name["adamw"].flops_per_step == plan.training_flops_per_step
    assert by_name["sophiag"].seconds.curvature > 0 == by_name["adamw"].seconds.curvature
    assert by_name["adamw"].cost == pytest.approx(by_name["adamw"].hours * 4 * cluster.price_per_hour)
    assert not by_name["sophiag"].fits
    for remedy in plan.remedies:
        assert remedy.peak_bytes <= cluster.usable_bytes


def test_a_batch_that_the_ranks_cannot_share_is_planned_with_the_nearest_and_said() -> None:
    cluster, overrides = split_cluster([*SMALL[:-1], *BF16, "cluster.gpus=5"])
    plan = make_plan(overrides, cluster, ())
    assert plan.config.train.global_batch_size == 15
    assert any("does not divide over 5 ranks" in note for note in plan.notes)


def test_what_a_strategy_refuses_is_said_and_not_planned(tmp_path: Path) -> None:
    cluster, overrides = split_cluster([*SMALL, *BF16, "strategy=deepspeed", "optimizer=lion", "cluster.gpus=2"])
    plan = make_plan(overrides, cluster, ("lion", "muon"))
    assert [one.optimizer for one in plan.optimizers] == ["lion"]
    assert "whole matrices" in plan.refused["muon"]


def _parameters() -> list[torch.nn.Parameter]:
    from models import GPT2

    with torch.device("meta"):
        return list(GPT2(shape()).parameters())


def test_adahessian_which_takes_no_labels_is_planned_beside_another() -> None:
    cluster, _ = split_cluster([])
    planned = make_plan([*SMALL, *BF16], cluster, ["adamw", "adahessian"], search=False).optimizers
    memory = {one.optimizer: sum(phase["curvature"] for phase in one.memory.values()) for one in planned}
    assert memory["adahessian"] == memory["sophiag"] > memory["adamw"] == 0


def test_an_optimizer_that_the_table_of_updates_lacks_is_planned_as_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = split_cluster([])
    config = small("optimizer=adamw")
    listed = plan_optimizer(config, shape(), cluster)
    monkeypatch.delitem(UPDATE_ACCESSES, "adamw")
    assert plan_optimizer(config, shape(), cluster).seconds == listed.seconds


def test_an_optimizer_that_does_not_exist_is_refused() -> None:
    cluster, _ = split_cluster([])
    with pytest.raises(ConfigurationError, match=r"optimizer=nonsense: unknown choice; choose one of .*adamw"):
        make_plan([*SMALL, *BF16], cluster, ["adamw", "nonsense"])
