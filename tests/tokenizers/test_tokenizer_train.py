"""Trained byte-level BPE: lossless, complete, deterministic, and the merges an independent trainer finds."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from tokenizers import pre_tokenizers

from lmlab import registry
from lmlab.records import UserError
from lmlab.tokenizers import (
    BPETokenizer,
    FileTokenizer,
    FromModelTokenizer,
    TextBudget,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from lmlab.tokenizers.train import CUTS, PIECE_CHARS, WORDLESS_CHARS, PreTokenizerName

DATA = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data"))
CONF = Path(__file__).parents[2] / "conf" / "tokenizer"
SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "In 1984 the 12 hobbits counted 3.14159 pies.\n    return x  # 42\n",
    "Ünïcödé, 日本語 and emoji 😀👩‍👩‍👧 in a line\r\n\tthe end",
] * 4
PRE_TOKENIZERS: Sequence[str] = get_args(PreTokenizerName)
OPTIONS: dict[str, Any] = {
    "vocab_size": 320,
    "pre_tokenizer": "digits",
    "min_frequency": 2,
    "special_tokens": SPECIALS,
    "max_chars": 100_000,
}


def with_options(change: dict[str, Any]) -> dict[str, Any]:
    return {**OPTIONS, **change}


def needs(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no test data at {path} (set LMLAB_TEST_DATA)")
    return path


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_bpe(TEXTS, **OPTIONS)


COMBINING = [chr(c) for c in range(0x300, 0x3000) if unicodedata.combining(chr(c))]
AWKWARD = [
    "\x00",
    "\r",
    "\r\n",
    "\n",
    " ",
    "  ",
    "\t",
    "\u00a0",
    "\u2028",
    "\ufeff",
    "<|im_start|>",
    "'s",
    "1",
    "<|",
]


def random_text(rng: random.Random) -> str:
    """Any Unicode scalar values of all planes, unassigned ones too, with combining marks, controls and lone spaces."""
    parts = []
    for _ in range(rng.randrange(1, 60)):
        point = rng.randrange(rng.choice((0x80, 0x800, 0xD800, 0x110000)))
        plain = "" if 0xD800 <= point < 0xE000 else chr(point)  # surrogates are no characters
        parts.append(rng.choice([plain, plain, plain, rng.choice(AWKWARD), rng.choice(COMBINING)]))
    return "".join(parts)


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_any_unicode_text_survives_encoding_and_decoding(pre_tokenizer: str) -> None:
    tokenizer = train_bpe(TEXTS, **with_options({"pre_tokenizer": pre_tokenizer}))
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(600)]
    assert {ord(c) >> 16 for text in texts for c in text} == set(range(17)), "some plane is missing"
    for text in [*texts, "", *AWKWARD, "  a  b\n\n ", "don 't , stop .", "e\u0301\u0323", "\u0301"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_real_documents_survive_saving_loading_encoding_and_decoding(
    pre_tokenizer: str, tmp_path: Path
) -> None:
    lines = needs(DATA / "clm/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    options = with_options({"vocab_size": 1000, "pre_tokenizer": pre_tokenizer})
    train_bpe(texts, **options).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(texts) == 22
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode())


def test_the_vocabulary_is_specials_then_all_bytes_then_merges(trained: Any) -> None:
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert len(trained) == len(tokens) == 320
    assert tokens[:4] == SPECIALS
    assert set(tokens[4:260]) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (trained.eos_token_id, trained.pad_token_id, trained.bos_token) == (0, 1, None)
    assert trained.clean_up_tokenization_spaces is False
    assert trained("<|im_start|>").input_ids == [2]


def test_without_a_pad_token_padding_is_eos_and_without_turn_tokens_there_is_no_template() -> None:
    tokenizer = train_bpe(TEXTS, **with_options({"special_tokens": ["<|end|>"]}))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|end|>", "<|end|>", None)


@pytest.mark.parametrize(("pre_tokenizer", "single"), [("digits", True), ("gpt2", False)])
def test_digits_are_single_only_where_asked(pre_tokenizer: str, single: bool) -> None:
    options = with_options({"pre_tokenizer": pre_tokenizer, "vocab_size": 400})
    tokenizer = train_bpe(["year 1984 and 1984 again, 1984 "] * 9, **options)
    joined = [token for token in tokenizer.get_vocab() if any(c.isdigit() for c in token) and len(token) > 1]
    assert (joined == []) is single
    pieces = [tokenizer.decode([i]) for i in tokenizer("x 1984").input_ids]
    assert (pieces[-4:] == ["1", "9", "8", "4"]) is single


def test_the_same_texts_give_the_same_file_in_another_process(trained: Any, tmp_path: Path) -> None:
    code = (
        "import sys, json; from lmlab.tokenizers import train_bpe\n"
        "texts, options = json.load(sys.stdin)\n"
        "sys.stdout.buffer.write(train_bpe(texts, **options).backend_tokenizer.to_str().encode())"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([TEXTS, OPTIONS]).encode(),
        env=environment,
        capture_output=True,
        check=True,
    )
    assert other.stdout.decode() == trained.backend_tokenizer.to_str()


def counts_at_each_merge(corpus: str, merges: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """(count of the pair that is merged, count of the most frequent pair) at every step of a plain BPE by word counts."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [(list(word), n) for word, n in Counter(w for w, _ in cut.pre_tokenize_str(corpus)).items()]
    counts: Counter[tuple[str, str]] = Counter()
    for parts, n in words:
        for pair in pairwise(parts):
            counts[pair] += n
    found = []
    for left, right in merges:
        found.append((counts[left, right], max(counts.values())))
        for parts, n in words:
            before = list(pairwise(parts))
            if (left, right) not in before:
                continue
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
            for pair in before:
                counts[pair] -= n
            for pair in pairwise(parts):
                counts[pair] += n
    return found


