from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from data import DataError
from data.tokenizers import END_OF_TEXT, gpt2
from downstream import export as exporting
from downstream import inference
from downstream.export import ExportError, export
from downstream.inference import Sampling, TrainedModel, generate, open_trained
from models import GPT2, GPT2Config
from models.huggingface import from_huggingface
from scripts.export import main
from training.config import ConfigurationError
from training.exports import Exports
from training.launching import command
from training.records import RunRecord

transformers = pytest.importorskip("transformers")

FRAGMENTS = (
    "the",
    " light",
    "'s",
    " 'll",
    "1984",
    "!?",
    "é",
    "中文",
    "🙂",
    "\n\n",
    "  ",
    "\t",
    "\r\n",
    "\u00a0",
    "\x85",
)
texts = st.text() | st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)


@pytest.fixture(scope="session")
def exported(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "model"
    export(trained, directory)
    return directory


def loaded(directory: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()


@torch.no_grad()
def test_transformers_gives_the_logits_of_the_run(trained: TrainedModel, exported: Path) -> None:
    ids = torch.randint(300, (3, 32), generator=torch.Generator().manual_seed(1))
    logits = loaded(exported)(ids).logits
    assert logits.shape == (3, 32, 300)  # without the padding
    torch.testing.assert_close(logits, trained.model.logits(ids), atol=1e-5, rtol=0)


@pytest.fixture(scope="session")
def tokenizer_pairs(
    trained: TrainedModel, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple]:
    """Ours and the one that AutoTokenizer loads, for a trained BPE and for GPT-2's."""
    directory = tmp_path_factory.mktemp("gpt2") / "model"
    small = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=32)).eval().requires_grad_(False)
    export(replace(trained, model=small, tokenizer=gpt2()), directory)
    return {
        "bpe": (trained.tokenizer, transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)),
        "gpt2": (gpt2(), transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)),
    }


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_transformers_reads_and_writes_the_ids_of_the_run(tokenizer_pairs: dict[str, tuple], name: str) -> None:
    ours, theirs = tokenizer_pairs[name]

    @settings(deadline=None, max_examples=200)
    @given(text=texts)
    @example(text="the light of day isn't grey — 中文 🙂\n\n  and\tnobody spoke  ")
    def same(text: str) -> None:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text

    same()


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_the_end_of_a_text_is_the_special_token(tokenizer_pairs: dict[str, tuple], name: str) -> None:
    ours, theirs = tokenizer_pairs[name]
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
    assert theirs(f"the{END_OF_TEXT}")["input_ids"] == [*ours.encode("the").tolist(), ours.end_of_text]
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 32


def test_transformers_generates_what_sampling_does(trained: TrainedModel, exported: Path) -> None:
    prompt = [int(token) for token in trained.tokenizer.encode("nobody")]
    end = trained.tokenizer.end_of_text
    ours = list(generate(trained.model, prompt, 10, Sampling(temperature=0), 0, end))
    model = loaded(exported)
    assert model.generation_config.eos_token_id == end
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0].tolist()
    assert theirs[len(prompt) :][: len(ours)] == ours


def test_the_directory_says_which_run_it_is_and_nothing_of_this_machine(
    trained: TrainedModel, exported: Path, tiny_run: Path
) -> None:
    described = json.loads((exported / "training.json").read_text())
    assert (described["run"], described["step"], described["tokens"]) == ("tiny", 3, 3 * 4 * 32)
    assert described["val_loss"] == json.loads((tiny_run / "summary.json").read_text())["final_val_loss"]
    for file in exported.glob("*.*"):
        if file.suffix in (".json", ".md"):
            assert str(tiny_run.parent.parent) not in file.read_text()
            assert file.stat().st_mode & 0o077 == (exported / "model.safetensors").stat().st_mode & 0o077
    assert "| trained for | 3 of 3 steps, 384 tokens |" in (exported / "README.md").read_text()


