"""scripts/tokenize_corpus.py beside `datasets.map`: megabytes a second, memory over corpus size, identical ids; Markdown tables.

`python benchmarks/tokenize_corpus.py --mb 200 --repeats 3` makes the corpora from LMLAB_TEST_DATA's books repeated: whole books
as documents (.md), and their paragraphs (one .jsonl). Each run is a fresh process bound to as many cores as it may use
processes, in the order A B, B A, A B, ... The peer's batch size is the best of several on a small corpus. Repeated text is
kind to a word cache; `--distinct` shows the first pass over text never seen before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LMLAB_TEST_DATA", ROOT.parent / "shared" / "data"))
BOOKS = ("Adventures_of_Huckleberry_Finn.md", "Dracula.md", "Frankenstein.md")
BATCH_SIZES = {"books": (1, 4, 16), "paragraphs": (100, 1000, 4000)}
PEER = """
import json, sys, time
began = time.perf_counter()
import datasets
from transformers import PreTrainedTokenizerFast
tokenizer_dir, source, shape, cache, num_proc, batch_size = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
tokenizer.model_max_length = 10**12
files = sorted(str(file) for file in __import__("pathlib").Path(source).iterdir())
if shape == "books":
    rows = datasets.load_dataset("text", data_files=files, sample_by="document", split="train", cache_dir=cache)
else:
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
eos = [tokenizer.eos_token_id]
def encode(batch):
    made = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    return {"input_ids": [ids + eos for ids in made["input_ids"]]}
start = time.perf_counter()
done = rows.map(encode, batched=True, batch_size=int(batch_size), num_proc=int(num_proc) if int(num_proc) > 1 else None,
                remove_columns=rows.column_names)
