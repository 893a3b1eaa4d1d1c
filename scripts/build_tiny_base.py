"""Turn the run of `python train.py experiment=tiny_base` into assets/tiny-base: 16-bit weights, card, record of the run."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from lmlab.config.compose import report_error
from lmlab.journal import RunDir, read_json, write_json
from lmlab.records import UserError

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---
# tiny-base

A causal language model of {params:,} parameters (Llama architecture, context 512, byte-level BPE of {vocab:,} tokens), trained
from scratch by lmlab on the documentation of Python {python} (pydoc topics and the standard library's docstrings) with
`python train.py experiment=tiny_base`. It exists so that fine-tuning, quantization and sampling can be tried without a download; it
knows the look of Python documentation and little else.

Validation (modules never seen in training): loss {loss:.4f}, perplexity {perplexity:.2f}, {bpb:.3f} bits per byte, after {steps:,} steps over {tokens:,} tokens.
Weights are stored in bfloat16. `run.json` and `metrics.jsonl` are the record of the run. The text is the Python Software Foundation's
documentation (PSF licence); no other data was used. The chat template is a plain one and was not trained.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="build_tiny_base.py", description=__doc__)
    parser.add_argument("run", help="directory of the run")
    parser.add_argument("--to", default="assets/tiny-base")
    options = parser.parse_args(arguments)
    try:
        build(RunDir(options.run), Path(options.to))
    except UserError as error:
        return report_error(error)
    return 0


def build(run: RunDir, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary, info = read_json(run.summary), read_json(run.info)
    if summary.get("status") != "finished":
        raise UserError(
            "not a finished run", where=str(run.path), fix="run python train.py experiment=tiny_base first"
        )
    source = run.best / "model"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    # Paths of the machine it was trained on say nothing elsewhere.
    write_json(target / "run.json", {key: value for key, value in info.items() if key != "prepared"})
    shutil.copyfile(run.metrics, target / "metrics.jsonl")
    shutil.copyfile(run.config, target / "run_config.yaml")
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    best = min((row for row in rows if "val/loss" in row), key=lambda row: row["val/loss"])
    tokens = [row["train/tokens"] for row in rows if "train/tokens" in row and row["step"] <= best["step"]][
        -1
    ]
    card = CARD.format(
        params=sum(p.numel() for p in model.parameters()),
        vocab=len(tokenizer),
        python=info["versions"]["python"],
        loss=best["val/loss"],
        perplexity=best["val/perplexity"],
        bpb=best["val/bits_per_byte"],
        steps=best["step"],
        tokens=int(tokens),
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
