from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import data
from data import DataError, FileSource, HubSource, SampleSource, SplitRule, TokenizerSpec, plan, preparation, tokenise
from data.encoding import DocumentEncoder
from data.manifest import Manifest
from data.progress import BarProgress, LineProgress, progress_display
from data.tokenizers import gpt2
from tests.data.corpora import texts, write_json_lines, write_parquet, write_text

GPT2 = TokenizerSpec("gpt2")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_UNIT", 20_000)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def stream(directory: Path, split: str) -> np.ndarray:
    shards = data.load_manifest(directory).splits[split].shards
    return np.concatenate([np.load(directory / shard.file) for shard in shards])


def documents_of(directory: Path, split: str) -> list[str]:
    ids = stream(directory, split)
    ends = np.flatnonzero(ids == gpt2().end_of_text)
    return [gpt2().decode(part[part != gpt2().end_of_text]) for part in np.split(ids, ends + 1)[:-1]]


def parquet_corpus(root: Path, documents: list[str | None], files: int = 3) -> HubSource:
    """A corpus in the layout of OpenWebText's repository, split as nanoGPT splits it."""
    bounds = np.linspace(0, len(documents), files + 1).astype(int)
    for number in range(files):
        part = documents[bounds[number] : bounds[number + 1]]
        write_parquet(root / "plain_text" / f"train-{number:05d}-of-{files:05d}.parquet", part, rows_per_group=60)
    split = SplitRule("nanogpt", 0.01, 2357)
    return HubSource("openwebtext", "Skylion007/openwebtext", "main", "plain_text/*.parquet", split=split, local=root)


def test_tokens_are_the_documents_in_order_each_followed_by_the_end_of_text(tmp_path: Path) -> None:
    documents = texts(500)
    rule = SplitRule("hash", 0.1)
    write_json_lines(tmp_path / "a.jsonl", documents)
    source = FileSource(paths=[f"{tmp_path}/a.jsonl"], split=rule)
    manifest = data.prepare(source, GPT2, tmp_path / "t", workers=2)
    for split in ("train", "validation"):
        chosen = [text for text in documents if rule.is_validation(text) == (split == "validation")]
        expected = [token for text in chosen for token in [*gpt2().encode(text).tolist(), 50256]]
        assert stream(tmp_path / "t", split).tolist() == expected
        assert manifest.splits[split].documents == len(chosen)
        assert manifest.splits[split].tokens == len(expected)
    assert len(manifest.splits["train"].shards) > 1
    assert data.verify(tmp_path / "t") == manifest


def test_every_format_gives_the_same_tokens(tmp_path: Path) -> None:
    documents = texts(400)
    write_json_lines(tmp_path / "a.jsonl", documents)
    write_json_lines(tmp_path / "b.jsonl.gz", documents)
    write_parquet(tmp_path / "c.parquet", documents)
    streams = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        data.prepare(FileSource(paths=[f"{tmp_path}/{name}"]), GPT2, tmp_path / name[0], workers=1)
        streams.append([stream(tmp_path / name[0], split).tolist() for split in ("train", "validation")])
    assert streams[0] == streams[1] == streams[2]


def test_openwebtext_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    import datasets

    documents = [*texts(700), ""]
    source = parquet_corpus(tmp_path / "repository", documents)
    data.prepare(source, GPT2, tmp_path / "t", workers=1)
    files = sorted(map(str, (tmp_path / "repository").rglob("*.parquet")))
    # As in nanoGPT's data/openwebtext/prepare.py, but for the size.
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    parts = loaded.train_test_split(test_size=0.01, seed=2357, shuffle=True)
    assert sorted(documents_of(tmp_path / "t", "validation")) == sorted(parts["test"]["text"])
    assert sorted(documents_of(tmp_path / "t", "train")) == sorted(parts["train"]["text"])


def test_rows_without_text_count_for_the_split_and_are_left_out(tmp_path: Path) -> None:
    documents: list[str | None] = list(texts(300))
    source = parquet_corpus(tmp_path / "repository", documents)
    data.prepare(source, GPT2, tmp_path / "whole", workers=1)
    kept = documents_of(tmp_path / "whole", "validation")
    holes: list[str | None] = [None if number % 3 == 0 else text for number, text in enumerate(documents)]
    parquet_corpus(tmp_path / "repository", holes)
    data.prepare(source, GPT2, tmp_path / "holes", workers=1)
    assert documents_of(tmp_path / "holes", "validation") == [text for text in kept if text in holes]


