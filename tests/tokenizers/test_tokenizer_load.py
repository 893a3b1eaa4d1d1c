"""Loading from disk and hub, offsets, the single BOS, the hash, and the errors a user can mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmlab.records import UserError
from lmlab.tokenizers import (
    add_tokens,
    adds_bos,
    check_vocabulary,
    encode_document,
    load_tokenizer,
    rows_needed,
    tokenizer_hash,
    train_bpe,
)

DATA = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data"))
TEXTS = ["if x == 12:\n        return 'né 😀'  # done\n\n\n", "  two spaces first"] * 3
DOCUMENTS = [
    'Once upon a time, Lily said: "Ünïcödé 😀👩‍👧 日本"\n',
    "  two spaces first",
    "\n\n    def f(x):\n        return x  ",
    "e\u0301 combining, \u00a0 no-break, 1984",
    "",
]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_bpe(
        TEXTS,
        vocab_size=330,
        pre_tokenizer="gpt2",
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        max_chars=10_000,
    )


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def stories() -> Any:
    path = DATA / "stories260k-hf"
    if not path.exists():
        pytest.skip(f"no test data at {path} (set LMLAB_TEST_DATA)")
    return load_tokenizer(path)


def trimming() -> Any:
    """A tokenizer as Llama 3 has it: spaces left out of the offsets, and a BOS from the post-processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
        ),  # pyright: ignore[reportArgumentType]
    )
    template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<bos>")


def rejoin(text: str, offsets: list[tuple[int, int]]) -> str:
    """The slices in order, each without what the ones before it already gave."""
    pieces, reached = [], 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(text)
        pieces.append(text[max(start, reached) : end])
        reached = max(reached, end)
    return "".join(pieces)


@pytest.mark.parametrize("text", DOCUMENTS)
@pytest.mark.parametrize("name", ["trained", "stories", "trimming"])
def test_slices_by_offsets_join_to_the_text(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = trimming() if name == "trimming" else request.getfixturevalue(name)
    ids, offsets = encode_document(tokenizer, text, add_bos=tokenizer.bos_token is not None)
    assert len(ids) == len(offsets)
    assert rejoin(text, offsets) == text
    own = tokenizer(text, add_special_tokens=tokenizer.bos_token is not None).input_ids
    assert ids == own


def test_a_character_of_several_tokens_is_the_span_of_each(trained: Any) -> None:
    ids, offsets = encode_document(trained, "a🦜b", add_bos=False)
    assert len(ids) > 4
    assert offsets == [(0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3)]


def test_tokens_of_spaces_keep_their_characters_where_the_tokenizer_trims_offsets() -> None:
    tokenizer = trimming()
    text = "x 🦜  \n"
    raw = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in raw)
    _, offsets = encode_document(tokenizer, text, add_bos=False)
    assert all(start < end for start, end in offsets)


def test_there_is_one_bos_at_most(stories: Any, trained: Any) -> None:
    assert adds_bos(stories)
    assert adds_bos(trimming())
    assert not adds_bos(trained)
    bos = stories.bos_token_id
    for text in ("Once", "<s>Once"):
        ids, offsets = encode_document(stories, text, add_bos=True)
        assert (ids[0], ids.count(bos)) == (bos, 1)
    assert offsets[0] == (0, 3)  # here the text itself brought it
    ids, offsets = encode_document(stories, "Once", add_bos=True)
    assert (ids, offsets[0]) == (stories("Once").input_ids, (0, 0))
    assert bos not in encode_document(stories, "Once", add_bos=False)[0]
    assert encode_document(stories, "", add_bos=True) == ([bos], [(0, 0)])


@pytest.mark.parametrize("before", ["", " ", "\n\n", " \t\n"])
def test_a_text_that_brings_its_bos_gets_no_second_one(stories: Any, before: str) -> None:
    """Chat templates write it, some behind white space."""
    bos = stories.bos_token_id
    text = before + "<s>user\nHi"
    ids, offsets = encode_document(stories, text, add_bos=True)
    assert ids.count(bos) == 1
    assert (ids, offsets) == encode_document(stories, text, add_bos=False)
    assert rejoin(text, offsets) == text
    other, _ = encode_document(
        stories, "Say <s> twice", add_bos=True
    )  # within the text it is the writer's own
    assert other[0] == bos


