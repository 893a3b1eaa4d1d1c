"""FastEncoder against the library: the ids of one call, for any text, cut anywhere, special tokens included."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from lmlab.records import UserError
from lmlab.tokenizers import adds_bos, encode_document, load_tokenizer, train_bpe
from lmlab.tokenizers import words as words_module
from lmlab.tokenizers.cuts import safe_cuts
from lmlab.tokenizers.fast import NASTY, FastEncoder
from lmlab.tokenizers.windows import encode_windows

TEXT = (
    "Once upon a time there was a girl, and she'd said: \"it's 1984, isn't it?\"\n\nThe girl didn't know.  Then the "
    "time came\nwhen she had 12 apples;\n    if x == 12:\n        return x  # done\n\tÜber naïve 日本語 😀\n"
) * 4
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
ATOMS = [
    *"  \n\n\t\r'.,;!/-_()▁aeiostnrh1234 ",
    *(
        "\r\n",
        "\n\n",
        "  ",
        " \n",
        "\n ",
        "   ",
        "'s",
        "'LL",
        "the",
        "time",
        " girl",
        " she",
        "12",
        "日本語",
        "。\n",
        "한국",
    ),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\x85",
        "\x1c",
        "\u2028",
        "\x0b",
        "\ufeff",
        "😀",
        "\u200d",
    ),
    *("ﬁ", "½", "Ⅷ", "٣", "K", "\u037e", "\U0010ffff", "return x", "<|", "|>", "<"),
]


def random_text(rng: random.Random, length: int, marks: list[str], share: float = 0.02) -> str:
    # NUL is the cache's own mark, so a text that holds one is not looked up: few of them.
    atoms = [*ATOMS, "\0"] if rng.random() < 0.1 else ATOMS
    return "".join(
        rng.choice(marks) if marks and rng.random() < share else rng.choice(atoms) for _ in range(length)
    )


def random_pieces(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def one_call(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def byte_level(pattern: str | None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with another word pattern than `train_bpe` has."""
    backend: Any = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        from tokenizers import Regex

        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=MARKS,  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=MARKS[0])


