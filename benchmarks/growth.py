"""What grows with what: step time with the tokens of a step, peak memory with the size of the corpus.

Pretraining from shards of scripts/tokenize_corpus.py. The corpora are one shared book repeated, as documents of some 2,000
characters (books as single documents would be too few to show what a document costs). Each run is `python train.py` in
a fresh process, its whole life counted for memory: preparing, a validation at step 0, 20 steps, a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import (
    DATA,
    OFFLINE,
    RESULTS,
    ROOT,
    Contender,
    Machine,
    compare,
    markdown,
    python,
    require_data,
    save,
    spread,
    write_figures,
)

BOOK = "clm/books/Dracula.md"
WARMUP = 4
STEPS = 20
WINDOW = 256


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--corpora", default="1,30,1000", help="megabytes of text")
    parser.add_argument("--batches", default="2,4,8,16,32", help="windows of 256 tokens a step")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmark-growth")
    parser.add_argument("--keep", action="store_true", help="keep the corpora for another time")
    parser.add_argument("--role", nargs="+", metavar="OVERRIDE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        return run(options.role)
    require_data()
    work, machine = options.work.absolute(), Machine.of_threads(options.threads)
    sizes = [int(size) for size in options.corpora.split(",")]
    batches = [int(size) for size in options.batches.split(",")]
    for size in sizes:
        make_shards(work, size)
    result: dict[str, Any] = {"machine": machine.describe(), "repeats": options.repeats}
    result["memory"] = memory = compare([train(work, s, 8) for s in sizes], machine, options.repeats)
    result["time"] = timed = compare([train(work, sizes[0], b) for b in batches], machine, options.repeats)
    text = f"{memory_table(memory)}\n{time_table(timed, batches)}"
    save("growth", result, text)
    draw(RESULTS / "growth.png", sizes, memory, batches, timed)
    if not options.keep:
        shutil.rmtree(work / "shards")
    return 0


# --- corpora ------------------------------------------------------------------------------------------------------


def documents(megabytes: int) -> Iterator[str]:
    """The book's paragraphs, some 2,000 characters a document, again and again."""
    paragraphs = (DATA / BOOK).read_text(encoding="utf-8").split("\n\n")
    size, document = 0, ""
    while size < megabytes * 1e6:
        for paragraph in paragraphs:
            document += paragraph + "\n\n"
            if len(document) < 2000:
                continue
            yield document
            size += len(document.encode("utf-8"))
            document = ""
            if size >= megabytes * 1e6:
                return


