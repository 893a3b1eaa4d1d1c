"""One token per character: nothing merged, nothing lost, unknown ones marked, long texts as short ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmlab.records import UserError
from lmlab.tokenizers import encode_document, load_tokenizer, train_chars
from lmlab.tokenizers.fast import FastEncoder

TEXT = 'First Citizen:\nBefore we proceed,  hear "me"\tspeak. é 日本 😀\r\n\n'
EOS = "<|endoftext|>"


def test_every_character_is_one_token_and_comes_back(tmp_path: Path) -> None:
    train_chars([TEXT[:20], TEXT[20:]], special_tokens=[EOS], max_chars=10_000).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, offsets = encode_document(tokenizer, TEXT, add_bos=False)
    assert offsets == [(i, i + 1) for i in range(len(TEXT))]
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer) == len(set(TEXT)) + 2
    assert tokenizer.eos_token_id == 0


def test_the_order_of_texts_does_not_matter() -> None:
    one, other = (
        train_chars(texts, special_tokens=[EOS], max_chars=99) for texts in (["ab", "c"], ["ca", "b"])
    )
    assert one.get_vocab() == other.get_vocab()


def test_an_unseen_character_is_the_unknown_token_alone() -> None:
    tokenizer = train_chars(["abc"], special_tokens=[EOS], max_chars=10)
    ids = encode_document(tokenizer, "axyb", add_bos=False)[0]
    unknown = tokenizer.unk_token_id
    assert [i == unknown for i in ids] == [False, True, True, False]


def test_a_long_text_is_encoded_as_its_characters() -> None:
    text = TEXT * 3000
    tokenizer = train_chars([text], special_tokens=[EOS], max_chars=10**6)
    ids = FastEncoder(tokenizer).encode(text)
    vocabulary = tokenizer.get_vocab()
    assert ids.tolist() == [vocabulary[character] for character in text]


def test_max_chars_ends_the_reading() -> None:
    vocabulary = train_chars(["ab", "cd", "ef"], special_tokens=[EOS], max_chars=3).get_vocab()
    assert {"a", "b", "c"} <= set(vocabulary)
    assert not {"d", "e", "f"} & set(vocabulary)


@pytest.mark.parametrize(
    ("texts", "special_tokens", "message"),
    [
        ([], [EOS], "no text"),
        ([""], [EOS], "no text"),
        (["a"], [EOS, EOS], "bad special tokens"),
        (["a"], ["x"], "bad special tokens"),
    ],
)
def test_what_cannot_work_is_refused(texts: list[str], special_tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_chars(texts, special_tokens=special_tokens, max_chars=10)
