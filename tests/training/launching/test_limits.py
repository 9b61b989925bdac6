"""Limits too low for torch or for several ranks are reported in one line with the remedy."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from training.compose import compose
from training.config import ConfigurationError
from training.launching import limits
from training.launching.ranks import start_ranks

ROOT = Path(__file__).resolve().parents[3]


def test_too_little_address_space_is_one_line() -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)),
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the address space is limited to 512 MiB")
    assert "ulimit -v" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_too_few_descriptors_for_the_ranks_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (24, 24))
    with pytest.raises(ConfigurationError, match=r"nproc_per_node=2: open files are limited to 24, .* ulimit -n 64"):
        start_ranks(compose(["launcher.nproc_per_node=2"]))


def test_a_soft_limit_of_descriptors_is_raised_as_far_as_the_ranks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (24, 4096))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda *given: raised.append(given))
    assert limits.descriptors_failure(8) is None
    assert raised == [(resource.RLIMIT_NOFILE, (160, 4096))]
