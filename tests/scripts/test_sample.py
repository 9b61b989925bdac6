from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import TokenDataset, ValidationWindows
from downstream.inference import Sampling, TrainedModel, as_text, generate, next_token_distribution, open_trained
from models import GPT2, GPT2Config
from scripts.sample import main, write
from training.config import ConfigurationError
from training.corpus import token_directory_of
from training.distributed import Distributed
from training.launching import command
from training.reliability.checkpoints import Checkpoint, CheckpointError, save
from training.strategies.base import Piece

NO_END = -1


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_a_seed_decides_the_text(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        sampled(capsys, tiny_run, "--prompt", "the light", "--tokens", "20", "--seed", seed) for seed in ("3", "3", "4")
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the light") for text in texts)


def test_each_of_several_samples_is_that_of_a_seed_of_its_own(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = sampled(capsys, tiny_run, "--tokens", "10", "--samples", "2", "--seed", "5")
    apart = [sampled(capsys, tiny_run, "--tokens", "10", "--seed", seed) for seed in ("5", "6")]
    assert both == "".join(apart)


def test_greedy_text_is_the_likeliest_token_of_the_whole_models_logits_each_time(trained: TrainedModel) -> None:
    prompt = [int(token) for token in trained.tokenizer.encode("nobody spoke")]
    ids = list(prompt)
    for _ in range(40):  # beyond the context of 32
        logits = trained.model.logits(torch.tensor([ids[-32:]]))
        ids.append(int(logits[0, -1].argmax()))
    assert list(generate(trained.model, prompt, 40, Sampling(temperature=0), 0, NO_END)) == ids[len(prompt) :]


def test_a_prompt_longer_than_the_context_goes_on_from_its_end(
    trained: TrainedModel, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [int(token) for token in trained.tokenizer.encode("the light of day was grey and " * 10)]
    assert len(long) > 64
    drawn = [list(generate(trained.model, prompt, 12, Sampling(), 1, NO_END)) for prompt in (long, long[-32:])]
    assert drawn[0] == drawn[1]

    text = "the light of day was grey and " * 10
    assert main([str(tiny_run), "--prompt", text, "--tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(text)
    assert f"the prompt has {len(long)} tokens; the model sees only the last 32" in captured.err


@torch.no_grad()
def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = GPT2(GPT2Config(vocab_size=5, n_layer=1, n_head=1, n_embd=8, block_size=8)).eval()
    model.token_embedding.weight[5:] = 1e4 * torch.randn(123, 8, generator=torch.Generator().manual_seed(0))
    hidden = model.hidden(torch.tensor([[0, 1, 2]]))[0, -1]
    assert (model.token_embedding.weight @ hidden).argmax() >= 5  # without care it would be
    for temperature in (0.0, 1.0, 100.0):
        drawn = generate(model, [0, 1, 2], 50, Sampling(temperature=temperature), 0, NO_END)
        assert max(drawn) < 5


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    model = GPT2(GPT2Config(vocab_size=4, n_layer=1, n_head=1, n_embd=8, block_size=4)).eval()
    model.token_embedding.weight.mul_(15)
    probabilities = model.logits(torch.tensor([[2, 0]]))[0, -1].softmax(dim=-1)
    draws = 2000
    counts = torch.zeros(4)
    for seed in range(draws):
        counts[next(generate(model, [2, 0], 1, Sampling(), seed, NO_END))] += 1
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert probabilities.max() < 0.95  # otherwise nothing is tested
    assert ((counts / draws - probabilities).abs() < 5 * deviation + 1e-6).all()


def test_nothing_follows_the_end_of_a_text(trained: TrainedModel) -> None:
    greedy = Sampling(temperature=0)
    ids = list(generate(trained.model, [1, 2, 3], 10, greedy, 0, NO_END))
    end = ids[-1]
    assert list(generate(trained.model, [1, 2, 3], 10, greedy, 0, end)) == ids[: ids.index(end)]


def test_the_next_token_is_known_before_the_one_after_it_is_computed(trained: TrainedModel) -> None:
    calls = []

    class Counted(GPT2):
        def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
            calls.append(tokens.shape)
            return super().hidden(tokens)

    model = Counted(trained.model.config)
    stream = generate(model, [1, 2], 100, Sampling(), 0, NO_END)
    next(stream)
    assert calls == [(1, 2)]
    next(stream)
    assert calls == [(1, 2), (1, 3)]


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.floats(0.01, 1),
)
def test_the_distribution_is_that_of_the_kept_tokens(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    found = next_token_distribution(torch.tensor(logits), Sampling(temperature, top_k, top_p)).numpy()

    scaled = np.asarray(logits, np.float32).astype(np.float64) / temperature
    expected = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda token: -logits[token])  # stable: the lower id first
    expected[order[top_k:] if top_k else []] = 0
    expected /= expected.sum()
    kept: list[int] = []
    while order and (not kept or expected[kept].sum() < top_p - 1e-12):
        kept.append(order.pop(0))
    borderline = abs(expected[kept].sum() - top_p) < 1e-9
    expected[[token for token in range(len(logits)) if token not in kept]] = 0
    expected /= expected.sum()
    assert np.isclose(found.sum(), 1)
    if not borderline:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_zero_temperature_takes_the_first_of_equal_logits() -> None:
    found = next_token_distribution(torch.tensor([1.0, 3.0, 3.0]), Sampling(temperature=0))
    assert found.tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 5e-324, 1e30])
def test_extreme_temperatures_give_probabilities(temperature: float) -> None:
    found = next_token_distribution(torch.tensor([-80.0, 90.0, 89.0]), Sampling(temperature=temperature))
    assert found.sum() == pytest.approx(1)


def test_a_character_of_several_tokens_comes_whole(trained: TrainedModel) -> None:
    text = "day ∑ 🙃 — 中 ✓"
    ids = trained.tokenizer.encode(text).tolist()
    assert len(ids) > len(text)  # some characters are of several tokens
    pieces = list(as_text(trained.tokenizer, ids))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    cut = trained.tokenizer.encode("🙃").tolist()[:-1]
    assert "".join(as_text(trained.tokenizer, cut)) == "\ufffd"


def test_control_characters_are_not_obeyed_by_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write("a\x1b[2J\tb\n\x9b\x7f")
    assert capsys.readouterr().out == "a␛[2J\tb\n\ufffd␡"


def test_the_newest_valid_checkpoint_is_used_and_damaged_ones_are_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[int], str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert open_trained(run).step == 3
    damaged = run / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert open_trained(run).step == 2
    assert main([str(run), "--tokens", "1"]) == 0
    assert f"checkpoint skipped: {damaged}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="damaged"):
        open_trained(damaged.parent)

    (run / "checkpoints" / "step-00000002" / "rank-00000.safetensors").unlink()
    assert "has no valid checkpoint" in refused(main([str(run)]))


def test_a_checkpoint_of_a_run_may_be_named(tiny_run: Path) -> None:
    checkpoint = tiny_run / "checkpoints" / "step-00000002"
    opened = open_trained(checkpoint)
    assert (opened.step, opened.checkpoint) == (2, checkpoint)
    assert opened.run is not None
    assert opened.run.directory.name == "tiny"


def test_the_model_is_the_one_that_was_evaluated(tiny_run: Path, trained: TrainedModel) -> None:
    # The record's validation loss, on the same tokens: weights, tokenizer and shape belong together.
    assert not trained.model.training
    assert validation_loss(trained) == pytest.approx(recorded_loss(tiny_run), rel=1e-5)


@pytest.mark.parametrize("ranks", [[], ["launcher.nproc_per_node=2"], ["launcher.nproc_per_node=2", "strategy=fsdp"]])
def test_the_model_of_an_optimizer_that_averages_has_the_averaged_weights(
    ranks: list[str], tiny: list[str], tiny_run: Path
) -> None:
    run = tiny_run.with_name(f"averaged{len(ranks)}")
    averaging = [f"name={run.name}", "optimizer=schedulefree", "schedule=constant", "optimizer.lr=0.02"]
    assert command.main([*tiny, *averaging, *ranks]) == 0
    averaged = open_trained(run)
    assert validation_loss(averaged) == pytest.approx(recorded_loss(run), rel=1e-5)
    trained = Checkpoint(averaged.checkpoint).tensor("model.token_embedding.weight")
    assert not torch.allclose(trained, averaged.model.token_embedding.weight, rtol=1e-4)


def recorded_loss(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["final_val_loss"])


def validation_loss(trained: TrainedModel) -> float:
    windows = ValidationWindows(TokenDataset(token_directory_of(trained.config), "validation"), 256, 32)
    total, count = 0.0, 0
    for batch in windows.batches(4):
        loss_sum = trained.model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)).loss_sum
        total, count = total + float(loss_sum), count + int((batch.targets >= 0).sum())
    return total / count