def odd_flags() -> PreTrainedTokenizerFast:
    """Added tokens that take the spaces around them, stand only alone, or hold a space."""
    tokenizer = byte_level(None)
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True),
            AddedToken("girl", single_word=True),
            AddedToken("was a"),
            AddedToken("a time there"),
        ]
    )
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    backend: Any = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "</s>"],  # pyright: ignore[reportArgumentType]
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    backend: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200,
        special_tokens=["[UNK]", "[SEP]"],  # pyright: ignore[reportArgumentType]
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def marked(*, prepend: str = "first", split: bool = False, crossing: bool = False) -> PreTrainedTokenizerFast:
    """A BPE over ``▁`` for spaces; ``crossing``: merged over whole lines, so that tokens hold several words."""
    backend: Any = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=not crossing)  # pyright: ignore[reportArgumentType]
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],  # pyright: ignore[reportArgumentType]
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=split)  # pyright: ignore[reportArgumentType]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def trained(pre_tokenizer: str) -> Any:
    return train_bpe(
        [TEXT],
        vocab_size=400,
        pre_tokenizer=pre_tokenizer,
        min_frequency=2,
        special_tokens=MARKS,
        max_chars=100_000,
    )


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = {
    **{
        name: ("words", lambda name=name: trained(name))
        for name in ("gpt2", "digits", "llama3", "gpt4o", "whitespace")
    },
    "lines": ("windows", lambda: trained("lines")),
    "none": ("windows", lambda: trained("none")),
    "qwen2": ("words", lambda: byte_level(QWEN2, normalizers.NFC())),
    "odd flags": ("words", odd_flags),
    "lowercase": ("windows", lambda: byte_level(None, normalizers.Lowercase())),
    "own pattern": ("windows", lambda: byte_level(r"\w+ ?|\W")),
    "unigram": ("windows", unigram),
    "word piece": ("windows", word_piece),
    "metaspace": ("words", marked),
    "metaspace, always, split": ("words", lambda: marked(prepend="always", split=True)),
    "metaspace, never": ("words", lambda: marked(prepend="never")),
    "metaspace, tokens across words": ("windows", lambda: marked(crossing=True)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, FastEncoder]:
    mode, make = KINDS[request.param]
    tokenizer = make()
    encoder = FastEncoder(tokenizer)
    assert encoder.mode == mode
    return tokenizer, encoder


def test_any_text_gives_the_ids_of_one_call(kind: tuple[Any, FastEncoder]) -> None:
    tokenizer, encoder = kind
    rng = random.Random(1)
    marks = [token for token in tokenizer.get_added_vocab()]
    texts = [
        "",
        " ",
        "\n",
        "a",
        " a",
        "  a",
        "\na",
        "▁",
        " ▁ a",
        *marks,
        *(f" {mark} " for mark in marks),
        NASTY,
    ]
    texts += [random_text(rng, rng.randrange(1, 60), marks, rng.choice([0, 0.05, 0.3])) for _ in range(200)]
    expected = [one_call(tokenizer, text) for text in texts]
    for text, ids, batched in zip(texts, expected, encoder.encode_batch(texts), strict=True):
        assert encoder.encode(text).tolist() == ids, repr(text)
        assert batched.tolist() == ids, repr(text)


def test_pieces_give_the_ids_of_the_whole(
    kind: tuple[Any, FastEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, encoder = kind
    if encoder.mode == "windows":  # small ones, to have many seams in little text
        monkeypatch.setattr(
            "lmlab.tokenizers.fast.encode_windows",
            lambda encode, pieces, window: encode_windows(encode, pieces, window=300, overlap=40),
        )
    rng = random.Random(2)
    marks = [token for token in tokenizer.get_added_vocab()]
    for number in range(30):
        text = random_text(rng, rng.randrange(20, 900), marks, rng.choice([0, 0.02, 0.2]))
        if number % 3 == 0:
            text = TEXT[rng.randrange(100) :] + text
        pieces = random_pieces(rng, text)
        parts = list(encoder.encode_stream(iter(pieces)))
        assert all(len(part) for part in parts)
        assert [i for part in parts for i in part.tolist()] == one_call(tokenizer, text), repr(text)


@pytest.mark.slow
def test_many_random_texts_give_the_ids_of_one_call(kind: tuple[Any, FastEncoder]) -> None:
    tokenizer, encoder = kind
    rng = random.Random(3)
    marks = [token for token in tokenizer.get_added_vocab()]
    for _ in range(40):
        texts = [random_text(rng, rng.randrange(1, 40), marks, rng.choice([0, 0.1])) for _ in range(1000)]
        for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
            assert ids.tolist() == one_call(tokenizer, text), repr(text)


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "stories260k-hf", "tokenizers/mistral-v1"])
@pytest.mark.parametrize("file", ["tinyshakespeare.txt", "udhr.jsonl"])
def test_against_one_call_on_real_text(real_data: Path, name: str, file: str) -> None:
    tokenizer: Any = load_tokenizer(real_data / name)
    encoder = FastEncoder(tokenizer)
    assert encoder.mode == "words"
    text = (real_data / "clm" / file).read_text(encoding="utf-8")[:300_000]
    expected = np.asarray(one_call(tokenizer, text))
    assert np.array_equal(encoder.encode(text), expected)
    assert np.array_equal(encoder.encode(text), expected), "from the cache"


def test_a_full_cache_is_emptied_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MAX_WORDS", 20)
    tokenizer = trained("gpt2")
    encoder = FastEncoder(tokenizer)
    for start in range(0, 600, 60):
        text = TEXT[start : start + 300]
        assert encoder.encode(text).tolist() == one_call(tokenizer, text)
    assert len(encoder._cache._words) <= 20  # pyright: ignore[reportOptionalMemberAccess]


def test_held_text_stays_small_in_a_long_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FastEncoder(trained("gpt2"))
    longest = 0
    encoded = encoder._encoded

    def watched(texts: Any, **keywords: Any) -> list[bytes]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encoded(texts, **keywords)

    monkeypatch.setattr(encoder, "_encoded", watched)
    assert sum(map(len, encoder.encode_stream(TEXT for _ in range(200)))) > 0
    assert longest < 2 * len(TEXT)


def test_a_wrong_rule_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmlab.tokenizers import fast
    from lmlab.tokenizers.cuts import Cuts

    tokenizer = trained("lines")  # whose tokens hold spaces
    monkeypatch.setattr(fast, "safe_cuts", lambda content: Cuts(True, "before"))
    encoder = FastEncoder(tokenizer)
    assert encoder.mode == "windows"
    assert encoder.encode(TEXT).tolist() == one_call(tokenizer, TEXT)


def test_a_tokenizer_without_a_rule_has_none() -> None:
    def rule(tokenizer: Any, **changes: Any) -> Any:
        return safe_cuts({**json.loads(tokenizer.backend_tokenizer.to_str()), **changes})

    gpt2 = trained("gpt2")
    assert rule(gpt2) is not None
    assert rule(gpt2, pre_tokenizer=None) is None
    assert rule(gpt2, normalizer={"type": "NFKC"}) is None
    assert (
        rule(gpt2, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}) is None
    )
    content = json.loads(gpt2.backend_tokenizer.to_str())
    assert rule(gpt2, model={**content["model"], "dropout": 0.1}) is None
    assert rule(byte_level(r" ?\p{L}+ \p{L}+|\s+(?!\S)|\s+")) is None, "a pattern with a space inside a word"


