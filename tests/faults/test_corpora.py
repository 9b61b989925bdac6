"""A damaged corpus or token directory is one error that names the file; `make test-faults` tries many more."""

from __future__ import annotations

from pathlib import Path

from tests.faults.corpora import fuzz_readers, fuzz_tokens, refuse_all


def test_a_bad_file_among_good_ones_is_named_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    found = refuse_all(tmp_path, ("latin1.jsonl", "cut.jsonl.gz", "cut.parquet"))
    assert found["faults"] == []
    assert found["before_any_work"] == 1  # the parquet file
    assert found["kept_shards"] > 20


def test_readers_give_text_or_a_named_error_whatever_the_damage(tmp_path: Path) -> None:
    found = fuzz_readers(tmp_path, 400, 0)
    assert found["faults"] == []
    assert found["refused"] > 50


def test_a_damaged_token_directory_is_read_or_named_and_the_full_check_finds_every_change(tmp_path: Path) -> None:
    found = fuzz_tokens(tmp_path, 200, 0)
    assert found["faults"] == []
    assert found["refused"] > 20
