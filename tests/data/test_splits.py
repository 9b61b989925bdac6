from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, SplitRule


@settings(deadline=None, max_examples=25)
@given(
    documents=st.integers(2, 5000),
    fraction=st.sampled_from([0.0005, 0.01, 0.1, 0.5]),
    seed=st.sampled_from([2357, 0, 1]),
)
def test_nanogpt_rule_takes_the_documents_of_train_test_split(documents: int, fraction: float, seed: int) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"row": list(range(documents))})
    parts = dataset.train_test_split(test_size=fraction, seed=seed, shuffle=True)
    rows = SplitRule("nanogpt", fraction, seed).validation_rows(documents)
    assert rows.tolist() == sorted(parts["test"]["row"])


def test_nanogpt_rule_takes_as_many_documents_of_openwebtext_as_nanogpt_did() -> None:
    rows = SplitRule("nanogpt", 0.0005, 2357).validation_rows(8_013_769)
    assert rows.size == 4007
    assert np.unique(rows).size == 4007


def test_hash_rule_is_a_function_of_the_text_and_the_seed() -> None:
    texts = [f"document {number}" for number in range(2000)]
    rule = SplitRule("hash", 0.1)
    chosen = [text for text in texts if rule.is_validation(text)]
    assert 140 < len(chosen) < 260
    assert [text for text in reversed(texts) if rule.is_validation(text)] == chosen[::-1]
    assert [text for text in texts if SplitRule("hash", 0.1, seed=1).is_validation(text)] != chosen
    assert {text for text in texts if SplitRule("hash", 0.05).is_validation(text)} < set(chosen)


def test_the_split_of_known_documents_is_frozen() -> None:
    # A change here moves documents between train and validation in every prepared corpus.
    texts = [f"document {number}" for number in range(200)]
    chosen = [number for number, text in enumerate(texts) if SplitRule("hash", 0.05).is_validation(text)]
    assert chosen == [13, 49, 97, 103, 137, 150, 154, 165, 171, 196]
    assert SplitRule() == SplitRule("hash", 0.05, 0)
    assert SplitRule().describe() == {"rule": "hash", "fraction": 0.05, "seed": 0}


def test_a_document_is_known_by_its_first_65536_characters() -> None:
    rule = SplitRule("hash", 0.5)
    beginning = "x" * (2**16 - 1)
    within = {rule.is_validation(beginning + last) for last in "abcdefgh"}
    beyond = {rule.is_validation(beginning + "x" + after) for after in ["", *"abcdefgh"]}
    assert within == {True, False}
    assert len(beyond) == 1


def test_half_a_surrogate_pair_has_a_split() -> None:
    assert {SplitRule("hash", 0.5).is_validation(f"{number}\ud800") for number in range(8)} == {True, False}


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"rule": "random"}, "validation.rule"),
        ({"fraction": 0.0}, "validation.fraction"),
        ({"fraction": 1.0}, "validation.fraction"),
        ({"seed": -1}, "validation.seed"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_its_key(arguments: dict[str, object], key: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}="):
        SplitRule(**arguments)  # type: ignore[arg-type]


def test_a_split_that_would_be_empty_is_refused() -> None:
    with pytest.raises(DataError, match="1 documents leaves one split empty"):
        SplitRule("nanogpt", 0.5, 0).validation_rows(1)