def test_state_left_by_another_call_does_not_cut_or_pad() -> None:
    tokenizer: Any = trained("gpt2")
    expected = one_call(tokenizer, TEXT)
    encoder = FastEncoder(tokenizer)
    tokenizer(["a b c d", "a"], truncation=True, max_length=2, padding=True)
    assert encoder.encode(TEXT).tolist() == expected


def test_documents_have_bos_and_eos_once(kind: tuple[Any, FastEncoder]) -> None:
    tokenizer, encoder = kind
    eos, mark = tokenizer.eos_token_id, tokenizer.eos_token
    texts = ["one text", f"one text{mark}", f"one text {mark}\n", f"a{mark}b", mark, "", "  "]
    whole = encoder.documents(texts)
    for text, ids in zip(texts, whole, strict=True):
        expected = encode_document(tokenizer, text, add_bos=adds_bos(tokenizer))[0]
        if not text.rstrip().endswith(mark):
            expected = [*expected, eos]
        assert ids.tolist() == expected, repr(text)
        parts = list(encoder.document_stream(text[i : i + 3] for i in range(0, len(text), 3)))
        assert [i for part in parts for i in part.tolist()] == expected, repr(text)


def test_bos_stands_first_and_not_twice(real_data: Path) -> None:
    tokenizer: Any = load_tokenizer(real_data / "stories260k-hf")
    encoder = FastEncoder(tokenizer)
    for text in ("Once", "<s>Once", "\n<s> Once", "", "Once " * 50_000):
        expected = [*encode_document(tokenizer, text, add_bos=True)[0], tokenizer.eos_token_id]
        (ids,) = encoder.documents([text])
        assert ids.tolist() == expected
        parts = encoder.document_stream(text[i : i + 1000] for i in range(0, len(text), 1000))
        assert [i for part in parts for i in part.tolist()] == expected


def test_it_travels_to_another_process_without_transformers(tmp_path: Path) -> None:
    tokenizer = trained("llama3")
    (tmp_path / "encoder").write_bytes(pickle.dumps(FastEncoder(tokenizer)))
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    code = (
        "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "encoder = pickle.loads((folder / 'encoder').read_bytes())\n"
        "print(encoder.encode((folder / 'text').read_text(encoding='utf-8')).tolist())\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == one_call(tokenizer, TEXT)


@pytest.mark.parametrize("name", ["gpt2", "lines"])
def test_text_that_is_not_unicode_is_named(name: str) -> None:
    encoder = FastEncoder(trained(name))
    with pytest.raises(UserError, match="not valid Unicode"):
        encoder.encode("good \ud800 bad")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(UserError, match="Slow is a slow tokenizer"):
        FastEncoder(Slow())  # pyright: ignore[reportArgumentType]