def test_an_export_that_differs_from_the_model_is_refused_and_leaves_nothing(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import huggingface

    def wrong(model: GPT2) -> torch.nn.Module:
        result = right(model)
        with torch.no_grad():
            result.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.1
        return result

    right = huggingface.to_huggingface
    monkeypatch.setattr(huggingface, "to_huggingface", wrong)
    with pytest.raises(ExportError, match="a logit of transformers' model differs"):
        export(trained, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(huggingface, "to_huggingface", right)
    with pytest.raises(ExportError, match="transformers encodes"):
        export(replace(trained, tokenizer=_without_last_merge(trained)), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def _without_last_merge(trained: TrainedModel) -> object:
    """A tokenizer whose export forgets how to make a token that the probe's text has."""
    from data.tokenizers import Tokenizer

    class Forgetful(Tokenizer):
        def _merges(self) -> object:
            return iter(())

    return Forgetful("bpe", trained.tokenizer._ranks)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing(
    error: Exception, trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(described: object) -> str:
        raise error

    monkeypatch.setattr(exporting, "_model_card", full)
    with pytest.raises(
        exporting.ConfigurationError, match=r"cannot be written: .*No space left on device.*; free space"
    ):
        export(trained, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_kept_unless_it_is_an_export_to_be_overwritten(
    tiny_run: Path, tmp_path: Path, refused: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "is not an export" in refused(main([str(tiny_run), str(mine), "--overwrite"]))
    assert (mine / "thesis.txt").read_text() == "years of work"

    made = tmp_path / "made"
    made.mkdir()  # an empty directory is no obstacle
    assert main([str(tiny_run / "checkpoints" / "step-00000002"), str(made)]) == 0
    capsys.readouterr()
    assert "already holds an export" in refused(main([str(tiny_run), str(made)]))
    assert json.loads((made / "training.json").read_text())["step"] == 2
    assert main([str(tiny_run), str(made), "--overwrite"]) == 0
    assert json.loads((made / "training.json").read_text())["step"] == 3
    (made / "thesis.txt").write_text("years of work")
    assert "holds thesis.txt besides an export" in refused(main([str(tiny_run), str(made), "--overwrite"]))
    assert (made / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "mine"]


def test_an_export_is_not_lost_where_its_replacement_cannot_take_its_place(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(trained, tmp_path / "model")
    renamed = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return renamed(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(exporting.ConfigurationError, match="cannot be written: Input/output error"):
        export(trained, tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("path", ["", "config.yaml", "checkpoints"])
def test_a_run_that_may_not_be_read_is_named(
    path: str, tiny_run: Path, tmp_path: Path, permissions_bind: None, refused: Callable[[int], str]
) -> None:
    normal = (tiny_run / path).stat().st_mode
    (tiny_run / path).chmod(0)
    code = main([str(tiny_run), str(tmp_path / "out")])
    (tiny_run / path).chmod(normal)
    assert str(tiny_run / path) in refused(code)


def test_a_dry_run_shows_every_file_and_a_card_filled_from_the_record(
    trained: TrainedModel, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    assert main([str(tiny_run), str(directory), "--hub=me/tiny", "--dry-run", "--licence=cc0-1.0"]) == 0
    shown = capsys.readouterr().out
    for file in directory.iterdir():
        assert f"{file.stat().st_size:>14,}  {file.name}\n" in shown
    assert trained.run is not None
    environment = trained.run.environment
    loss = json.loads((tiny_run / "summary.json").read_text())["final_val_loss"]
    for row in (
        "license: cc0-1.0",
        f"| data | text ({environment['data_manifest_sha256'][:12]}) |",
        "| batch | 4 sequences of 32 tokens |",
        f"| optimizer | {trained.config.optimizer.name} |",
        f"| validation loss | {loss:.4f} nats per token",
        f"| code | commit {environment['git']['commit']}",
        "| began with | random weights |",
    ):
        assert row in shown


def test_the_card_says_what_the_weights_began_with_under_which_code_and_whether_a_licence_is_stated(
    trained: TrainedModel,
) -> None:
    assert trained.run is not None
    card = exporting._model_card(exporting.describe(trained) | {"licence": None})
    assert "license:" not in card
    assert "| licence | not stated |" in card

    run = replace(
        trained.run,
        config=trained.run.config | {"resume": "/home/me/runs/other/checkpoints/step-00000002"},
        environment=trained.run.environment | {"git": {"commit": "1a", "dirty": True}},
    )
    described = exporting.describe(replace(trained, run=run)) | {"resumed_under": ["commit 2b"], "licence": None}
    card = exporting._model_card(described)
    assert "| began with | other/step-00000002 |" in card
    assert "| trained for | 3 of 3 steps, the steps of the run it began with included |" in card
    assert "| code | commit 1a with uncommitted changes; resumed under commit 2b |" in card


def test_a_checkpoint_outside_its_run_has_its_loss_and_no_other_tokenizer(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(trained.checkpoint, copy)
    outside = open_trained(copy)
    assert outside.run is None
    assert exporting.describe(outside)["val_loss"] == exporting.describe(trained)["val_loss"]
    right = inference.load_manifest
    monkeypatch.setattr(inference, "load_manifest", lambda place: replace(right(place), source={"path": "other"}))
    with pytest.raises(DataError, match="holds other tokens"):
        open_trained(copy)


def test_an_export_is_uploaded_whole_to_the_repository_that_was_named(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    sent: list[object] = []

    class Hub:
        def create_repo(self, name: str, **options: object) -> object:
            sent.append((name, options))
            return type("Repository", (str,), {"repo_id": name})(f"https://hub/{name}")

        def repo_info(self, name: str) -> object:
            return type("Info", (), {"private": name == "me/tiny"})

        def upload_folder(self, **options: object) -> None:
            sent.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(ConfigurationError, match="--private: me/public exists and is public"):
        exporting.upload(exported, "me/public", private=True)
    exporting.upload(exported, "me/public", private=False)
    assert sent[0] == ("me/public", {"private": True, "exist_ok": True})
    assert sent[1] == ("me/public", {"private": None, "exist_ok": True})
    assert len(sent) == 3
    sent.clear()
    assert exporting.upload(exported, "me/tiny", private=True) == "https://hub/me/tiny"
    assert sent == [
        ("me/tiny", {"private": True, "exist_ok": True}),
        {"folder_path": exported, "repo_id": "me/tiny", "commit_message": "step 3"},
    ]


def test_a_hub_that_cannot_be_used_is_one_line(
    tiny_run: Path, exported: Path, tmp_path: Path, refused: Callable[[int], str]
) -> None:
    assert "--hub a/b/c: not a repository's name" in refused(main([str(tiny_run), str(tmp_path / "x"), "--hub=a/b/c"]))
    assert "no effect without --hub" in refused(main([str(tiny_run), str(tmp_path / "x"), "--dry-run"]))
    with pytest.raises(ConfigurationError, match="--hub me/tiny: not uploaded"):
        exporting.upload(exported, "me/tiny", private=False)


def test_a_run_exports_at_the_chosen_steps_and_keeps_an_interrupted_export_for_its_resumption(
    tiny_run: Path, tmp_path: Path
) -> None:
    chosen = ["name=exporting", f"output_dir={tmp_path}", "checkpoint.export_at=[2]", "checkpoint.interval=null"]
    assert command.main(["--config-path", str(tiny_run), *chosen]) == 0
    run, export = tmp_path / "exporting", tmp_path / "exporting" / "exports" / "step-00000002"
    assert (json.loads((export / "training.json").read_text())["step"], loaded(export).config.model_type) == (2, "gpt2")
    _, weights = from_huggingface(export)
    for name, parameter in open_trained(run / "checkpoints" / "step-00000002").model.named_parameters():
        torch.testing.assert_close(weights[name], parameter, atol=0, rtol=0)
    events = [line for line in RunRecord.open(run).metrics("event") if line["event"] == "export"]
    assert [(line["step"], line["reason"]) for line in events] == [(2, f"exported {export}")]

    shutil.rmtree(export)
    reported: list[str] = []
    exports = Exports(run, [2], Path("tokens"), lambda line, step: reported.append(line))
    (run / "exports" / f".step-00000002.{2**22 + 1}.partial").mkdir()  # of a process that was killed
    exports.start()
    exports.finish(lambda: True, resumable=True)
    assert (list((run / "exports").iterdir()), exports.unfinished, reported) == ([], {2}, [])

    exports = Exports(run, [1, 2], Path("tokens"), lambda line, step: reported.append(line))
    exports.finish(lambda: True, resumable=False)
    missing, made = reported
    assert made == f"{export} was not made: python scripts/export.py {run / 'checkpoints' / 'step-00000002'} {export}"
    assert missing.endswith(f"no checkpoint of step 1; scripts/export.py exports any in {run / 'checkpoints'}")