end = time.perf_counter()
print(json.dumps({"rows": len(done), "map": end - start, "whole": end - began}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--shapes", default="books,paragraphs")
    parser.add_argument(
        "--memory", default="50,100,200", help="corpus sizes in MB whose peak memory is compared"
    )
    parser.add_argument(
        "--distinct", action="store_true", help="also text without any repetition, a few MB of it"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmlab-benchmark-") as made:
        work = Path(made)
        tokenizer = work / "tokenizer"
        _save_tokenizer(tokenizer)
        for shape in options.shapes.split(","):
            source = make_corpus(work / f"{shape}-{options.mb}", shape, options.mb)
            best = _best_batch_size(work, tokenizer, shape)
            for count in map(int, options.processes.split(",")):
                compare(work, tokenizer, source, shape, count, options.repeats, best)
            check_ids(work / "ours", tokenizer, shape, options.mb)
        if options.memory:
            memory_table(work, tokenizer, [int(size) for size in options.memory.split(",")])
        if options.distinct:
            distinct_table(work, tokenizer)
    return 0


def _save_tokenizer(folder: Path) -> None:
    from lmlab.tokenizers import load_tokenizer

    load_tokenizer(DATA / "tokenizers" / "gpt2").save_pretrained(folder)


def make_corpus(folder: Path, shape: str, mb: int) -> Path:
    """The books one after another until there are ``mb`` megabytes, as files or as lines of one .jsonl."""
    folder.mkdir()
    size = number = 0
    texts = [(DATA / "clm" / "books" / name).read_text(encoding="utf-8") for name in BOOKS]
    with (folder / "all.jsonl").open("w", encoding="utf-8") as lines:
        while size < mb * 1e6:
            text = texts[number % len(texts)]
            if shape == "books":
                (folder / f"{number:05d}.md").write_text(text, encoding="utf-8")
            else:
                for paragraph in paragraphs(text):
                    lines.write(json.dumps({"text": paragraph}, ensure_ascii=False) + "\n")
            size += len(text.encode("utf-8"))
            number += 1
    if shape == "books":
        (folder / "all.jsonl").unlink()
    return folder


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def run(command: list[str], cores: int, **environment: str) -> tuple[float, str, float]:
    """Seconds, standard output and peak memory (MB, resident, the whole process tree) of a process bound to cores."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **quiet, **environment},
            stdout=out,
            stderr=errors,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        for stream in (out, errors):
            stream.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:3])} failed:\n{errors.read()[-3000:]}")
        return seconds, out.read(), peak


def _resident(pid: int) -> float:
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in tree) / 1e6
    except psutil.Error:
        return 0.0


def ours(work: Path, tokenizer: Path, source: Path, count: int) -> dict[str, float]:
    shutil.rmtree(work / "ours", ignore_errors=True)
    told = ["--tokenizer", str(tokenizer), "--to", str(work / "ours"), "--workers", str(count)]
    seconds, _, peak = run([sys.executable, "scripts/tokenize_corpus.py", str(source), *told], count)
    return {"whole": seconds, "peak": peak}


def peer(
    work: Path, tokenizer: Path, source: Path, shape: str, count: int, batch_size: int
) -> dict[str, float]:
    shutil.rmtree(work / "peer", ignore_errors=True)
    cache = str(work / "peer")
    arguments = [str(tokenizer), str(source), shape, cache, str(count), str(batch_size)]
    _, out, peak = run([sys.executable, "-c", PEER, *arguments], count, HF_DATASETS_CACHE=cache)
    return {**json.loads(out.splitlines()[-1]), "peak": peak}


def _best_batch_size(work: Path, tokenizer: Path, shape: str) -> int:
    source = make_corpus(work / f"{shape}-small", shape, 8)
    seconds = {size: peer(work, tokenizer, source, shape, 1, size)["map"] for size in BATCH_SIZES[shape]}
    return min(seconds, key=lambda size: seconds[size])


def compare(
    work: Path, tokenizer: Path, source: Path, shape: str, count: int, repeats: int, batch_size: int
) -> None:
    size = sum(file.stat().st_size for file in source.iterdir()) / 1e6
    results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for number in range(repeats):
        for name in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
            made = (
                ours(work, tokenizer, source, count)
                if name == "ours"
                else peer(work, tokenizer, source, shape, count, batch_size)
            )
            results[name].append(made)

    def rates(name: str, key: str) -> list[float]:
        return [size / result[key] for result in results[name]]

    columns = {
        "tokenize_corpus.py, whole command": rates("ours", "whole"),
        "datasets.map, whole script": rates("peer", "whole"),
        "datasets.map, the map call alone": rates("peer", "map"),
    }
    median = {name: statistics.median(values) for name, values in columns.items()}
    first = next(iter(columns))
    print(
        f"\n{shape}, {size:.0f} MB, {count} process(es) on {count} core(s), peer's batch_size {batch_size}\n"
    )
    print(
        "| | MB/s, median | range | tokenize_corpus.py is faster by | peak memory MB |\n|---|---|---|---|---|"
    )
    for name, values in columns.items():
        ratios = [a / b for a, b in zip(columns[first], values, strict=True)]
        peak = max(result["peak"] for result in results["ours" if name == first else "peer"])
        print(
            f"| {name} | {median[name]:.2f} | {min(values):.2f} to {max(values):.2f} "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | {peak:.0f} |",
            flush=True,
        )


def check_ids(folder: Path, tokenizer: Path, shape: str, mb: int) -> None:
    """Every document on disk is the library's one-piece encoding of a source document, each as often as it should be."""
    from lmlab.data.shards import Shards
    from lmlab.tokenizers import load_tokenizer

    library: Any = load_tokenizer(tokenizer)
    eos = [library.eos_token_id]
    texts = [(DATA / "clm" / "books" / name).read_text(encoding="utf-8") for name in BOOKS]
    expected: Counter[str] = Counter()
    size = number = 0
    known: dict[str, str] = {}
    while size < mb * 1e6:
        text = texts[number % len(texts)]
        for document in [text] if shape == "books" else paragraphs(text):
            if document not in known:
                known[document] = _hash(library(document, add_special_tokens=False).input_ids + eos)
            expected[known[document]] += 1
        size, number = size + len(text.encode("utf-8")), number + 1
    found: Counter[str] = Counter()
    for split in ("train", "val"):
        shards = Shards(folder / split)
        for document in range(1, shards.num_documents):
            found[_hash(shards.read(*shards.span(document))[0].tolist())] += 1
    assert found == expected, "ids differ from encoding each document in one piece"
    print(
        f"\nids: {expected.total():,} documents identical to encoding each in one piece (sha256)", flush=True
    )


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def memory_table(work: Path, tokenizer: Path, sizes: list[int]) -> None:
    print("\n| corpus | peak resident memory of all processes, MB (2 workers) |\n|---|---|")
    for shape in ("books", "paragraphs"):
        for size in sizes:
            source = make_corpus(work / f"memory-{shape}-{size}", shape, size)
            print(f"| {shape}, {size} MB | {ours(work, tokenizer, source, 2)['peak']:.0f} |", flush=True)
            shutil.rmtree(source)


def distinct_table(work: Path, tokenizer: Path) -> None:
    """Text without repetition: what the cache gives on its first pass, and on a second one over the same."""
    import numpy as np

    from lmlab.tokenizers import load_tokenizer
    from lmlab.tokenizers.fast import FastEncoder

    library: Any = load_tokenizer(tokenizer)
    names = [*(f"books/{name}" for name in BOOKS), "tinyshakespeare.txt", "wikitext2-valid.txt"]
    texts = [(DATA / "clm" / name).read_text(encoding="utf-8") for name in names]
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    encoder = FastEncoder(library)
    print(f"\n| {size:.1f} MB, no repetition, one thread | MB/s |\n|---|---|")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for label in ("first pass", "second pass"):
        began = time.perf_counter()
        ids = [encoder.encode(text) for text in texts]
        print(f"| words cached, {label} | {size / (time.perf_counter() - began):.1f} |")
    began = time.perf_counter()
    reference = library(texts, add_special_tokens=False).input_ids
    print(f"| the library, whole texts | {size / (time.perf_counter() - began):.1f} |", flush=True)
    assert all(np.array_equal(a, b) for a, b in zip(ids, reference, strict=True))


if __name__ == "__main__":
    sys.exit(main())
