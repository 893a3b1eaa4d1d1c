"""What is said of a tokenizer, against numbers counted by hand."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmlab.records import UserError
from lmlab.tokenizers import train_bpe, train_chars
from lmlab.tokenizers.measure import EmbeddingCost, Loss, Measurement, measure, pieces, word_spans
from lmlab.tokenizers.train import PreTokenizerName

AWKWARD = [
    "é",
    "日本語 です",
    "हिन्दी में",
    "a\r\n\tb  c\u00a0",
    "👩‍👧 x",
    "e\u0301\u0323",
    "don't 12345",
    "",
    "  ",
]


def byte_level(*merges: str, words: bool = True) -> Any:
    """All bytes and these merges ("t h"), over GPT-2's words or none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokens = ["<|end|>", *alphabet, *("".join(pair) for pair in pairs)]
    backend: Any = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


THE = ("t h", "th e", "Ġ the")


def test_counts_of_a_sentence_by_hand() -> None:
    # the | Ġthe | Ġ c a t : 6 tokens over 11 bytes; "cat" is touched by three of them, its space is no part of it.
    found = measure(byte_level(*THE), ["the the cat"])
    assert (found.texts, found.characters, found.size_bytes, found.tokens) == (1, 11, 11, 6)
    assert (found.words, found.touches, found.split_words, found.exact) == (3, 5, 1, 1)
    assert found.bytes_per_token == pytest.approx(11 / 6)
    assert found.fertility == pytest.approx(5 / 3)
    assert found.split_share == pytest.approx(1 / 3)
    assert len(found.ids) == 6  # the, Ġthe, Ġ, c, a, t


def test_characters_of_several_bytes_by_hand() -> None:
    # é is two bytes, 日 three: without merges every byte is a token, and each touches the word.
    found = measure(byte_level(), ["é 日"])
    assert (found.characters, found.size_bytes, found.tokens, found.words) == (3, 6, 6, 2)
    assert (found.touches, found.split_words, found.exact) == (5, 2, 1)


def test_a_token_over_two_words_touches_both_and_splits_none() -> None:
    found = measure(byte_level("o f", "of Ġ", "ofĠ a", words=False), ["of a"])
    assert (found.tokens, found.words, found.touches, found.split_words) == (1, 2, 2, 0)
    assert found.fertility == 1


def test_words_are_letters_marks_and_digits_of_any_script() -> None:
    text = "don't, 3rd: हिन्दी e\u0301a _x"
    words = [text[start:end] for start, end in word_spans(text)]
    assert words == ["don", "t", "3rd", "हिन्दी", "e\u0301a", "x"]
    assert word_spans("").shape == (0, 2)
    assert word_spans("... \n").shape == (0, 2)


def test_texts_without_words_or_tokens_have_no_rates() -> None:
    found = measure(byte_level(), ["...", ""])
    assert (found.texts, found.exact, found.words, found.fertility, found.split_share) == (
        2,
        2,
        0,
        None,
        None,
    )
    assert Measurement().bytes_per_token is None


def test_measurements_add_up() -> None:
    tokenizer = byte_level(*THE)
    whole = measure(tokenizer, ["the cat", "the dog", "é"])
    assert measure(tokenizer, ["the cat"]) + measure(tokenizer, ["the dog", "é"]) == whole
    assert len(whole.ids) == 10  # the, Ġ, c, a, t, d, o, g, and the two bytes of é


def test_what_does_not_come_back_is_counted_and_shown() -> None:
    tokenizer = train_chars(["abc"], special_tokens=["<|endoftext|>"], max_chars=100)
    found = measure(tokenizer, ["cab", "abzc", "zz"])
    assert (found.texts, found.exact) == (3, 1)
    assert found.loss == Loss("abzc", "ab<|unk|>c")


@pytest.mark.parametrize("pre_tokenizer", get_args(PreTokenizerName))
def test_pieces_join_to_the_text_and_count_every_token(pre_tokenizer: str) -> None:
    tokenizer = train_bpe(
        ["the day 日本 of the day 12\n" * 9],
        vocab_size=300,
        pre_tokenizer=pre_tokenizer,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        max_chars=1000,
    )
    for text in AWKWARD:
        made = pieces(tokenizer, text)
        assert "".join(piece for piece, _ in made) == text
        assert sum(count for _, count in made) == len(tokenizer(text).input_ids)
        assert measure(tokenizer, [text]).exact == 1


def test_pieces_by_hand() -> None:
    assert pieces(byte_level(*THE), "the the é") == [("the", 1), (" the", 1), (" ", 1), ("é", 2)]
    assert pieces(byte_level(), "") == []


def test_spaces_left_out_of_the_offsets_belong_to_the_token_behind_them() -> None:
    """A tokenizer that trims its offsets, as GPT-2's and RoBERTa's converted files do."""
    tokenizer = byte_level(*THE)
    backend: Any = tokenizer.backend_tokenizer
    from tokenizers import processors

    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("the the", return_offsets_mapping=True).offset_mapping == [(0, 3), (4, 7)]
    assert pieces(tokenizer, "the the") == [("the", 1), (" the", 1)]


@pytest.mark.slow
def test_real_sentencepiece_tokens_join_to_the_text(real_data: Any) -> None:
    from lmlab.tokenizers import load_tokenizer

    for name in ("stories260k-hf", "tokenizers/gpt2", "tokenizers/mistral-v1"):
        tokenizer = load_tokenizer(real_data / name)
        for text in ["Once upon a time\n日本 é", *(text for text in AWKWARD if text)]:
            made = pieces(tokenizer, text)
            assert "".join(piece for piece, _ in made) == text, name
            assert sum(n for _, n in made) == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_cost_of_an_embedding_by_hand() -> None:
    cost = EmbeddingCost(rows=512, hidden_size=192, body=98_304)
    assert (cost.parameters(tied=True), cost.parameters(tied=False)) == (98_304, 196_608)
    assert cost.share(tied=True) == 0.5
    assert cost.share(tied=False) == pytest.approx(2 / 3)
    assert cost.megabytes(tied=True, bytes_per_parameter=2) == pytest.approx(0.196608)
    assert cost.megabytes(tied=False, bytes_per_parameter=16) == pytest.approx(3.145728)
    assert EmbeddingCost(512, 192).share(tied=True) is None


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        measure(byte_level(), ["\ud800"])


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow is a slow tokenizer"):
        measure(Slow(), ["a"])  # pyright: ignore[reportArgumentType]
