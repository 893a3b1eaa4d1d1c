"""Batched greedy decoding beside transformers' ``generate``: the same model, prompts and batch, in fresh processes.

Two suites: a plain fp32 base, and an nf4 base with a LoRA adapter, which transformers decodes unmerged (as it is used
while training) and lmlab merges inside the measured time. The peer is the better of its dynamic and static caches.
A contender that writes other ids than the first one stops the suite before any figure is kept.

    python benchmarks/generation.py --repeats 5
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import (
    Contender,
    Machine,
    compare,
    markdown,
    paired_ratio,
    python,
    save,
    spread,
    status_gb,
    wait_until_quiet,
    write_figures,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
NUM_PROMPTS, LENGTHS = 32, (16, 48)
SUITES = {"plain": 1.15, "nf4-lora": 3.0}
"""Suite and its target over transformers."""
CONTENDERS = ("lmlab", "generate-dynamic", "generate-static")


def build(suite: str) -> Any:
    """Random weights of a spread that makes greedy ids differ from step to step; the same in every process."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.06)
    if suite == "plain":
        return model.eval()
    from peft import LoraConfig, get_peft_model

    from lmlab.models.quantize import FourBit

    FourBit(kind="nf4", double_quant=True).apply(model, compute_dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def prompts() -> list[list[int]]:
    """Mixed lengths, mean 32."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (NUM_PROMPTS,), generator=generator).tolist()
    vocabulary = SHAPE["vocab_size"]
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def own(model: Any, given: list[list[int]]) -> Callable[[int], list[list[int]]]:
    """lmlab, as its training samples and scripts call it."""
    import torch

    from lmlab.generation.decode import generate
    from lmlab.generation.samplers import GreedySampler
    from lmlab.models.decoding import ready_to_decode

    def write(new: int) -> list[list[int]]:
        sampler = GreedySampler(kind="greedy", max_new_tokens=new)
        with ready_to_decode(model, compute_dtype=torch.float32, num_steps=new):
            rows = generate(model, given, sampler=sampler, eos_token_ids=(), seeds=range(len(given)))
        return [row.token_ids for row in rows]

    return write


def peer(model: Any, given: list[list[int]], cache: str) -> Callable[[int], list[list[int]]]:
    """transformers' generate on one left-padded batch."""
    import torch

    width = max(map(len, given))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in given])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in given])
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}

    def write(new: int) -> list[list[int]]:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            **options,
        )
        return out[:, width:].tolist()

    return write


def contend(name: str, suite: str, new: int) -> None:
    """One measured run in this process."""
    import torch

    with torch.no_grad():
        model, given = build(suite), prompts()
        write = own(model, given) if name == "lmlab" else peer(model, given, name.removeprefix("generate-"))
        rss = status_gb("VmRSS")
        write(2)
        began = time.perf_counter()
        rows = write(new)
        seconds = time.perf_counter() - began
    write_figures(
        {
            "seconds": seconds,
            "tokens_per_second": sum(map(len, rows)) / seconds,
            "rss_after_imports_gb": rss,
            "ids": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
            "distinct_ids": len({token for row in rows for token in row}),
        }
    )


def run_suite(
    suite: str, machine: Machine, *, repeats: int, new: int
) -> tuple[dict[str, Any], list[list[str]]]:
    """All contenders of a suite, first once to compare their ids; (figures, table rows)."""
    command = (
        python(),
        str(Path(__file__).resolve()),
        "--suite",
        suite,
        "--new-tokens",
        str(new),
        "--contender",
    )
    contenders = [Contender(name, (*command, name), limit=900) for name in CONTENDERS]
    print(f"{suite}: ids")
    gate = compare(contenders, machine, 1)
    ids = {name: found[0]["ids"] for name, found in gate.items()}
    if len(set(ids.values())) > 1:
        raise SystemExit(f"{suite}: greedy ids differ, nothing is timed: {ids}")
    print(f"{suite}: times")
    runs = compare(contenders, machine, repeats)
    medians = {name: spread(found, "tokens_per_second") for name, found in runs.items()}
    best = max(CONTENDERS[1:], key=lambda name: medians[name].median)  # type: ignore[union-attr]
    ratio = paired_ratio(runs["lmlab"], runs[best], "tokens_per_second")
    rows = []
    for name in CONTENDERS:
        speed, memory = medians[name], spread(runs[name], "rss_growth_gb")
        assert speed and memory and ratio  # noqa: PT018
        against = (
            f"{ratio.text(2)}, target {SUITES[suite]}" if name == "lmlab" else ("1" if name == best else "")
        )
        rows.append([suite, name, speed.text(0), memory.text(2), against])
    return {"runs": runs, "ids": ids["lmlab"], "best_peer": best, "ratio": ratio and vars(ratio)}, rows


def main() -> int:
    """Run the suites, or with --contender one measured run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--suite", choices=SUITES, help="only this one")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--contender", choices=CONTENDERS, help="used by the suite itself")
    given = parser.parse_args()
    if given.contender:
        contend(given.contender, given.suite or "plain", given.new_tokens)
        return 0
    machine = Machine.of_threads(given.threads)
    wait_until_quiet(given.wait, load=0.5)
    figures: dict[str, Any] = {"machine": machine.describe(), "shape": SHAPE, "new_tokens": given.new_tokens}
    table: list[list[str]] = []
    for suite in [given.suite] if given.suite else SUITES:
        figures[suite], rows = run_suite(suite, machine, repeats=given.repeats, new=given.new_tokens)
        table += rows
    header = ("suite", "", "new tokens/s", "RSS growth GB", "times the best peer, per round")
    save("generation", figures, markdown(header, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