def test_tokens_that_have_been_moved_can_be_named_and_others_are_refused(
    tiny_run: Path, tmp_path: Path, trained: TrainedModel, refused: Callable[[int], str]
) -> None:
    from data import FileSource, SplitRule, TokenizerSpec, prepare

    tokens = tiny_run.parent.parent / "tokens" / "text-bpe300"
    moved = shutil.copytree(tokens, tmp_path / "moved")
    assert open_trained(tiny_run, tokens=moved).tokenizer.sha256 == trained.tokenizer.sha256

    assert "with --token-directory" in refused(main([str(tiny_run), "--token-directory", str(tmp_path / "nowhere")]))

    corpus = tmp_path / "other.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": f"{n} another corpus of other words " * 20}) + "\n" for n in range(99))
    )
    other = tmp_path / "other"
    prepare(FileSource([str(corpus)], split=SplitRule("hash", 0.2, 0)), TokenizerSpec("bpe", 280), other, workers=1)
    assert "holds other tokens" in refused(main([str(tiny_run), "--token-directory", str(other)]))


def saved_again(checkpoint: Path, root: Path, config: object) -> Path:
    """A valid checkpoint of the same tensors, with this as its configuration."""
    opened = Checkpoint(checkpoint)
    pieces = [Piece(name, opened.shape(name), 0, opened.tensor(name).flatten()) for name in opened.names()]
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    return save(root, opened.step, pieces, opened.state.model_dump() | {"config": config}, alone)


