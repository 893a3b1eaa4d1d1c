"""Fine-tuning on a CPU side by side: lmlab, TRL's SFTTrainer, HF Trainer + PEFT; LoRA, full, QLoRA (nf4) and int8.

    python benchmarks/finetune.py --repeats 5                     everything (about two hours on 2 cores)
    python benchmarks/finetune.py --suites lora --repeats 1       one part of it, for trying

Needs `make bench-peers` and LMLAB_TEST_DATA. The setting is finetune_setting.py's. Before anything is timed a gate compares
the losses of the first steps on identical batches: differing by more than 1e-4, the suite stops. Every figure
is a median with its range over fresh processes, in the order A B A B; ratios are taken within a round. Tokens are those of the
rows as everyone is given them, never padding.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_setting import (
    LR,
    NUM_ROWS_BEFORE,
    NUM_ROWS_TIMED,
    initial_adapter,
    overrides,
    prepare_setting,
)
from side_by_side import (
    DATA,
    RESULTS,
    ROOT,
    Contender,
    Machine,
    bars,
    compare,
    markdown,
    paired_ratio,
    python,
    require_data,
    run_once,
    save,
    spread,
    wait_until_quiet,
)

HERE = ROOT / "benchmarks"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
GATE = (
    1e-4  # of a loss near 10.8: fp32 sums in another order differ by some 1e-6 a step, a wrong mask by 1e-2
)
TRL_LAYOUTS = ("padded", "grouped", "packed", "padding_free")
Runs = dict[str, list[dict[str, Any]]]


class Suite:
    """The comparison in one folder of work.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.work.absolute()
        self.machine = Machine.of_threads(options.threads)
        self.result: dict[str, Any] = {"machine": self.machine.describe(), "repeats": options.repeats}
        self.texts: list[str] = []

    def own(self, mode: str, batch_size: int, *, untimed_steps: int | None = None) -> Contender:
        """lmlab in one mode."""
        name, script = f"own-{mode}-{batch_size}", str(HERE / "finetune_own.py")
        steps = untimed_steps or self.options.rows[1] // batch_size
        told = overrides(self.folder, mode, batch_size=batch_size, steps=steps)
        timed = [] if untimed_steps else ["--rows", "{}:{}".format(*self.options.rows), "--limit"]
        return Contender(
            f"lmlab {mode}, {batch_size} a step",
            [python(), script, "train", str(self.folder / "runs" / "sft" / name), *timed],
            before=[python(), script, "prepare", f"run_name={name}", *told],
            environment={"LMLAB_CACHE": str(self.folder / "cache")},
        )

    def peer(self, library: str, layout: str, mode: str, batch_size: int, *more: str) -> Contender:
        """A peer in one mode and layout."""
        label = {"trl": "TRL", "hf": "HF Trainer"}[library]
        told = ["--library", library, "--layout", layout, "--mode", mode, "--batch-size", str(batch_size)]
        told += ["--lr", str(LR[mode]), *more]
        if "--rows" not in more:
            told += ["--rows", "{}:{}".format(*self.options.rows)]
        shipped = ", as shipped" if "--shipped" in more else ""
        return Contender(
            f"{label} {mode}, {layout}, {batch_size} a step{shipped}",
            [str(PEERS), str(HERE / "finetune_peers.py"), str(self.folder), *told],
            limit=self.options.shipped_limit if shipped else 1800.0,
        )

    # --- the gate -----------------------------------------------------------------------------------------------

    def gate(self, mode: str) -> None:
        """Losses of the first steps on identical batches against both peers, padded.

        Raises:
            SystemExit: they differ; a time would mean nothing.
        """
        steps, size = self.options.gate_steps, self.options.gate_batch_size
        told = ("--rows", f"0:{steps * size}", "--warmup-steps", "0", "--losses")
        ours = run_once(self.own(mode, size, untimed_steps=steps), self.machine)["losses"]
        for library in ("hf", "trl"):
            theirs = run_once(self.peer(library, "padded", mode, size, *told), self.machine)["losses"]
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            said = f"{mode}, {steps} steps of {size}: lmlab and {library} differ by {worst:.1e} at most"
            print(f"gate: {said}", flush=True)
            self.result.setdefault("gate", []).append(
                {"mode": mode, "peer": library, "ours": ours, "theirs": theirs, "worst": worst}
            )
            if worst > GATE:
                raise SystemExit(f"gate failed (over {GATE:g}): {said}\n  lmlab {ours}\n  {library} {theirs}")
            self.texts.append(f"Gate: {said}.\n")

    # --- the suites ---------------------------------------------------------------------------------------------

    def lora(self) -> None:
        """LoRA: everyone at the better of the batch sizes, TRL in every layout it has."""
        initial_adapter(self.folder, "lora")
        self.gate("lora")
        families = [[self.own("lora", size) for size in self.options.batch_sizes]]
        for layout in self.options.layouts.split(","):
            families.append([self.peer("trl", layout, "lora", size) for size in self.options.batch_sizes])
        families.append([self.peer("hf", "padded", "lora", size) for size in self.options.batch_sizes])
        self.timed("lora", self.at_their_best("lora", families))
        if self.options.shipped_limit > 0:
            self.shipped()

    def full(self) -> None:
        """Full fine-tuning: every weight, Adam's states too."""
        self.gate("full")
        families = [[self.own("full", size) for size in self.options.batch_sizes]]
        families.append([self.peer("hf", "padded", "full", size) for size in self.options.batch_sizes])
        families.append([self.peer("trl", "grouped", "full", size) for size in self.options.batch_sizes])
        self.timed("full", self.at_their_best("full", families))

    def quantized(self) -> None:
        """lmlab over nf4 and int8 beside lmlab over fp32, and HF Trainer + PEFT over nf4."""
        initial_adapter(self.folder, "qlora")
        size = self.options.batch_sizes[0]
        contenders = [self.own(mode, size) for mode in ("lora", "qlora", "int8")]
        contenders.append(self.peer("hf", "padded", "qlora", size))
        self.timed("quantized", contenders)

    def shipped(self) -> None:
        """TRL with every default: bf16 and checkpointing, on a processor without fast bf16."""
        run = run_once(self.peer("trl", "padded", "lora", 8, "--shipped"), self.machine)
        self.result["trl_as_shipped"] = run
        said = (
            f"not finished after {run['stopped']:.0f} s"
            if "stopped" in run
            else f"{run['tokens_per_second']:.1f} tokens/s, {run['peak_rss_gb']:.2f} GB"
        )
        self.texts.append(f"TRL as shipped (bf16, gradient checkpointing, padded, 8 a step): {said}.\n")

    def at_their_best(self, suite: str, families: Sequence[Sequence[Contender]]) -> list[Contender]:
        """Of each family the contender with most tokens a second in one run; families of one are not tried."""
        chosen, tried = [], {}
        for family in families:
            if len(family) == 1:
                chosen.append(family[0])
                continue
            runs = {each.name: run_once(each, self.machine) for each in family}
            tried.update({name: run.get("tokens_per_second", 0.0) for name, run in runs.items()})
            chosen.append(max(family, key=lambda each: runs[each.name].get("tokens_per_second", 0.0)))
        self.result.setdefault("tried", {})[suite] = tried
        for name, rate in tried.items():
            print(f"  tried {name}: {rate:.0f} tokens/s", flush=True)
        return chosen

    def timed(self, suite: str, contenders: Sequence[Contender]) -> None:
        """Time, tabulate and draw."""
        print(f"{suite}: {len(contenders)} contenders, {self.options.repeats} repeats", flush=True)
        runs = compare(contenders, self.machine, self.options.repeats)
        self.result.setdefault("suites", {})[suite] = runs
        self.texts.append(f"\n### {suite}\n\n{table(runs)}")
        panels = [
            (label, {name: [run[key] for run in some if key in run] for name, some in runs.items()})
            for label, key in (
                ("tokens/s, no padding", "tokens_per_second"),
                ("peak RSS, GB", "peak_rss_gb"),
            )
        ]
        bars(RESULTS / f"finetune-{suite}.png", panels, title=f"Fine-tuning on a CPU: {suite}", first="lmlab")


