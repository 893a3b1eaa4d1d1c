"""scripts/tokenize_corpus.py as a user meets it: the ids, a kill and going on, signals, one-line errors."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scripts import tokenize_corpus

from lmlab.data.corpus import CorpusIndex
from lmlab.data.shards import Shards
from lmlab.tokenizers import load_tokenizer, tokenizer_hash, train_bpe
from tests.integration.conftest import ROOT, begun, command
from tests.object_store import SECRET, object_server

SCRIPT = "scripts/tokenize_corpus.py"
SMALL = ("--shard-mb", "1")
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "was",
    "she",
    "he",
    "said",
    "that",
    "it",
    "time",
    "had",
    "not",
    "with",
    "for",
    "her",
    "his",
    "on",
    "at",
    "by",
    "but",
    "12",
    "1984",
    "don't",
    "né",
    "日本",
]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(5, 30))).capitalize() + rng.choice(
        [".", "!", "?\n", ".\n\n"]
    )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(
        [sentence(rng) for _ in range(400)],
        vocab_size=400,
        pre_tokenizer="gpt2",
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        max_chars=10**6,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 MB in one .jsonl and two texts: a dozen units."""
    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("source")
    body = "".join(sentence(rng) for _ in range(6_000))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(9):
            for start in range(0, len(body), 700):
                lines.write(json.dumps({"text": f"{number} {body[start : start + 700]}"}) + "\n")
    (folder / "a.txt").write_text(body * 2, encoding="utf-8")
    (folder / "b.md").write_text(body[::-1], encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(source: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run: its directory and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    done = command(
        SCRIPT, str(source), "--tokenizer", str(tokenizer_dir), "--to", str(folder), "--workers", "1", *SMALL
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def running(source: Path, tokenizer_dir: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two workers that has finished a unit and not all of them."""
    folder = tmp_path / "corpus"
    told = [str(source), "--tokenizer", str(tokenizer_dir), "--to", str(folder), "--workers", "2", *SMALL]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *told], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((folder / "units").glob("*.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_ids_are_those_of_encoding_each_document_in_one_piece(
    whole: tuple[Path, str], source: Path, tokenizer_dir: Path
) -> None:
    folder, printed = whole
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    texts = [(source / name).read_text(encoding="utf-8") for name in ("a.txt", "b.md")]
    lines = (source / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts += [json.loads(line)["text"] for line in lines[::50]]
    found = set()
    for split in ("train", "val"):
        shards = Shards(folder / split)
        assert shards.read(*shards.span(0))[0].tolist() == [tokenizer.eos_token_id]
        found |= {shards.read(*shards.span(i))[0].tobytes() for i in range(1, shards.num_documents)}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        assert np.asarray([*ids, tokenizer.eos_token_id], np.int64).tobytes() in found
    index = CorpusIndex.load(folder)
    assert index.report["records_kept"] == len(lines) + 2
    assert index.tokenizer_hash == tokenizer_hash(load_tokenizer(folder / "tokenizer"))
    assert f"{index.report['tokens']:,} tokens" in printed
    assert f"python train.py task=pretrain data=shards data.path={folder} tokenizer=file" in printed
    assert not (folder / "units").exists()


def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(
    running: subprocess.Popen[str], whole: tuple[Path, str], source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    workers = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    assert gone(workers), "workers outlive their killed parent"
    folder = tmp_path / "corpus"
    assert not (folder / "index.json").exists()
    done = command(
        SCRIPT, str(source), "--tokenizer", str(tokenizer_dir), "--to", str(folder), "--workers", "2", *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_time_change_nothing(
    seed: int, whole: tuple[Path, str], source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "corpus"
    told = [
        SCRIPT,
        str(source),
        "--tokenizer",
        str(tokenizer_dir),
        "--to",
        str(folder),
        "--workers",
        "2",
        "--verify",
        *SMALL,
    ]
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, *told], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not (folder / "plan.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.random() * 2)
        victims = [psutil.Process(process.pid)] if process.poll() is None else []
        victims += victims[0].children(recursive=True) if victims else []
        if victims:
            rng.choice(victims).kill()  # the parent, or a worker
        process.wait(60)
        assert gone(victims)
    done = command(*told)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_all_processes_with_its_code(
    running: subprocess.Popen[str], tmp_path: Path, number: int, code: int, word: str
) -> None:
    workers = psutil.Process(running.pid).children(recursive=True)
    notes = len(list((tmp_path / "corpus/units").glob("*.json")))
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == code
    assert errors.strip().splitlines()[-1] == f"{word}: finished units stay, the same command goes on"
    assert "Traceback" not in errors
    assert gone(workers)
    assert len(list((tmp_path / "corpus/units").glob("*.json"))) >= notes


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_finished_units_stay(
    source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    told = [
        SCRIPT,
        str(source),
        "--tokenizer",
        str(tokenizer_dir),
        "--to",
        str(folder),
        "--workers",
        "1",
        *SMALL,
    ]
    # No file may grow beyond the limit: the one thing about a full disk that can be had without one.
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 600; trap '' XFSZ; exec '{sys.executable}' \"$@\"", "bash", *told],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: File too large")
    assert not list(folder.rglob("*.tmp"))
    assert list((folder / "units").glob("*.json"))


@pytest.mark.slow
def test_ctrl_c_ends_a_ray_of_our_own_and_the_same_command_goes_on(
    whole: tuple[Path, str], source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "corpus"
    told = [SCRIPT, str(source), "--tokenizer", str(tokenizer_dir), "--to", str(folder), *SMALL]
    told += ["--ray", "local", "--workers", "2"]
    process = begun(*told)
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "units").glob("*.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 3
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "interrupted: finished units stay, the same command goes on"
    assert "Traceback" not in errors
    assert gone(started)
    assert not (folder / "index.json").exists()
    done = command(*told)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole[0])


@pytest.mark.slow
def test_a_corpus_on_s3_trains_and_no_file_of_the_run_has_the_key(
    whole: tuple[Path, str], source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with object_server() as server:
        environment: dict[str, Any] = {**server.environment, "LMLAB_CACHE": str(tmp_path / "cache")}
        told = [str(source), "--tokenizer", str(tokenizer_dir), "--to", "s3://lab/corpus", "--workers", "2"]
        done = command(SCRIPT, *told, *SMALL, **environment)
        assert done.returncode == 0, done.stderr
        assert (
            "data.path=s3://lab/corpus tokenizer=file tokenizer.path=s3://lab/corpus/tokenizer" in done.stdout
        )
        again = command(SCRIPT, "s3://lab/corpus", *told, *SMALL, **environment)
        assert again.returncode == 0, again.stderr
        assert "all of it was there" in again.stdout, "its own index.json is no input"
        options = [
            "data=shards",
            "tokenizer=file",
            "data.max_length=64",
            "trainer.max_steps=2",
            "samples.prompts=0",
        ]
        options += [
            "task=pretrain",
            "trainer.accelerator=cpu",
            f"output_root={tmp_path}/outputs",
            "run_name=x",
        ]
        options += ["trainer.val_every_n_steps=2", "trainer.memory_plan=false", "logger.mode=offline"]
        options += ["overwrite=true"]
        losses = []
        for place in ("s3://lab/corpus", str(whole[0])):
            paths = [f"data.path={place}", f"tokenizer.path={place}/tokenizer"]
            done = command("train.py", *options, *paths, **environment)
            assert done.returncode == 0, done.stderr
            assert SECRET not in done.stdout + done.stderr
            assert SECRET.encode() not in b"".join(contents(tmp_path / "outputs").values())
            summary = json.loads((tmp_path / "outputs/pretrain/x/summary.json").read_text())
            losses.append({name: summary[name] for name in summary if "loss" in name})
    assert losses[0] == losses[1]
    assert losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "error: bad value 0 (--workers): at least 1"),
        (["--val-fraction", "1"], "error: bad value 1.0 (--val-fraction): between 0 and 1"),
        (["--shard-mb", "0"], "error: bad value 0.0 (--shard-mb): above 0"),
        (["--shard-mb", "inf"], "error: bad value inf (--shard-mb): above 0"),
        (["--shard-mb", "1e-9"], "error: bad value 1e-09 (--shard-mb): above 0"),
        (["--to", "s3://lab/run[1]"], "error: a corpus at a pattern (s3://lab/run[1]): name one place"),
        (["--limit-documents", "0"], "error: bad value 0 (--limit-documents): at least 1"),
        (
            ["--ray", "127.0.0.1:1"],
            "error: no Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused (--ray): start",
        ),
        (["--ray", ""], "error: bad value (--ray): auto, local or HOST:PORT"),
        (["--to", "memory://corpus"], "error: bad value memory://corpus (--to): a folder or an s3:// URL"),
        (
            ["--to", "s3://me:key@lab/x"],
            "error: credentials or options in a URL (s3://***@lab/x): leave them out",
        ),
        (["--columns", "content"], "error: bad value content (--columns): text=NAME_OF_THE_FIELD"),
        (["nowhere"], "error: no such data file: nowhere (PATH): "),
        (["--tokenizer", "./nowhere"], "error: no such tokenizer (nowhere): "),
        (
            [],
            "error: broken JSON: Expecting value: line 1 column 1 (char 0) ({file}:2): mend it, or count and skip",
        ),
    ],
)
def test_a_user_error_is_one_line_and_exit_two(
    arguments: list[str],
    message: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--ray" in arguments:
        pytest.importorskip("ray")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM,)}
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\nbad\n', encoding="utf-8")
    told = ["--tokenizer", str(tokenizer_dir), "--to", str(tmp_path / "corpus"), "--workers", "1", str(file)]
    try:
        code = tokenize_corpus.main([*told, *arguments])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    errors = capsys.readouterr().err
    assert code == 2, errors
    assert errors.startswith(message.format(file=file))
    assert errors.count("\n") == 1
    assert "data." not in errors
    assert not (tmp_path / "corpus/index.json").exists()
