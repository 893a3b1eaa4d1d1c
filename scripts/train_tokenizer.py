"""Train a byte-level BPE: `python scripts/train_tokenizer.py data=text data.path=corpus.txt tokenizer.vocab_size=2048`.

Takes the same overrides as train.py, so data.path may be a file, a folder or a glob. Only the training split is read, so
validation stays unseen; texts are streamed, up to tokenizer.max_chars characters.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from lmlab.config.compose import run_app, to_run_config
from lmlab.journal import check_run_name
from lmlab.records import UserError


def train(composed: Any, overrides: list[str]) -> int:
    from lmlab.data.prepare import training_texts
    from lmlab.start import prepare_tokenizer, run_name
    from lmlab.tokenizers import TextBudget

    config = to_run_config(composed)
    if config.tokenizer.kind not in ("bpe", "chars"):
        raise UserError(
            f"tokenizer={config.tokenizer.kind} is not trained", where="tokenizer", fix="use tokenizer=bpe"
        )
    folder = Path(config.output_root) / "tokenizers" / check_run_name(config.run_name or run_name(overrides))
    if folder.exists() and not config.overwrite:
        raise UserError(
            "this tokenizer directory already exists",
            where=str(folder),
            fix="choose another run_name, or overwrite=true",
        )
    cached, encoder, size = prepare_tokenizer(config)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cached, folder)
    size_bytes = tokens = 0
    texts = training_texts(config.data, task=config.task)
    for piece in TextBudget(
        texts, config.tokenizer.max_chars
    ):  # streamed: what the training read, and no more
        size_bytes += len(piece.encode("utf-8"))
        tokens += len(encoder.encode(piece)[0])
    rate = size_bytes / max(1, tokens)
    print(
        f"vocabulary {size:,}; {size_bytes:,} bytes of training text in {tokens:,} tokens: {rate:.2f} bytes per token"
    )
    print(f"written: {os.path.relpath(folder)}")
    print(f"use it: python train.py task=pretrain tokenizer=file tokenizer.path={os.path.relpath(folder)}")
    return 0


if __name__ == "__main__":
    given = [argument.split("=")[0] for argument in sys.argv[1:]]
    # A tokenizer is trained for a model from scratch unless told otherwise.
    sys.argv[1:1] = [
        default for default in ("task=pretrain", "tokenizer=bpe") if default.split("=")[0] not in given
    ]
    sys.exit(run_app(train))
