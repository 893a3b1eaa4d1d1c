"""Quality of a model stored in few bits over several draws of text: the quantization report once per seed.

    python benchmarks/storage_quality.py lmlab:tiny-base --text wikitext2-valid.txt --seeds 1 2 3
    python benchmarks/storage_quality.py .../stories260k-hf --own-text --seeds 1 2 3

Each seed cuts its own slices out of the file (or, with --own-text, has the model in fp32 write them at temperature 1: text
as it was trained to write, where no such corpus is at hand; by construction fp32 is the best model of it). Shown are the
nats per token that each kind costs over fp32, for each seed and on average, and in how many seeds a kind was better than
the next.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import markdown, save


def slices(file: Path, seed: int, count: int, characters: int) -> list[str]:
    """Pieces of the text that do not overlap, at random places."""
    text = file.read_text(encoding="utf-8")
    places = random.Random(seed).sample(range(len(text) // characters), count)
    return [text[place * characters : (place + 1) * characters] for place in sorted(places)]


def own_texts(name: str, seed: int, count: int) -> list[str]:
    """Texts drawn from the model itself, at temperature 1 from its whole distribution."""
    import torch
    from transformers import AutoModelForCausalLM

    from lmlab.models.build import resolve_source
    from lmlab.tokenizers import load_tokenizer

    source = resolve_source(name)
    tokenizer = load_tokenizer(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    begin = torch.full((count, 1), tokenizer.bos_token_id)
    ids = model.generate(
        begin, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=400, eos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--own-text", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--name", default="storage_quality")
    parser.add_argument("--keep", type=Path, help="keep the reports in this folder")
    given = parser.parse_args()
    if (given.text is None) == (not given.own_text):
        parser.error("give --text FILE or --own-text")

    from lmlab.evaluation.quantization import KINDS, quantization_report

    reports = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in given.seeds:
            if given.own_text:
                texts = own_texts(given.model, seed, given.slices)
            else:
                texts = slices(given.text, seed, given.slices, given.characters)
            folder = (given.keep or Path(temporary)) / f"{given.name}-{seed}"
            reports.append(
                quantization_report(
                    given.model, texts=texts, kinds=given.kinds or KINDS, accelerator="cpu", folder=folder
                )
            )
    save(given.name, {"reports": reports, "seeds": given.seeds}, table(reports))
    return 0


def table(reports: list[dict[str, Any]]) -> str:
    """A row a kind, the best first."""
    by_kind = {row["kind"]: [row] for row in reports[0]["kinds"]}
    for report in reports[1:]:
        for row in report["kinds"]:
            by_kind[row["kind"]].append(row)
    ranked = sorted(by_kind.values(), key=lambda rows: statistics.fmean(row["nll"] for row in rows))
    lines = []
    for rows, following in itertools.zip_longest(ranked, ranked[1:]):
        better = (
            ""
            if following is None
            else sum(a["nll"] < b["nll"] for a, b in zip(rows, following, strict=True))
        )
        lines.append(
            [
                rows[0]["kind"],
                f"{rows[0]['bits_per_param']:.3f}",
                f"{rows[0]['weight_error']:.3%}",
                " ".join(f"{row['perplexity']:.4f}" for row in rows),
                " ".join(f"{row['nll_increase']:+.2e}" for row in rows),
                f"{statistics.fmean(row['nll_increase_error'] for row in rows):.1e}",
                f"{statistics.fmean(row['kl'] for row in rows):.2e}",
                f"{statistics.fmean(row['same_token'] for row in rows):.2%}",
                f"{better} of {len(rows)}" if better != "" else "",
            ]
        )
    head = ("kind", "bits", "weight error", "perplexity", "nats over fp32", "its standard error", "KL", "same token", "better than the next")  # fmt: skip
    tokens = ", ".join(f"{report['tokens']:,}" for report in reports)
    return f"{reports[0]['model']}: {tokens} tokens\n\n{markdown(head, lines)}"


if __name__ == "__main__":
    sys.exit(main())
