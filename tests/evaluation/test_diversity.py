"""Figures of generated texts against counts made by hand, and against nltk's n-grams."""

from __future__ import annotations

import pytest

from lmlab.evaluation.diversity import distinct, repetition, similarity, text_figures, words
from lmlab.records import SAMPLE_FIGURES


def test_words_are_runs_of_letters_and_single_marks() -> None:
    assert words("Don't stop: x_1 = 2.5!\n") == ["Don", "'", "t", "stop", ":", "x_1", "=", "2", ".", "5", "!"]
    assert words("été 北京") == ["été", "北京"]
    assert words(" \n\t") == []


def test_counted_by_hand() -> None:
    units = ["a", "b", "a", "b", "a", "b"]
    assert distinct(units, 1) == 2 / 6
    assert distinct(units, 2) == 2 / 5  # ab ba ab ba ab
    assert repetition(units) == 1 - 2 / 3  # abab baba abab
    assert distinct(["a", "b", "c", "d"], 4) == 1.0
    assert repetition(["a", "b", "c", "d"]) == 0.0
    assert distinct(["a"], 2) is None
    assert repetition(["a", "b", "c"]) is None


@pytest.mark.parametrize("n", [1, 2, 4])
def test_against_nltk_ngrams(n: int) -> None:
    ngrams = pytest.importorskip("nltk.util", reason="nltk is not installed").ngrams
    units = words("the cat saw the dog and the cat saw the bird, the cat saw the dog again. " * 3)
    theirs = list(ngrams(units, n))
    assert distinct(units, n) == len(set(theirs)) / len(theirs)


def test_similarity_counts_words_that_stay_in_order() -> None:
    assert similarity("the cat sat", "the cat sat") == 1.0
    assert similarity("the cat sat", "  the cat\nsat ") == 1.0, "white space is no word"
    assert similarity("the black cat sat", "the cat sat") == 2 * 3 / 7
    assert similarity("x y", "the cat") == 0.0
    assert similarity("", "") == 1.0
    assert similarity("", "the cat") == 0.0


def test_a_sample_has_every_figure_and_none_where_there_is_nothing_to_measure() -> None:
    first = text_figures("", earlier=None, mean_entropy=None)
    assert tuple(first) == SAMPLE_FIGURES
    assert set(first.values()) == {None}
    later = text_figures("one two three four five", earlier="one two", mean_entropy=1.25)
    assert later == {"distinct_1": 1.0, "distinct_2": 1.0, "seq_rep_4": 0.0, "mean_entropy": 1.25,
                     "similarity": 4 / 7}  # fmt: skip


def test_texts_that_would_take_minutes_are_not_compared() -> None:
    assert similarity("the " * 200, "the " * 200) == 1.0
    assert similarity("the " * 20_000, "the " * 20_000) is None
    spread = " ".join(f"word{number}" for number in range(2000))
    assert similarity(spread, spread) == 1.0, "length alone is no reason"
    assert text_figures("the " * 20_000, earlier="the " * 20_000, mean_entropy=None)["similarity"] is None
