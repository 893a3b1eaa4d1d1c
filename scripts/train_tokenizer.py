"""Train a byte-level BPE: `python scripts/train_tokenizer.py data=text data.path=corpus.txt tokenizer.vocab_size=2048`.

Takes the same overrides as train.py, so data.path may be a file, a folder or a glob. Only the training split is read, so
validation stays unseen; texts are streamed, up to tokenizer.max_chars characters.

With -m it trains every combination and compares them on one page, measured on held-out texts (docs/tokenizers.md):
`python scripts/train_tokenizer.py -m tokenizer.vocab_size=512,2048,8192 tokenizer.pre_tokenizer=gpt2,llama3 lab.texts=[a.txt]`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lmlab.config.compose import run_app, to_run_config
from lmlab.records import UserError
from lmlab.tokenizer_lab.options import LAB, without_lab


def train(composed: Any, overrides: list[str]) -> int:
    from lmlab.data.prepare import training_texts
    from lmlab.start import run_name
    from lmlab.tokenizer_lab.compare import free_folder, make_tokenizer, train_command
    from lmlab.tokenizers import TextBudget

    if told := [override for override in overrides if override.lstrip("+~").startswith(f"{LAB}.")]:
        raise UserError(
            "a key of the comparison of several tokenizers", where=told[0], fix="add -m, or leave it out"
        )
    config = to_run_config(without_lab(composed))
    name = config.run_name or run_name(overrides)
    folder = free_folder(config.output_root, name, overwrite=config.overwrite)
    tokenizer = make_tokenizer(config, folder)
    size_bytes = tokens = 0
    texts = training_texts(config.data, task=config.task)
    # Streamed: what the training read, and no more.
    for piece in TextBudget(texts, getattr(config.tokenizer, "max_chars")):  # noqa: B009  # both trained kinds
        size_bytes += len(piece.encode("utf-8"))
        tokens += len(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
    rate = size_bytes / max(1, tokens)
    print(
        f"vocabulary {len(tokenizer):,}; {size_bytes:,} bytes of training text in {tokens:,} tokens: {rate:.2f} bytes per token"
    )
    print(f"written: {os.path.relpath(folder)}")
    print(f"use it: {train_command(overrides, os.path.relpath(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_app(train, config_name="train_tokenizer", own=LAB))
