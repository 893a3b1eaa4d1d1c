"""Vocabulary and merges, and sentencepiece models: known ids, lossless, saved as one tokenizer.json, errors in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from lmlab.records import UserError
from lmlab.tokenizers import adds_bos, encode_document, load_tokenizer, tokenizer_hash, train_bpe

SEPARATOR = "\n__ggml_vocab_test__\n"
NAMES = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
HELLO_WORLD = {  # the ids that the models' own tokenizers give
    "Hello": [1, 22557],
    "Hello world": [1, 22557, 1526],
    "Hello, world!": [1, 22557, 28725, 1526, 28808],
}


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Path:
    return real_data / "tokenizers/gpt2"


@pytest.fixture(scope="module")
def mistral(real_data: Path) -> Path:
    return real_data / "tokenizers/mistral-v1"


def udhr(real_data: Path) -> list[str]:
    lines = (real_data / "clm/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 22
    return texts


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """vocab.json and merges.txt of a tokenizer trained here."""
    tokenizer = train_bpe(
        ["a tree in the green street"] * 4,
        vocab_size=300,
        pre_tokenizer="gpt2",
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        max_chars=1000,
    )
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert "<|endoftext|>" in vocab
    return tmp_path


# --- vocabulary and merges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", NAMES, ids=["transformers", "openai"])
def test_against_gpt2_vectors_ids(names: tuple[str, str], gpt2: Path, tmp_path: Path) -> None:
    for name, new in zip(NAMES[1], names, strict=True):
        shutil.copy(gpt2 / name, tmp_path / new)
    texts = (gpt2 / "test-vectors.inp").read_bytes().decode().split(SEPARATOR)
    lines = (gpt2 / "test-vectors.out").read_text(encoding="utf-8").split("\n")  # the last text is empty
    assert len(texts) == len(lines) == 47
    for place in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 50256)
        assert len(tokenizer) == 50257
        assert not adds_bos(tokenizer)
        for text, line in zip(texts, lines, strict=True):
            assert tokenizer(text).input_ids == [int(i) for i in line.split()]
            assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("folder", ["gpt2", "mistral-v1"])
def test_a_converted_tokenizer_is_saved_whole_and_is_lossless(
    folder: str, real_data: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(real_data / "tokenizers" / folder)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert adds_bos(again) is adds_bos(tokenizer) is (folder == "mistral-v1")
    texts = [*udhr(real_data), " a", "  a  b\n ", "\n x\n\n", "a\x00b\r\n", "e\u0301", "👩\u200d👧"]
    for text in texts:
        ids, offsets = encode_document(again, text, add_bos=False)
        assert again.decode(ids) == text
        assert max(end for _, end in offsets) == len(text)
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("names", NAMES, ids=["transformers", "openai"])
@pytest.mark.parametrize("present", [0, 1])
def test_half_a_pair_names_the_other_half(names: tuple[str, str], present: int, pair: Path) -> None:
    for old, new in zip(NAMES[0], names, strict=True):
        (pair / old).rename(pair / new)
    (pair / names[1 - present]).unlink()
    for place in (pair, pair / names[present]):
        assert f"{names[present]} without {names[1 - present]}" in refusal(place)


def test_a_broken_pair(pair: Path) -> None:
    good = (pair / "merges.txt").read_text(encoding="utf-8")
    (pair / "merges.txt").write_text(good + "zq xq\n", encoding="utf-8")
    assert "not a vocabulary and its merges" in refusal(pair)
    (pair / "merges.txt").write_text(good, encoding="utf-8")
    (pair / "vocab.json").write_text("[1, 2]")
    assert "not a vocabulary and its merges" in refusal(pair)
    (pair / "vocab.json").write_bytes(b"\xff\xfe\x00")
    assert "not a vocabulary and its merges" in refusal(pair)


def test_a_vocabulary_without_gpt2_marks_gets_the_usual_roles(pair: Path) -> None:
    file = pair / "vocab.json"
    vocab = json.loads(file.read_text(encoding="utf-8"))
    vocab["</s>"] = vocab.pop("<|endoftext|>")
    file.write_text(json.dumps(vocab), encoding="utf-8")
    tokenizer = load_tokenizer(pair)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("</s>", vocab["</s>"], None)
    assert len(tokenizer) == len(vocab)


def test_a_config_beside_a_pair_gives_that_family_its_own_words(pair: Path) -> None:
    """Qwen 2 has every digit on its own, GPT-2 keeps them together; Llama's tokenizer is no such pair."""
    text = "x 123"

    def words() -> int:
        loaded: Any = load_tokenizer(pair)
        return len(loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))

    assert words() == 2
    for model_type, count in (("gpt2", 2), ("llama", 2), ("qwen2", 5)):
        (pair / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert words() == count, model_type


# --- sentencepiece ------------------------------------------------------------------------------------------------------


def test_against_mistral_known_ids_and_marks(mistral: Path) -> None:
    for place in (mistral, mistral / "tokenizer.model", str(mistral / "tokenizer.model")):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        assert len(tokenizer) == 32000
        for text, ids in HELLO_WORLD.items():
            assert tokenizer(text).input_ids == ids
        assert (
            tokenizer.convert_ids_to_tokens(tokenizer("\n☃︎", add_special_tokens=False).input_ids)[1]
            == "<0x0A>"
        )


def test_the_space_put_before_a_text_is_no_character_of_it(mistral: Path) -> None:
    tokenizer = load_tokenizer(mistral)
    ids, offsets = encode_document(tokenizer, "Hello 🦜x", add_bos=True)
    assert (ids[:2], offsets[:2]) == ([1, 22557], [(0, 0), (0, 5)])
    assert offsets[-1][1] == len("Hello 🦜x")
    # sentencepiece puts its own space before one that is there, which transformers' Llama class leaves out.
    spaced = tokenizer.convert_ids_to_tokens(tokenizer(" Hello", add_special_tokens=False).input_ids)
    assert "".join(spaced) == "▁▁Hello"
    assert tokenizer.decode(tokenizer(" Hello", add_special_tokens=False).input_ids) == " Hello"


def test_settings_beside_a_sentencepiece_model_have_their_say(mistral: Path, tmp_path: Path) -> None:
    shutil.copy(mistral / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "pad_token": "<unk>",
        "chat_template": "{{ messages[0]['content'] }}",
        "added_tokens_decoder": {"32000": {"content": "<|im_start|>", "special": True, "normalized": False}},
        "model_max_length": 4096,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert not adds_bos(tokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 2, 4096)
    assert tokenizer("a<|im_start|>").input_ids == [28708, 32000]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "broken JSON" in refusal(tmp_path)


def changed_model(mistral: Path, change: Any) -> bytes:
    messages: Any = import_protobuf()
    model = messages.ModelProto()
    model.ParseFromString((mistral / "tokenizer.model").read_bytes())
    del model.pieces[400:]
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "it is not BPE"),
        (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "no byte fallback"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "it normalizes its text"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "it removes spaces"),
    ],
    ids=["unigram", "bytes", "normalization", "spaces"],
)
def test_models_whose_ids_would_change_are_refused(
    change: Any, message: str, mistral: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(changed_model(mistral, lambda model: None))
    assert len(load_tokenizer(file)) == 400
    file.write_bytes(changed_model(mistral, change))
    assert message in refusal(file)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff"], ids=["empty", "tiktoken", "cut"]
)
def test_another_file_named_tokenizer_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "not a sentencepiece model" in refusal(tmp_path)