def test_a_long_document_gives_no_warning_about_the_model(
    stories: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_document(stories, "word " * 2000, add_bos=True)
    assert "longer than" not in caplog.text + capsys.readouterr().err


def test_documents_that_cannot_be_encoded(trained: Any) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        encode_document(trained, "a\ud800b", add_bos=False)
    with pytest.raises(UserError, match="no BOS token"):
        encode_document(trained, "a", add_bos=True)

    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(UserError, match="slow tokenizer"):
        encode_document(slow, "a", add_bos=False)
    with pytest.raises(UserError, match="slow tokenizer"):
        tokenizer_hash(slow)


def test_the_hash_survives_saving_and_use_and_follows_what_decides_ids(
    trained: Any, stories: Any, tmp_path: Path
) -> None:
    for number, tokenizer in enumerate((trained, stories)):
        before = tokenizer_hash(tokenizer)
        tokenizer.save_pretrained(tmp_path / str(number))
        again = load_tokenizer(tmp_path / str(number))
        again(["a", "b c d e"], truncation=True, max_length=3, padding=again.pad_token is not None)
        assert tokenizer_hash(again) == before
        again.add_tokens(["<extra>"])
        assert tokenizer_hash(again) != before
    assert tokenizer_hash(trained) != tokenizer_hash(stories)


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2", "qwen2", "mistral", "gemma2"])
def test_a_config_beside_it_does_not_change_a_trained_tokenizer(
    trained: Any, saved: Path, model_type: str | None
) -> None:
    # Qwen2 is the one that AutoTokenizer would change.
    if model_type:
        (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
    for place in (saved, str(saved), saved / "tokenizer.json"):
        loaded = load_tokenizer(place)
        assert tokenizer_hash(loaded) == tokenizer_hash(trained)
        assert loaded.clean_up_tokenization_spaces is False
        assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)


def test_a_bare_file_takes_its_roles_from_the_usual_names(
    trained: Any, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "tokenizer_config.json").unlink()
    file = shutil.copy(saved / "tokenizer.json", saved / "mine.json")
    for place in (saved, saved / "tokenizer.json", file):
        loaded = load_tokenizer(place)
        assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|endoftext|>", "<|pad|>", None)
        assert loaded(TEXTS[0]).input_ids == trained(TEXTS[0]).input_ids
        assert len(loaded) == len(trained)
    assert "is taken as eos_token" in caplog.text


def test_home_and_working_directory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    monkeypatch.chdir(saved.parent)
    for place in (f"~/{saved.name}", f"./{saved.name}", saved.name):
        assert load_tokenizer(place).eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "value", ["/no/such/place", "./nothing", "~/no-such-tokenizer", "here/nothing", "x.json"]
)
def test_a_local_value_that_is_not_there_never_asks_the_network(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("lmlab.tokenizers.load._load_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(value)


def test_broken_directories(saved: Path) -> None:
    (saved / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer files"):
        load_tokenizer(saved / "empty")
    good = (saved / "tokenizer.json").read_text(encoding="utf-8")
    for content in (good[: len(good) // 2], "[]", "\x00"):
        (saved / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"broken JSON.*tokenizer\.json"):
            load_tokenizer(saved)
    (saved / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(saved)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(Path(shutil.copy(saved / "tokenizer.json", saved / "mine.json")))
    (saved / "tokenizer.json").write_text(good, encoding="utf-8")
    (saved / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"broken JSON.*tokenizer_config\.json"):
        load_tokenizer(saved)


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'lmlab-tests/none'.*cannot be reached") as caught:
        load_tokenizer("lmlab-tests/none")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_the_vocabulary_must_fit_the_embedding(trained: Any) -> None:
    size = len(trained)
    check_vocabulary(trained, size, "model=tiny")
    check_vocabulary(trained, size + 64, "model=tiny")
    with pytest.raises(UserError, match=rf"2 token.*={size - 1}, .*={size - 2} \(model=tiny\)"):
        check_vocabulary(trained, size - 2, "model=tiny")


def test_added_tokens_are_whole_special_and_kept_by_saving(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "old")
    tokenizer, before = load_tokenizer(tmp_path / "old"), tokenizer_hash(trained)
    size = len(tokenizer)
    tokens = ["<|think|>", "<|im_start|>", "<tool>"]
    assert add_tokens(tokenizer, tokens) == [size, 2, size + 1]  # the second is there already
    assert rows_needed(tokenizer) == len(tokenizer) == size + 2
    assert tokenizer_hash(tokenizer) != before
    ids, offsets = encode_document(tokenizer, "a <|think|> b<tool>", add_bos=False)
    assert [ids[i] for i in (2, -1)] == [size, size + 1]
    assert offsets[2] == (2, 11)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  b"
    assert trained("a b <im").input_ids == tokenizer("a b <im").input_ids
    tokenizer.save_pretrained(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert again("a <|think|> b<tool>").input_ids == ids


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<a>", "<a>"], "repeated token"), ([""], "bad token ''"), (["<a> "], "bad token '<a> '")],
)
def test_added_tokens_that_cannot_be(trained: Any, tokens: list[str], message: str) -> None:
    before = tokenizer_hash(trained)
    with pytest.raises(UserError, match=message) as caught:
        add_tokens(trained, tokens)
    assert "tokenizer.added_tokens" in str(caught.value)
    assert tokenizer_hash(trained) == before


def test_only_added_tokens_may_be_beyond_the_embedding(trained: Any, saved: Path) -> None:
    tokenizer, size = load_tokenizer(saved), len(trained)
    add_tokens(tokenizer, ["<a>", "<b>"])
    check_vocabulary(tokenizer, size, "model=tiny", added=["<a>", "<b>"])
    with pytest.raises(UserError, match=f"1 token.*'<b>'={size + 1}.*added_tokens"):
        check_vocabulary(tokenizer, size, "model=tiny", added=["<a>"])


def test_importing_the_config_classes_is_light() -> None:
    code = "import sys, lmlab.tokenizers as t; t.BPETokenizer; print({'transformers', 'tokenizers', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
