"""Trained byte-level BPE: lossless, complete, deterministic, and the merges an independent trainer finds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab import registry
from lmlab.records import UserError
from lmlab.tokenizers import BPETokenizer, FileTokenizer, load_tokenizer, tokenizer_hash, train_bpe

DATA = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data"))
CONF = Path(__file__).parents[2] / "conf" / "tokenizer"
SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "In 1984 the 12 hobbits counted 3.14159 pies.\n    return x  # 42\n",
    "Ünïcödé, 日本語 and emoji 😀👩‍👩‍👧 in a line\r\n\tthe end",
] * 4
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


def random_text(rng: random.Random) -> str:
    """Any Unicode scalar values: controls, unassigned, all planes, combining marks; no surrogates."""
    points = [rng.randrange(rng.choice((0x80, 0x800, 0xD800, 0x110000))) for _ in range(rng.randrange(1, 60))]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.mark.parametrize("pre_tokenizer", ["gpt2", "digits"])
def test_any_unicode_text_survives_encoding_and_decoding(pre_tokenizer: str) -> None:
    tokenizer = train_bpe(TEXTS, **with_options({"pre_tokenizer": pre_tokenizer}))
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(400)] + [
        "",
        " ",
        "  a  b\n\n ",
        "don 't , stop .",
        "\x00\ufeff\u2028",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_real_documents_survive_saving_loading_encoding_and_decoding(tmp_path: Path) -> None:
    lines = needs(DATA / "clm/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    train_bpe(texts, **with_options({"vocab_size": 1000})).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(texts) == 22
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode())


def test_the_vocabulary_is_specials_then_all_bytes_then_merges(trained: Any) -> None:
    from tokenizers import pre_tokenizers

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


def test_merges_are_those_of_an_independent_trainer() -> None:
    folder = needs(DATA / "tokenizers/bpe-train-reference")
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    reference = {tuple(line.split(" ")) for line in lines}
    corpus = (folder / "corpus.en").read_text(encoding="utf-8")
    options = {"vocab_size": 500, "pre_tokenizer": "gpt2", "special_tokens": ["<|endoftext|>"]}
    tokenizer = train_bpe([corpus], **with_options(options | {"max_chars": 10**6}))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ours = {tuple(pair) for pair in model["merges"]}
    assert len(ours) == len(reference) == 243
    # The rest are pairs that occur equally often: the two trainers break such ties differently.
    assert len(ours & reference) >= 235
    tokens = set(json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8")))
    assert len(tokens & set(model["vocab"])) >= 490


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
        (TEXTS, {"pre_tokenizer": "words"}, "one of gpt2, digits"),
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
    values = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONF.glob("*.yaml")}
    assert set(values) == {"from_model", "file", "bpe"} <= set(registry.tokenizers.names())
    assert FileTokenizer.model_validate(values["file"] | {"path": "x"}).path == "x"
    config = BPETokenizer.model_validate(values["bpe"])
    assert len(train_bpe(TEXTS, **config.model_dump(exclude={"kind"}))) <= config.vocab_size == 2048