def make_shards(work: Path, megabytes: int) -> Path:
    """Token shards of a corpus by the project's own script; the text itself does not stay."""
    folder = work / "shards" / str(megabytes)
    if (folder / "tokenizer").is_dir():
        return folder
    from lmlab.tokenizers import load_tokenizer

    work.mkdir(parents=True, exist_ok=True)
    tokenizer = work / "gpt2"
    if not tokenizer.is_dir():
        load_tokenizer(DATA / "tokenizers" / "gpt2").save_pretrained(tokenizer)
    text = work / f"{megabytes}.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in documents(megabytes):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    command = [python(), "scripts/tokenize_corpus.py", str(text), "--tokenizer", str(tokenizer)]
    command += ["--to", str(folder), "--workers", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"tokenizing {megabytes} MB failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    text.unlink()
    return folder


# --- runs ---------------------------------------------------------------------------------------------------------


def train(work: Path, megabytes: int, batch_size: int) -> Contender:
    """A pretraining run over the shards of one corpus."""
    shards = work / "shards" / str(megabytes)
    told = [
        "task=pretrain",
        "model=llama_tiny",
        "tokenizer=file",
        f"tokenizer.path={shards / 'tokenizer'}",
        "data=shards",
        f"data.path={shards}",
        f"data.max_length={WINDOW}",
        f"trainer.batch_size={batch_size}",
        f"trainer.max_steps={STEPS}",
        "trainer.val_every_n_steps=1000000",
        "trainer.max_val_rows=64",  # of 5 % of the corpus, which the pass at step 0 would otherwise read whole
        "samples.prompts=0",
        "samples.grid=[]",
        "logger=none",
        f"output_root={work / 'runs'}",
        f"run_name=growth-{megabytes}-{batch_size}",
        "overwrite=true",
    ]
    return Contender(
        f"{megabytes} MB, {batch_size} windows",
        [python(), str(Path(__file__).resolve()), "--role", *told],
        environment={"LMLAB_CACHE": str(work / "cache")},
    )


def run(overrides: list[str]) -> int:
    """`python train.py OVERRIDES` in this process, then its step times from the journal."""
    from lmlab.config.compose import run_app

    def start(composed: Any, told: list[str]) -> int:
        from lmlab.start import start as start_run

        return start_run(composed, told)

    sys.argv = ["train.py", *overrides]
    code = run_app(start)
    if code:
        return code
    told = dict(each.split("=", 1) for each in overrides)
    folder = Path(told["output_root"]) / "pretrain" / told["run_name"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = {line["step"]: line["time"] for line in lines if "train/loss" in line}
    steps = [times[step] - times[step - 1] for step in sorted(times) if step > WARMUP]
    peaks = [
        v for line in lines for k, v in line.items() if k.startswith("memory/") and k.endswith("peak_gb")
    ]
    tokens = json.loads((folder / "data_report.json").read_text("utf-8"))["tokens"]
    write_figures(
        {
            "seconds": statistics.median(steps),
            "peak_rss_gb": max(peaks),
            "step_seconds": steps,
            "tokens": tokens,
        }
    )
    return 0


# --- report -------------------------------------------------------------------------------------------------------


def memory_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows, first = [], None
    for name, some in runs.items():
        made = spread(some, "peak_rss_gb")
        assert made is not None
        first = first or made.median
        growth = f"{(made.median - first) * 1000:+.0f} MB ({made.median / first - 1:+.1%})"
        rows.append([name, f"{some[0]['tokens']:,}", made.text(3), growth])
    return markdown(("corpus", "tokens", "peak RSS GB", "over the smallest"), rows)


def fit(
    batches: list[int], runs: dict[str, list[dict[str, Any]]]
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(tokens, median seconds, seconds a token, seconds a step without tokens) by least squares of relative error."""
    tokens = np.asarray(batches, float) * WINDOW
    seconds = np.asarray([statistics.median(run["seconds"] for run in some) for some in runs.values()])
    weights = 1 / seconds
    slope, fixed = np.polyfit(tokens, seconds, 1, w=weights)
    return tokens, seconds, float(slope), float(fixed)


def time_table(runs: dict[str, list[dict[str, Any]]], batches: list[int]) -> str:
    tokens, seconds, slope, fixed = fit(batches, runs)
    rows = []
    for count, made, some in zip(tokens, seconds, runs.values(), strict=True):
        times = spread(some, "seconds")
        assert times is not None
        off = made / (slope * count + fixed) - 1
        milliseconds = f"{times.median * 1e3:.1f} ({times.low * 1e3:.1f} to {times.high * 1e3:.1f})"
        rows.append([f"{count:,.0f}", milliseconds, f"{made / count * 1e6:.1f}", f"{off:+.1%}"])
    header = (
        "tokens a step",
        "ms a step",
        "us a token",
        f"off the line {slope * 1e6:.2f} us x tokens + {fixed * 1e3:.1f} ms",
    )
    return markdown(header, rows)


def draw(
    path: Path,
    sizes: list[int],
    memory: dict[str, list[dict[str, Any]]],
    batches: list[int],
    timed: dict[str, list[dict[str, Any]]],
) -> None:
    """Two panels: memory over corpus size, time over tokens with the fitted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    peaks = [statistics.median(run["peak_rss_gb"] for run in some) for some in memory.values()]
    left.semilogx(sizes, peaks, "o-", color="#1f5fa8")
    left.set_ylim(0, max(peaks) * 1.25)
    left.set_xlabel("corpus, MB of text")
    left.set_ylabel("peak RSS, GB")
    tokens, seconds, slope, fixed = fit(batches, timed)
    right.plot(tokens, seconds * 1e3, "o", color="#1f5fa8", label="median step")
    ends = np.asarray([0, tokens.max()])
    right.plot(ends, (slope * ends + fixed) * 1e3, "-", color="#b4bcc6", label="line")
    right.set_xlabel("tokens a step")
    right.set_ylabel("ms a step")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
