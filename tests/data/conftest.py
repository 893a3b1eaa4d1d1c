"""What the data tests share: a small real BPE, encoders over any tokenizer, and configs with conf/data's values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab.config.compose import CONF
from lmlab.data.prepare import TextEncoder
from lmlab.data.sources import DataConfig
from lmlab.registry import data_sources
from lmlab.start import text_encoder
from lmlab.tokenizers import load_tokenizer, train_bpe

SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = [
    *"abcdefgh ABC   \n\n\t0123456789.,:;#'\"é\u0301ßж中日本\u200d\r",
    "\r\n",
    "😀",
    "👩‍👧",
    "the ",
    "Response:\n",
]


def random_text(draw: random.Random, longest: int) -> str:
    """Letters, runs of white space, digits, combining marks, CJK and emoji, up to ``longest`` pieces."""
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, longest)))


@pytest.fixture(scope="session")
def bpe() -> Any:
    """Byte-level BPE with merges over line ends, runs of spaces, digits and letters of several bytes."""
    draw = random.Random(0)
    prompt = (
        "### Instruction:\nReturn the sum.\n### Response:\n\n    the sum of 12 and 12\nÜnïcödé 中日本 😀😀\n"
    )
    return train_bpe(
        [prompt * 30, "".join(random_text(draw, 40) for _ in range(200))],
        vocab_size=512,
        pre_tokenizer="gpt2",
        min_frequency=2,
        special_tokens=SPECIALS,
        max_chars=100_000,
    )


@pytest.fixture(scope="session")
def encoder(bpe: Any) -> TextEncoder:
    """The small BPE as data preparation takes it."""
    return text_encoder(bpe)


@pytest.fixture(scope="session")
def make_encoder() -> Callable[[Any], TextEncoder]:
    """`text_encoder`, for tests with a tokenizer of their own."""
    return text_encoder


@pytest.fixture(scope="session")
def stories(real_data: Path) -> Any:
    """A real SentencePiece-like tokenizer with BOS and byte fallback."""
    return load_tokenizer(real_data / "stories260k-hf")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DataConfig]:
    """``(kind, **keys)`` -> the config with conf/train.yaml's values."""

    def make(kind: str, *, columns: dict[str, str] | None = None, **keys: Any) -> DataConfig:
        common = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["data"]
        common["columns"] |= columns or {}
        config = data_sources.class_of(kind)(**({"kind": kind} | common | keys))
        assert isinstance(config, DataConfig)
        return config

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or raw lines as bytes) to a .jsonl file under tmp_path."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return file

    return write


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LMLAB_CACHE for one test."""
    root = tmp_path / "cache"
    monkeypatch.setenv("LMLAB_CACHE", str(root))
    return root
