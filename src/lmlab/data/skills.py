"""Generated triples with one right answer each, so that fine-tuning can be scored by exact match.

Every task is a small function that draws an input and computes its answer; the tasks of a level take turns, a
pair that was drawn before is drawn again, and a task whose inputs are used up leaves the turns to the others
(`add` on level 1 has 100 inputs). Everything is a pure function of the arguments.
Trade-off: level 1 draws its words from 120 short ones only. That leaves 1.7 million lists of three, far more than
are ever trained on, yet is copied within minutes by a model of 3 million parameters; level 3 uses them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from lmlab.records import Record, UserError

EASY_WORDS = 120
MAX_WORDS = 6
ATTEMPTS = 200
"""So many repeated draws in a row and a task counts as used up."""

Draw = Callable[[Random, Sequence[str]], tuple[str, str]]
"""Draws one (input, answer) with the words of the level."""


@dataclass(frozen=True)
class Task:
    """One skill: its name in reports, what the model is told, and how an input and its answer are drawn."""

    skill: str
    instruction: str
    draw: Draw


def _listed(answer: Callable[[list[str]], str], low: int, high: int) -> Draw:
    """A task over ``low`` to ``high`` distinct words."""

    def draw(rng: Random, words: Sequence[str]) -> tuple[str, str]:
        items = rng.sample(words, rng.randint(low, high))
        return " ".join(items), answer(items)

    return draw


def _numbers(answer: Callable[[list[int]], str], size: int, *, low: int, high: int) -> Draw:
    """A task over ``size`` numbers from ``low`` to ``high``."""

    def draw(rng: Random, words: Sequence[str]) -> tuple[str, str]:
        items = [rng.randint(low, high) for _ in range(size)]
        return " ".join(map(str, items)), answer(items)

    return draw


def _letters(answer: Callable[[str], Sequence[str]], gap: str) -> Draw:
    """A task over the letters of one word, written with ``gap`` between them in input and answer."""

    def draw(rng: Random, words: Sequence[str]) -> tuple[str, str]:
        word = rng.choice(words)
        return gap.join(word), gap.join(answer(word))

    return draw


def _count_letter(gap: str) -> Draw:
    """How often a letter stands in a word; a fifth of the letters are any of the alphabet, so 0 is an answer."""

    def draw(rng: Random, words: Sequence[str]) -> tuple[str, str]:
        word = rng.choice(words)
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.2 else word)
        return f"{letter} in {gap.join(word)}", str(word.count(letter))

    return draw


def _longest(rng: Random, words: Sequence[str]) -> tuple[str, str]:
    """The one longest of several words; a word as long as it is left out of the list."""
    items = rng.sample(words, MAX_WORDS)
    longest = max(items, key=len)
    items = [word for word in items if word == longest or len(word) < len(longest)]
    return " ".join(items), longest


def _spoken(items: Sequence[object]) -> str:
    return " ".join(map(str, items))


def _backwards(items: Sequence[object]) -> str:
    return _spoken(items[::-1])


def _rotated(items: Sequence[object]) -> str:
    return _spoken([*items[1:], items[0]])


def _ordered(items: list[str] | list[int]) -> str:
    return _spoken(sorted(items))


def _total(items: list[int]) -> str:
    return str(sum(items))


def _largest(items: list[int]) -> str:
    return str(max(items))


def _difference(items: list[int]) -> str:
    return str(abs(items[0] - items[1]))


def _mirrored(word: str) -> str:
    return word[::-1]


LEVELS: dict[int, tuple[Task, ...]] = {
    1: (
        Task("first_word", "Say the first word.", _listed(lambda items: items[0], 3, 3)),
        Task("last_word", "Say the last word.", _listed(lambda items: items[-1], 3, 3)),
        Task("repeat", "Repeat the words.", _listed(_spoken, 2, 3)),
        Task("swap", "Swap the two words.", _listed(_backwards, 2, 2)),
        Task("reverse_words", "Reverse the words.", _listed(_backwards, 3, 3)),
        Task("count_words", "Count the words.", _listed(lambda items: str(len(items)), 1, MAX_WORDS)),
        Task("first_letter", "Say the first letter.", _letters(lambda word: word[0], " ")),
        Task("add", "Add the numbers.", _numbers(_total, 2, low=0, high=9)),
        Task("largest", "Say the larger number.", _numbers(_largest, 2, low=0, high=20)),
        Task("sort_numbers", "Sort the numbers.", _numbers(_ordered, 3, low=0, high=9)),
        Task("next_number", "Say the next number.", _numbers(lambda items: str(items[0] + 1), 1, low=0, high=98)),
    ),
    2: (
        Task("third_word", "Say the third word.", _listed(lambda items: items[2], 4, 6)),
        Task("repeat", "Repeat the words.", _listed(_spoken, 4, 6)),
        Task("reverse_words", "Reverse the words.", _listed(_backwards, 4, 6)),
        Task("rotate", "Move the first word last.", _listed(_rotated, 4, 6)),
        Task("reverse_letters", "Reverse the letters.", _letters(_mirrored, " ")),
        Task("sort_letters", "Sort the letters.", _letters(sorted, " ")),
        Task("count_letter", "Count the letter.", _count_letter(" ")),
        Task("add", "Add the numbers.", _numbers(_total, 2, low=10, high=99)),
        Task("largest", "Say the largest number.", _numbers(_largest, 4, low=10, high=99)),
        Task("sort_numbers", "Sort the numbers.", _numbers(_ordered, 4, low=10, high=99)),
    ),
    3: (
        Task("reverse_letters", "Reverse the letters.", _letters(_mirrored, "")),
        Task("sort_letters", "Sort the letters.", _letters(sorted, "")),
        Task("count_letter", "Count the letter.", _count_letter("")),
        Task("longest_word", "Say the longest word.", _longest),
        Task("sort_words", "Sort the words.", _listed(_ordered, MAX_WORDS, MAX_WORDS)),
        Task("add", "Add the numbers.", _numbers(_total, 2, low=100, high=999)),
        Task("difference", "Say the difference.", _numbers(_difference, 2, low=100, high=999)),
        Task("sort_numbers", "Sort the numbers.", _numbers(_ordered, 5, low=100, high=999)),
    ),
}  # fmt: skip


def _vocabulary(words: Sequence[str], level: int) -> list[str]:
    """The words of a level: some short ones spread over the alphabet, all up to six letters, all."""
    if level == 3:
        return list(words)
    longest = {1: 5, 2: 6}[level]
    short = [word for word in words if len(word) <= longest]
    if len(short) < MAX_WORDS:
        return list(words)
    return short[:: max(1, -(-len(short) // EASY_WORDS))] if level == 1 else short


def triples(*, level: int, num_records: int, seed: int, words: Sequence[str]) -> list[Record]:
    """``num_records`` different triples of a level, its tasks evenly mixed, in an order drawn from ``seed``.

    Args:
        level: 1 (short lists, one-digit sums) to 3 (letters of whole words, three-digit sums).
        words: what the lists and letters are drawn from, at least 6, no word twice.

    Raises:
        UserError: no such level, or fewer different triples than asked for.
        ValueError: too few words.
    """
    if level not in LEVELS:
        raise UserError(f"skills has no level {level}", where="data.level", fix="use 1, 2 or 3")
    if len(set(words)) < MAX_WORDS or len(set(words)) < len(words):
        raise ValueError(f"skills needs at least {MAX_WORDS} words, each once; got {len(words)}")
    rng, vocabulary = Random(f"skills-{level}-{seed}"), _vocabulary(words, level)
    active, seen, drawn = list(LEVELS[level]), set[tuple[str, str]](), list[dict[str, str]]()
    while len(drawn) < num_records:
        if not active:
            raise UserError(
                f"level {level} has only {len(drawn)} different records with these words, {num_records} wanted",
                where="data.num_records",
                fix=f"use {len(drawn)} or fewer, or a higher level",
            )
        for task in list(active)[: num_records - len(drawn)]:
            for _ in range(ATTEMPTS):
                given, answer = task.draw(rng, vocabulary)
                if (task.instruction, given) not in seen:
                    break
            else:
                active.remove(task)
                continue
            seen.add((task.instruction, given))
            drawn.append(
                {"instruction": task.instruction, "input": given, "output": answer, "skill": task.skill}
            )
    rng.shuffle(drawn)
    return [Record(dict(fields), f"skills:{index}") for index, fields in enumerate(drawn)]