def table(runs: Runs) -> str:
    """Rates, memory and ratios to the first contender, one line each."""
    first = next(iter(runs))
    rows = []
    for name, some in runs.items():
        cells = [name]
        for key, digits in (("tokens_per_second", 0), ("supervised_per_second", 0)):
            made = spread(some, key)
            cells.append(made.text(digits) if made else "stopped at its limit")
        ratio = paired_ratio(runs[first], some, "tokens_per_second")
        cells.append(ratio.text(2) if ratio and name != first else "")
        for key in ("peak_rss_gb", "rss_growth_gb"):
            made = spread(some, key)
            cells.append(made.text(2) if made else "")
        ratio = paired_ratio(runs[first], some, "peak_rss_gb")
        cells.append(ratio.text(2) if ratio and name != first else "")
        for key in ("share_of_limit", "share_of_limit_best_step"):
            limit = spread(some, key)
            cells.append(limit.text(2) if limit else "")
        rows.append(cells)
    header = ("", "tokens/s", "supervised tokens/s", f"{first} is faster by", "peak RSS GB")
    more = (
        "RSS over imports GB",
        f"peak RSS of {first} over it",
        "share of the GEMM limit",
        "in its best step",
    )
    return markdown((*header, *more), rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--suites", default="lora,full,quantized")
    parser.add_argument(
        "--batch-sizes", default="8,16", help="triples a step; the better one is used for each"
    )
    parser.add_argument(
        "--rows",
        default=f"{NUM_ROWS_BEFORE}:{NUM_ROWS_BEFORE + NUM_ROWS_TIMED}",
        help="the timed rows, first:end, those before them being the warm-up; fewer for a trial",
    )
    parser.add_argument("--layouts", default=",".join(TRL_LAYOUTS), help="of TRL, in the LoRA suite")
    parser.add_argument("--gate-steps", type=int, default=6)
    parser.add_argument("--gate-batch-size", type=int, default=8)
    parser.add_argument(
        "--shipped-limit",
        type=float,
        default=900.0,
        help="seconds for TRL with its defaults; 0: leave it out",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "benchmark-finetune", help="weights, rows, runs"
    )
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine")
    options = parser.parse_args()
    options.batch_sizes = [int(size) for size in options.batch_sizes.split(",")]
    options.rows = tuple(map(int, options.rows.split(":")))
    if not PEERS.is_file():
        raise SystemExit("no peers here: run `make bench-peers` first")
    require_data()
    suite = Suite(options)
    os.environ["LMLAB_CACHE"] = str(suite.folder / "cache")
    suite.result["rows"] = prepare_setting(suite.folder, DATA)
    suite.result["load_at_start"] = wait_until_quiet(options.wait, load=0.5)
    for name in options.suites.split(","):
        getattr(suite, name)()
        save("finetune", suite.result, "\n".join(suite.texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