def test_nanogpt_rule_refuses_files_that_do_not_tell_their_rows(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", texts(10))
    source = FileSource(paths=[f"{tmp_path}/a.jsonl"], split=SplitRule("nanogpt", 0.1, 2357))
    with pytest.raises(
        DataError, match=r"needs parquet files.*a\.jsonl is not one; choose data\.validation\.rule=hash"
    ):
        data.prepare(source, GPT2, tmp_path / "t")


@pytest.fixture
def corpus(tmp_path: Path) -> FileSource:
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(4):
        write_json_lines(root / f"{number}.jsonl", texts(250, seed=number))
    write_text(root / "z.txt", texts(600, seed=9))
    return FileSource(paths=[f"{root}/*"])


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path, corpus: FileSource) -> None:
    made = []
    for workers in (1, 3):
        data.prepare(corpus, GPT2, tmp_path / str(workers), workers=workers)
        made.append(contents(tmp_path / str(workers)))
    assert len(made[0]) > 10
    assert made[0] == made[1]


DRIVER = """
import sys
import data, data.plan
data.plan.SMALLEST_UNIT = 20_000
data.prepare(data.FileSource(paths=[sys.argv[1]]), data.TokenizerSpec(), sys.argv[2], workers=2)
"""


def start(corpus: FileSource, directory: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, corpus.paths[0], os.fspath(directory)], text=True, **options)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_a_preparation_killed_again_and_again_gives_the_same_bytes(tmp_path: Path, corpus: FileSource) -> None:
    data.prepare(corpus, GPT2, tmp_path / "undisturbed", workers=1)
    directory = tmp_path / "killed"
    generator = random.Random(0)
    kills = 0
    for _ in range(5):
        done = len(list((directory / "units").glob("*.json"))) if directory.exists() else 0
        process = start(corpus, directory)
        # Wait for some progress and then a random moment, so that kills hit different places in a unit.
        wait_for(
            lambda done=done, process=process: (
                process.poll() is not None or len(list((directory / "units").glob("*.json"))) > done
            )
        )
        time.sleep(generator.uniform(0, 0.02))
        kills += process.poll() is None
        process.kill()  # only the parent: its workers have to notice
        process.wait()
    assert kills
    data.prepare(corpus, GPT2, directory, workers=2)
    assert contents(directory) == contents(tmp_path / "undisturbed")
    assert not (directory / "units").exists()


def test_workers_end_when_their_parent_is_killed(tmp_path: Path, corpus: FileSource) -> None:
    process = start(corpus, tmp_path / "t")
    children: list[psutil.Process] = []

    def two_workers() -> bool:
        children[:] = psutil.Process(process.pid).children()
        return len(children) == 2

    wait_for(two_workers)
    process.kill()
    process.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))


