"""Generated triples: every answer recomputed another way, uniqueness, mix, determinism, user errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from lmlab.data import skills
from lmlab.records import UserError

WORDS = [a + b + c for a in ("ba", "ke", "lo", "mi") for b in "nrst" for c in ("a", "el", "ody", "um")]


def pop_order(given: str, key: Callable[[str], object]) -> str:
    """Selection sort, so that it shares nothing with the code under test."""
    left, result = given.split(), []
    while left:
        smallest = left[0]
        for item in left:
            if key(item) < key(smallest):  # type: ignore[operator]
                smallest = item
        left.remove(smallest)
        result.append(smallest)
    return " ".join(result)


def spaced(given: str, solve: Callable[[str], str]) -> str:
    """Solve on spaced letters ("c a t") or a raw word ("cat"), whichever was given."""
    gap = " " if " " in given else ""
    return gap.join(solve(" ".join(given.replace(" ", ""))).split())


def backwards(given: str) -> str:
    stack, out = given.split(), []
    while stack:
        out.append(stack.pop())
    return " ".join(out)


def count(given: str) -> str:
    letter, _, rest = given.partition(" in ")
    return str(sum(1 for character in rest if character == letter))


def total(given: str) -> str:
    first, second = given.split()
    return str(int(first) + int(second))


SOLVERS: dict[str, Callable[[str], str]] = {
    "first_word": lambda given: given[: given.index(" ")],
    "last_word": lambda given: given[given.rindex(" ") + 1 :],
    "third_word": lambda given: given.split(" ", 3)[2],
    "repeat": lambda given: given,
    "swap": lambda given: "{1} {0}".format(*given.split()),
    "reverse_words": backwards,
    "rotate": lambda given: given.partition(" ")[2] + " " + given.partition(" ")[0],
    "count_words": lambda given: str(given.count(" ") + 1),
    "first_letter": lambda given: given[0],
    "add": total,
    "difference": lambda given: str(max(map(int, given.split())) - min(map(int, given.split()))),
    "largest": lambda given: pop_order(given, int).split()[-1],
    "next_number": lambda given: str(1 + int(given)),
    "sort_numbers": lambda given: pop_order(given, int),
    "sort_words": lambda given: pop_order(given, str),
    "longest_word": lambda given: pop_order(given, len).split()[-1],
    "reverse_letters": lambda given: spaced(given, backwards),
    "sort_letters": lambda given: spaced(given, lambda letters: pop_order(letters, str)),
    "count_letter": count,
}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_answer_is_right(level: int) -> None:
    records = skills.triples(level=level, num_records=3000, seed=5, words=WORDS)
    assert {r.fields["skill"] for r in records} == {task.skill for task in skills.LEVELS[level]}
    for record in records:
        fields = record.fields
        assert fields["output"] == SOLVERS[fields["skill"]](fields["input"]), fields
        assert 2 <= len(fields["instruction"].split()) <= 6


def test_every_task_has_an_independent_solver() -> None:
    assert {task.skill for tasks in skills.LEVELS.values() for task in tasks} == set(SOLVERS)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_records_are_unique_and_numbered(level: int) -> None:
    records = skills.triples(level=level, num_records=2500, seed=0, words=WORDS)
    assert len(records) == 2500
    assert len({(r.fields["instruction"], r.fields["input"]) for r in records}) == 2500
    assert [r.where for r in records] == [f"skills:{index}" for index in range(2500)]
    assert all(r.group is None for r in records)
    assert all(set(r.fields) == {"instruction", "input", "output", "skill"} for r in records)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_instruction_means_one_task(level: int) -> None:
    instructions = [task.instruction for task in skills.LEVELS[level]]
    assert len(set(instructions)) == len(instructions) >= 8


@pytest.mark.parametrize("level", [1, 2, 3])
def test_tasks_take_turns_in_a_drawn_order(level: int) -> None:
    tasks = skills.LEVELS[level]
    records = skills.triples(level=level, num_records=20 * len(tasks), seed=1, words=WORDS)
    order = [r.fields["skill"] for r in records]
    assert set(Counter(order).values()) == {20}
    assert order != [task.skill for task in tasks] * 20


def test_same_arguments_same_records_and_the_seed_counts() -> None:
    def make(seed: int, level: int = 2) -> list[tuple[str, str]]:
        records = skills.triples(level=level, num_records=300, seed=seed, words=WORDS)
        return [(r.fields["instruction"], r.fields["input"]) for r in records]

    assert make(3) == make(3)
    assert make(3) != make(4)
    assert len(set(make(3)) & set(make(4))) < 150


def test_a_used_up_task_leaves_its_turns_to_the_others() -> None:
    records = skills.triples(level=1, num_records=4000, seed=0, words=WORDS)
    counts = Counter(r.fields["skill"] for r in records)
    assert counts["add"] <= 100
    assert counts["next_number"] <= 99
    assert counts["reverse_words"] > 4000 / len(skills.LEVELS[1])


def test_the_longest_word_is_one() -> None:
    for record in skills.triples(level=3, num_records=800, seed=2, words=WORDS):
        if record.fields["skill"] == "longest_word":
            lengths = [len(word) for word in record.fields["input"].split()]
            assert lengths.count(max(lengths)) == 1


def test_letters_are_counted_to_zero_and_beyond_one() -> None:
    records = skills.triples(level=2, num_records=2000, seed=2, words=["banana", *WORDS])
    answers = {r.fields["output"] for r in records if r.fields["skill"] == "count_letter"}
    assert {"0", "1", "2"} <= answers


@pytest.mark.parametrize("level", [0, 4, -1])
def test_an_unknown_level_is_a_user_error(level: int) -> None:
    with pytest.raises(UserError) as caught:
        skills.triples(level=level, num_records=10, seed=0, words=WORDS)
    assert caught.value.where == "data.level"
    assert str(level) in caught.value.what
    assert caught.value.fix == "use 1, 2 or 3"


def test_more_records_than_there_are_is_a_user_error() -> None:
    few = ["red", "green", "blue", "black", "white", "grey"]
    with pytest.raises(UserError) as caught:
        skills.triples(level=1, num_records=50_000, seed=0, words=few)
    assert caught.value.where == "data.num_records"


@pytest.mark.parametrize("words", [["red"] * 8, ["red", "green"], []])
def test_too_few_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="at least 6 words"):
        skills.triples(level=1, num_records=10, seed=0, words=words)