def test_against_reference_merges_differences_are_ties() -> None:
    """Ours and the reference's both merge a most frequent pair at every one of their steps; they differ where counts tie."""
    folder = needs(DATA / "tokenizers/bpe-train-reference")
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    reference = [(left, right) for left, right in (line.split(" ") for line in lines)]
    corpus = (folder / "corpus.en").read_text(encoding="utf-8")
    options = {"vocab_size": 500, "pre_tokenizer": "gpt2", "special_tokens": ["<|endoftext|>"]}
    tokenizer = train_bpe([corpus], **with_options(options | {"max_chars": 10**6}))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ours = [(left, right) for left, right in model["merges"]]
    assert len(ours) == len(reference) == 243
    assert len(set(ours) & set(reference)) == 239
    counts = {}
    for name, merges in (("ours", ours), ("reference", reference)):
        steps = counts_at_each_merge(corpus, merges)
        assert all(count == most for count, most in steps), name
        counts[name] = {pair: count for pair, (count, _) in zip(merges, steps, strict=True)}
    # Pair by pair: what one has and the other lacks was merged at the same count.
    only_ours = sorted(counts["ours"][pair] for pair in set(ours) - set(reference))
    only_reference = sorted(counts["reference"][pair] for pair in set(reference) - set(ours))
    assert only_ours == only_reference == [60, 70, 70, 77]
    tokens = set(json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8")))
    assert len(tokens & set(model["vocab"])) >= 490


@pytest.mark.parametrize("pre_tokenizer", [name for name in PRE_TOKENIZERS if name != "none"])
def test_a_large_text_in_pieces_gives_the_tokenizer_of_the_whole(
    pre_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    words = ["the", "tree", "12", "x_1", "(a)", "don't", "é", "end.", "\n", "\n\n  ", "  ", "\t", "ab" * 40]
    text = " ".join(rng.choice(words) for _ in range(4000))
    whole = train_bpe([text], **with_options({"pre_tokenizer": pre_tokenizer}))
    monkeypatch.setattr("lmlab.tokenizers.train.PIECE_CHARS", 50)
    pieces = list(TextBudget([text], 10**6, cut=CUTS.get(pre_tokenizer, "words")))
    assert "".join(pieces) == text
    assert len(pieces) > 30
    parts = train_bpe([text], **with_options({"pre_tokenizer": pre_tokenizer}))
    assert parts.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()


def test_pieces_are_of_bounded_size() -> None:
    text = "some words here\n" * (PIECE_CHARS // 4)
    most: dict[Any, int] = {"words": PIECE_CHARS, "lines": PIECE_CHARS, "anywhere": WORDLESS_CHARS}
    for cut, size in most.items():
        sizes = [len(piece) for piece in TextBudget([text], len(text) - 7, cut=cut)]
        assert sum(sizes) == len(text) - 7
        assert max(sizes) < 1.01 * size


def test_without_words_the_merges_are_those_of_the_whole_text_but_for_its_cuts() -> None:
    """``none`` on a text shorter than a piece is the plain BPE of that text, found here by counting pairs."""
    text = "abab cabab\nabab"
    tokenizer = train_bpe([text], **with_options({"pre_tokenizer": "none", "vocab_size": 262}))
    # "ab" occurs 6 times; "abab" 3 times, as do no other pairs.
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert learned == [["a", "b"], ["ab", "ab"]]
    assert tokenizer.tokenize(text) == ["abab", "Ġ", "c", "abab", "Ċ", "abab"]


def test_without_words_a_long_text_learns_in_pieces() -> None:
    text = "the end of the day\n" * 400
    tokenizer = train_bpe([text], **with_options({"pre_tokenizer": "none"}))
    assert any("Ċ" in token and len(token) > 20 for token in tokenizer.get_vocab())
    assert tokenizer.decode(tokenizer(text, verbose=False).input_ids) == text


def words_of(pre_tokenizer: str, text: str) -> list[str]:
    tokenizer = train_bpe(TEXTS, **with_options({"pre_tokenizer": pre_tokenizer}))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


def test_what_each_pre_tokenizer_keeps_together() -> None:
    text = "I'LL pay 12345 (or  less).\n\nYes"
    assert words_of("gpt2", text)[:5] == ["I", "'", "LL", " pay", " 12345"]
    assert words_of("digits", text)[3:10] == [" pay", " ", "1", "2", "3", "4", "5"]
    llama3 = ["I", "'LL", " pay", " ", "123", "45", " (", "or", " ", " less", ").\n\n", "Yes"]
    assert words_of("llama3", text) == llama3
    assert words_of("gpt4o", "parseHTMLPage don't a/\n") == ["parse", "HTMLPage", " don't", " a", "/\n"]
    assert words_of("none", text) == [text]
    assert words_of("whitespace", text)[:6] == ["I'LL", " pay", " 12345", " (or", " ", " less)."]
    assert words_of("lines", text) == ["I'LL pay 12345 (or  less).\n", "\n", "Yes"]


def test_the_table_of_pre_tokenizers_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.*?\|.*\| (`DON.*`) \|$", page, flags=re.MULTILINE)
    told = {name: re.findall("`(.+?)`", cut) for name, cut in rows}
    assert list(told) == [name for name in PRE_TOKENIZERS if name not in ("lines", "none")]
    for name, words in told.items():
        assert words == [word.replace(" ", "␣") for word in words_of(name, "DON'T pay  12345.")], name


def test_tokens_of_several_words_are_learned_only_by_lines_and_none() -> None:
    text = ["in the end of the day\nin the end of the day\n"] * 30
    for pre_tokenizer in PRE_TOKENIZERS:
        tokenizer = train_bpe(text, **with_options({"pre_tokenizer": pre_tokenizer}))
        several = [t for t in tokenizer.get_vocab() if "Ġ" in t.strip("Ġ") and t not in SPECIALS]
        assert bool(several) is (pre_tokenizer in ("lines", "none"))


@pytest.mark.parametrize(("limit", "longest"), [(None, 9), (2, 2), (3, 3), (4, 4), (5, 5), (7, 5), (8, 8)])
def test_no_token_is_longer_than_asked(limit: int | None, longest: int) -> None:
    tokenizer = train_bpe(["abcdefgh " * 40], max_token_length=limit, **OPTIONS)
    assert max(len(token) for token in tokenizer.get_vocab() if token not in SPECIALS) == longest


def test_reading_stops_at_the_character_budget() -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in ["abcd " * 10, "wxyz " * 10, "never"]:
            read.append(text)
            yield text

    tokenizer = train_bpe(texts(), **with_options({"max_chars": 60}))
    assert "never" not in read
    assert tokenizer.backend_tokenizer.to_str() == (
        train_bpe(["abcd " * 10, ("wxyz " * 10)[:10]], **OPTIONS).backend_tokenizer.to_str()
    )


def test_a_small_corpus_gives_a_smaller_tokenizer_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_bpe(["aa aa"], **OPTIONS)
    assert len(tokenizer) == 261  # 256 bytes, 4 specials, "aa"
    assert "261 tokens instead of 320" in caplog.text


def test_the_error_of_a_source_comes_out_as_it_is() -> None:
    def broken() -> Iterator[str]:
        yield "a line"
        raise UserError("broken JSON", where="train.jsonl:2")

    with pytest.raises(UserError, match=r"train\.jsonl:2"):
        train_bpe(broken(), **OPTIONS)


@pytest.mark.parametrize(
    ("texts", "change", "message"),
    [
        ([], {}, "no text to train"),
        (["", ""], {}, "no text to train"),
        (["a\ud800b"], {}, "not valid Unicode"),
        (TEXTS, {"vocab_size": 259}, "at least 260"),
        (TEXTS, {"special_tokens": []}, "no special tokens"),
        (TEXTS, {"special_tokens": ["<a>", "<a>"]}, "repeated special token"),
        (TEXTS, {"special_tokens": ["!"]}, "bad special token '!'"),
        (TEXTS, {"max_chars": 0}, "leaves no text"),
        (TEXTS, {"pre_tokenizer": "words"}, "one of gpt2, digits, llama3, gpt4o, whitespace, lines, none"),
    ],
)
def test_user_errors_are_one_line(texts: list[str], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_bpe(texts, **with_options(change))
    assert "\n" not in str(caught.value)


def test_the_chat_template_renders_turns_and_the_opening_of_the_answer(trained: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes 1"}]
    text = trained.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes 1<|im_end|>\n"
    asked = trained.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("<|im_start|>assistant\n")
    own = train_bpe(TEXTS, chat_template="{{ messages[0]['content'] }}", **OPTIONS)
    assert own.apply_chat_template(messages, tokenize=False) == "Hi"
    assert tokenizer_hash(own) != tokenizer_hash(trained)


def test_yaml_values_fit_the_config_classes() -> None:
    values = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONF.glob("[!_]*.yaml")}
    assert set(values) == {"from_model", "file", "bpe", "chars"} <= set(registry.tokenizers.names())
    assert FileTokenizer.model_validate(values["file"] | {"path": "x"}).path == "x"
    assert FromModelTokenizer.model_validate(values["from_model"]).added_tokens == []
    config = BPETokenizer.model_validate(values["bpe"])
    assert len(train_bpe(TEXTS, **config.model_dump(exclude={"kind"}))) <= config.vocab_size == 2048