def test_finished_work_is_kept_after_an_error(tmp_path: Path, corpus: FileSource) -> None:
    root = Path(corpus.paths[0]).parent
    good = (root / "3.jsonl").read_bytes()
    (root / "3.jsonl").write_bytes(good[: len(good) // 2] + b"\xff" + good[len(good) // 2 :])
    with pytest.raises(DataError, match=r"3\.jsonl is not UTF-8"):
        data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    assert not (tmp_path / "t" / "manifest.json").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.npy")}
    assert made
    (root / "3.jsonl").write_bytes(good)
    data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    kept = [path for path, time_ns in made.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(made) - 2
    data.prepare(corpus, GPT2, tmp_path / "anew", workers=1)
    assert contents(tmp_path / "t") == contents(tmp_path / "anew")


def test_shards_of_changed_text_are_remade_after_an_interruption(tmp_path: Path, corpus: FileSource) -> None:
    root = Path(corpus.paths[0]).parent
    bad = root / "zz.jsonl"
    bad.write_text("not json\n")
    with pytest.raises(DataError, match="not JSON"):
        data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    bad.unlink()
    write_json_lines(root / "1.jsonl", texts(250, seed=77))  # as many documents, of another length
    (root / "2.jsonl").unlink()
    data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    data.prepare(corpus, GPT2, tmp_path / "anew", workers=1)
    assert contents(tmp_path / "t") == contents(tmp_path / "anew")


def test_a_corpus_that_changes_during_the_preparation_is_refused(tmp_path: Path, corpus: FileSource) -> None:
    class Rewriting(LineProgress):
        def begin(self, total_bytes: int, done_bytes: int) -> None:
            super().begin(total_bytes, done_bytes)
            write_text(Path(corpus.paths[0]).parent / "z.txt", texts(600, seed=78))

    with pytest.raises(DataError, match="the corpus changed during the preparation; rerun"):
        data.prepare(corpus, GPT2, tmp_path / "t", workers=1, progress=Rewriting())
    assert not (tmp_path / "t" / "manifest.json").exists()
    data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    data.prepare(corpus, GPT2, tmp_path / "anew", workers=1)
    assert contents(tmp_path / "t") == contents(tmp_path / "anew")


def test_the_current_directory_may_have_modules_named_as_ours(
    tmp_path: Path, corpus: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    data.prepare(corpus, GPT2, tmp_path / "t", workers=1)


def test_a_receipt_does_not_vouch_for_the_shard_of_a_later_preparation(
    tmp_path: Path, corpus: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its shards had their names and before its own receipt was written."""
    directory, listener = tmp_path / "t", SimpleNamespace(reading=lambda _: None, progress=lambda *_: None)
    (directory / "units").mkdir(parents=True)
    files = [Path(corpus.paths[0]).parent / "1.jsonl"]
    (unit, *_) = plan.plan_units(files, "text", SplitRule(), plan.SMALLEST_UNIT, lambda _: None)
    common = (unit, directory, "text", SplitRule(), DocumentEncoder(gpt2()))
    tokenise.make_shards(*common, "first", listener)
    assert list((directory / "units").iterdir())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenise, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenise.make_shards(*common, "second", listener)
    assert not list((directory / "units").iterdir())


def test_a_killed_worker_is_one_clear_error(tmp_path: Path, corpus: FileSource) -> None:
    process = start(corpus, tmp_path / "t", stderr=subprocess.PIPE)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 2)
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert "DataError: a worker was killed (signal 9: usually out of memory) while it read" in errors
    assert "rerun the same command to resume, with fewer workers" in errors


def test_a_full_disk_is_one_clear_error_and_what_was_done_is_kept(tmp_path: Path, corpus: FileSource) -> None:
    limit = 15_000  # bytes per file; only the last unit is larger
    process = start(
        corpus,
        tmp_path / "t",
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert "cannot be written: File too large; raise ulimit -f and rerun the same command" in errors
    data.prepare(corpus, GPT2, tmp_path / "t", workers=2)
    data.prepare(corpus, GPT2, tmp_path / "anew", workers=1)
    assert contents(tmp_path / "t") == contents(tmp_path / "anew")


def test_concurrent_preparations_do_not_disturb_each_other(tmp_path: Path, corpus: FileSource) -> None:
    data.prepare(corpus, GPT2, tmp_path / "alone", workers=1)
    others = [start(corpus, tmp_path / "t") for _ in range(3)]
    assert [process.wait() for process in others] == [0, 0, 0]
    assert contents(tmp_path / "t") == contents(tmp_path / "alone")


def test_a_finished_directory_is_left_as_it_is_and_needs_neither_corpus_nor_permission_to_write(
    tmp_path: Path, corpus: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    for path in Path(corpus.paths[0]).parent.iterdir():
        path.unlink()
    monkeypatch.setattr(preparation, "_exclusive", None)
    assert data.prepare(corpus, GPT2, tmp_path / "t") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == before


@pytest.mark.parametrize("change", ["lengthened", "added", "removed", "renamed"])
def test_a_corpus_that_changed_since_it_was_prepared_is_refused(
    change: str, tmp_path: Path, corpus: FileSource
) -> None:
    root, directory = Path(corpus.paths[0]).parent, tmp_path / "t"
    manifest = data.prepare(corpus, GPT2, directory, workers=1)
    match change:
        case "lengthened":
            with (root / "z.txt").open("a") as file:
                file.write("more")
        case "added":
            write_text(root / "zz.txt", ["new"])
        case "removed":
            (root / "0.jsonl").unlink()
        case "renamed":
            (root / "0.jsonl").rename(root / "00.jsonl")
    size = manifest.source["listing"]["bytes"]
    with pytest.raises(
        DataError, match=rf"{directory}: .*changed.* 5 files of {size:,} bytes .*data\.name.*data\.directory"
    ):
        data.prepare(corpus, GPT2, directory)


def test_a_local_mirror_that_changed_since_it_was_prepared_is_refused(tmp_path: Path) -> None:
    source = parquet_corpus(tmp_path / "repository", list(texts(300)))
    manifest = data.prepare(source, GPT2, tmp_path / "t", workers=1)
    assert data.prepare(replace(source, local=None), GPT2, tmp_path / "t") == manifest, "nothing is downloaded"
    assert data.prepare(replace(source, local=tmp_path / "absent"), GPT2, tmp_path / "t") == manifest
    parquet_corpus(tmp_path / "repository", list(texts(310)))
    with pytest.raises(DataError, match="changed"):
        data.prepare(source, GPT2, tmp_path / "t")


def test_tokens_of_another_request_are_refused_with_the_difference(tmp_path: Path, corpus: FileSource) -> None:
    data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    for other, difference in (
        (
            FileSource(paths=["elsewhere/*"]),
            r"prepared with paths=.* asks for paths=\['elsewhere/\*'\]; set another data.name",
        ),
        (FileSource(paths=corpus.paths, split=SplitRule("hash", 0.2)), r"'fraction': 0\.05.*'fraction': 0\.2"),
    ):
        with pytest.raises(DataError, match=difference):
            data.prepare(other, GPT2, tmp_path / "t")
    with pytest.raises(DataError, match=r"tokenizer='gpt2', .* but this run asks for tokenizer='bpe'"):
        data.prepare(corpus, TokenizerSpec("bpe", 300), tmp_path / "t")


def test_the_manifest_says_where_tokens_come_from_and_nothing_of_the_machine(
    tmp_path: Path, corpus: FileSource
) -> None:
    manifest = data.prepare(corpus, GPT2, tmp_path / "t", workers=1)
    text = (tmp_path / "t" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert manifest.source["listing"]["files"] == 5
    assert manifest.split_rule == {"rule": "hash", "fraction": 0.05, "seed": 0}
    assert manifest.tokenizer == gpt2().info
    request = json.loads((tmp_path / "t" / "preparation.json").read_text())["request"]
    assert request["paths"] == list(corpus.paths)


@pytest.mark.parametrize(
    "foreign", ["train-00000.npy", "model.partial", "units/7.txt", "thesis.tex", "units"], ids=lambda name: name
)
def test_a_foreign_directory_is_refused_and_left_alone(foreign: str, tmp_path: Path, corpus: FileSource) -> None:
    path = tmp_path / "t" / foreign
    path.parent.mkdir(parents=True)
    if foreign == "units":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("years of work")
    with pytest.raises(DataError, match=f"is not a token directory: it holds {foreign} and no manifest.json"):
        data.prepare(corpus, GPT2, tmp_path / "t")
    assert {found.name for found in (tmp_path / "t").iterdir()} - {".lock"} == {Path(foreign).parts[0]}


@pytest.mark.parametrize("path", ["", "manifest.json", "preparation.json", "train-00000.npy"])
def test_tokens_that_may_not_be_read_are_named(
    path: str, tmp_path: Path, corpus: FileSource, permissions_bind: None
) -> None:
    root = tmp_path / "tokens"
    directory = data.token_directory(root, corpus, GPT2)
    data.prepare(corpus, GPT2, directory, workers=1)
    (directory / path).chmod(0)
    uses = [lambda: data.TokenDataset(directory, "train")]
    if not path.endswith(".npy"):  # these do not open shards
        uses = [lambda: data.prepare(corpus, GPT2, directory), lambda: data.ensure_prepared(root, corpus, GPT2)]
    for use in uses:
        with pytest.raises(DataError, match=f"{directory / path}.*Permission denied"):
            use()
    directory.chmod(0o755)


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", "a/", "a\0b"])
def test_a_sources_name_does_not_lead_out_of_the_directory_of_tokens(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.name="):
        data.token_directory(tmp_path, FileSource(paths=["*"], name=name), GPT2)


def test_a_corpus_of_no_text_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [None, None])
    with pytest.raises(DataError, match="has no documents with text"):
        data.prepare(FileSource(paths=[f"{tmp_path}/a.parquet"]), GPT2, tmp_path / "t")


def test_a_corpus_too_small_for_two_splits_is_refused(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", texts(3))
    with pytest.raises(DataError, match=r"none of the 3 documents falls into validation .*data\.validation\.fraction"):
        data.prepare(FileSource(paths=[f"{tmp_path}/a.jsonl"]), GPT2, tmp_path / "t")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, corpus: FileSource) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path}/file.* cannot be written"):
        data.prepare(corpus, GPT2, tmp_path / "file" / "t")


# The trained tokenizer


def test_a_tokenizer_is_trained_on_the_training_documents_and_kept_with_the_tokens(
    tmp_path: Path, corpus: FileSource
) -> None:
    spec = TokenizerSpec("bpe", 400)
    made = []
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        manifest = data.prepare(corpus, spec, directory, workers=workers)
        made.append(contents(directory))
    assert made[0] == made[1]
    tokenizer = data.load_tokenizer(directory)
    assert manifest.tokenizer == tokenizer.info
    assert (manifest.vocab_size, manifest.tokenizer.end_of_text) == (400, 399)
    ids = stream(directory, "validation")
    first = ids[: int(np.flatnonzero(ids == 399)[0])]
    assert corpus.split.is_validation(tokenizer.decode(first))


def test_a_tokenizer_is_trained_on_text_with_half_a_surrogate_pair(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", [text + "\ud800" for text in texts(250)])
    data.prepare(FileSource(paths=[f"{tmp_path}/a.jsonl"]), TokenizerSpec("bpe", 300), tmp_path / "t", workers=1)
    ids = stream(tmp_path / "t", "train")
    assert "\ufffd" in data.load_tokenizer(tmp_path / "t").decode(ids)


def test_a_tokenizers_share_of_text_is_counted_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(f"{number}" + "中文字" * 40 for number in range(100)))
    (unit,) = plan.plan_units([path], "text", SplitRule(), 1 << 20, lambda _: None)
    taken = list(tokenise.training_texts([unit], "text", SplitRule(), 0.5, lambda _: None))
    assert 40 < len(taken) < 60


def test_a_tokenizer_trained_before_an_interruption_is_used_again(
    tmp_path: Path, corpus: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TokenizerSpec("bpe", 400)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "run_requests", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(corpus, spec, tmp_path / "t")
    trained = (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns
    data.prepare(corpus, spec, tmp_path / "t", workers=1)
    assert (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns == trained


def test_a_changed_tokenizer_file_is_refused(tmp_path: Path, corpus: FileSource) -> None:
    data.prepare(corpus, TokenizerSpec("bpe", 400), tmp_path / "t", workers=1)
    path = tmp_path / "t" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"was prepared with a tokenizer of sha256 .*restore tokenizer\.json"):
        data.load_tokenizer(tmp_path / "t")
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged or not a byte-level BPE"):
        data.load_tokenizer(tmp_path / "t")


# First use


def test_the_sample_prepares_itself_on_first_use_also_from_several_ranks(tmp_path: Path) -> None:
    ready: list[Path] = []
    ranks = [
        threading.Thread(target=lambda: ready.append(data.ensure_prepared(tmp_path, SampleSource(), GPT2)))
        for _ in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert ready == [tmp_path / "sample-gpt2"] * 2
    manifest: Manifest = data.load_manifest(ready[0])
    assert manifest.splits["train"].tokens == 4_558_723
    assert manifest.splits["validation"].tokens == 247_692
    assert manifest.splits["validation"].documents == pytest.approx(0.05 * 1903, rel=0.2)
    for split in ("train", "validation"):
        assert not any("<|endoftext|>" in text for text in documents_of(ready[0], split))
    data.ensure_prepared(tmp_path, SampleSource(), GPT2)


def test_a_missing_large_corpus_is_refused_and_the_remedy_keeps_its_overrides(
    tmp_path: Path, corpus: FileSource
) -> None:
    """The source does not know all of them: not data= itself, nor data.directory."""
    hub = HubSource("mine", "Skylion007/openwebtext", "main", "*", text_column="content")
    for source in (hub, replace(corpus, name="novels")):
        with pytest.raises(DataError) as caught:
            data.ensure_prepared(tmp_path, source, TokenizerSpec("bpe", 4096))
        assert str(caught.value) == (
            f"{tmp_path}/{source.name}-bpe4096 holds no prepared tokens; prepare them once with scripts/prepare_data.py, "
            "this run's data= and data.* overrides, and tokenizer=bpe tokenizer.vocab_size=4096"
        )


# What it shows


def test_progress_is_lines_where_there_is_no_terminal_and_a_bar_where_there_is() -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    assert isinstance(progress_display(io.StringIO()), LineProgress)
    assert isinstance(progress_display(terminal), BarProgress)


@pytest.mark.parametrize("display", [LineProgress, BarProgress])
def test_progress_shows_throughput_and_what_is_left(
    tmp_path: Path, corpus: FileSource, display: Callable[[io.StringIO], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.progress._LINE_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "140")
    output = io.StringIO()
    data.prepare(corpus, TokenizerSpec("bpe", 300), tmp_path / "t", workers=2, progress=display(output))
    assert "training a tokenizer of 300 ids" in output.getvalue()
    assert "M tokens/s" in output.getvalue()
    assert re.search(r"\b100(\.0)?%", output.getvalue())
    assert display is BarProgress or " left" in output.getvalue()