def test_weights_of_another_shape_or_without_configuration_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    original = tiny_run / "checkpoints" / "step-00000003"
    config = Checkpoint(original).state.config
    assert open_trained(saved_again(original, tmp_path / "same", config), tokens=None).run is None
    with pytest.raises(CheckpointError, match=r"damaged: state\.config"):
        open_trained(saved_again(original, tmp_path / "none", None))
    narrower = config | {"model": config["model"] | {"n_embd": 32}}
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight has shape"):
        open_trained(saved_again(original, tmp_path / "narrower", narrower))
    impossible = config | {"model": config["model"] | {"n_embd": -1}}
    with pytest.raises(ConfigurationError, match="n_embd=-1"):
        open_trained(saved_again(original, tmp_path / "impossible", impossible))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["."], "is not a run record"),
        (["tiny", "--samples", "0"], "--samples 0"),
        (["tiny", "--seed", "-1"], "--seed -1"),
        (["tiny", "--top-k", "-3"], "--top-k -3"),
        (["tiny", "--top-p", "0"], "top_p=0.0"),
        (["tiny", "--top-p", "1.5"], "top_p=1.5"),
        (["tiny", "--temperature", "-1"], "temperature=-1.0"),
        (["tiny", "--temperature", "nan"], "temperature=nan"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[int], str],
) -> None:
    monkeypatch.chdir(tiny_run.parent)
    assert expected in refused(main(arguments))


def test_an_empty_prompt_begins_a_text(
    tiny_run: Path, trained: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = generate(trained.model, [trained.tokenizer.end_of_text], 8, Sampling(0.8), 0, trained.tokenizer.end_of_text)
    expected = "".join(as_text(trained.tokenizer, drawn))
    assert sampled(capsys, tiny_run, "--tokens", "8") == expected + "\n"
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(trained.model, [], 1, Sampling(), 0, NO_END))
