"""Run directories as real runs leave them, made in a moment, and a page as a browser's parser sees it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from lmlab.records import Sample
from lmlab.tracking.compare import render
from lmlab.tracking.groups import Entry, Group, grouped, read_result

HOSTILE = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)> & "quoted"'
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


def metric_rows(steps: int = 200, val_every: int = 50) -> list[dict[str, Any]]:
    """Log points as a CPU fine-tuning run leaves them: train lines, and validation lines at step 0, 50, ..."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "time": 1.5, "memory/load/peak_gb": 0.61, "memory/load/planned_gb": 0.58}
    ]
    for step in range(steps + 1):
        clock = 2.0 + step * 0.45
        wobble = 0.12 * math.sin(step * 12.9898) + 0.08 * math.sin(step * 78.233)
        loss = 1.1 + 2.3 * math.exp(-step / 45)
        if step:
            row = {"step": step, "time": clock, "train/loss": loss + wobble, "train/tokens": step * 4096}
            row["train/lr"] = 2e-4 * (
                step / 20 if step < 20 else 0.5 * (1 + math.cos(math.pi * (step - 20) / 180))
            )
            row |= {
                "train/grad_norm": 0.4 + 2 * math.exp(-step / 30) + abs(wobble),
                "memory/rss_gb": 0.9 + step / 2000,
            }
            row |= {"perf/tokens_per_second": 9100.0 + 400 * wobble - (4000 if step == 1 else 0)}
            phases = {"forward": (0.93, 0.9), "backward": (1.21, 1.25), "optimizer": (1.02, 0.98)}
            row |= {f"memory/{p}/peak_gb": peak for p, (peak, _) in phases.items()}
            row |= {f"memory/{p}/planned_gb": planned for p, (_, planned) in phases.items()}
            rows.append(row)
        if step % val_every == 0:
            val = loss + 0.08 + 0.0012 * max(0, step - 120)
            row = {"step": step, "time": clock + 0.2, "val/loss": val, "val/perplexity": math.exp(val)}
            row |= {
                "val/bits_per_byte": val * 0.36,
                "val/exact_match": step / 250,
                "memory/eval/peak_gb": 0.88,
            }
            rows.append(row | {"memory/generate/peak_gb": 0.79})
    return rows


def sample_rows() -> list[dict[str, Any]]:
    prompts = [
        "### Instruction:\nWhat does str.strip do?\n\n### Response:\n",
        "### Instruction:\nSort 3, 1, 2\n\n### Response:\n",
    ]
    rows = []
    for step in (0, 50, 100, 150, 200):
        for number, prompt in enumerate(prompts):
            for sampler in ("greedy", "top_p_temperature"):
                text = f"Return a copy of the string\n    with {step} words removed.\n\n    >>> ' x '.strip()\n    'x'"
                if step == 0:
                    text = ("" if sampler == "greedy" else " \n\n") if number else HOSTILE
                stop = "eos" if step else "length"
                rows.append(
                    Sample(step, number, prompt, sampler, 7 + number, text, 24 + step // 10, stop).row()
                )
    return rows


def write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_run(run_dir: Path, *, failed: bool = False) -> Path:
    """A complete run directory; ``failed`` gives one that died of memory at step 83."""
    run_dir.mkdir(parents=True)
    end = 83 if failed else 200
    write_lines(run_dir / "metrics.jsonl", [row for row in metric_rows() if row["step"] <= end])
    write_lines(run_dir / "samples.jsonl", [row for row in sample_rows() if row["step"] <= end])
    summary: dict[str, Any] = {"status": "finished", "exit_code": 0, "final": {"val/loss": 1.304}}
    if failed:
        summary = {"status": "failed", "exit_code": 1, "error": "CUDA out of memory in <backward>: 2.1 GB more asked for",
                   "traceback": "Traceback (most recent call last):\n  File \"train.py\", line 3\nOutOfMemoryError"}  # fmt: skip
    summary |= {
        "model/params_total": 4_812_288,
        "model/params_trainable": 98_304,
        "model/base_bytes": 2_707_456,
    }
    write_json(run_dir / "summary.json", summary | {"model/base_bits_per_param": 4.127})
    data = {
        "records_read": 5210,
        "records_kept": 5121,
        "records_dropped": {"no trained token left": 61, "empty response": 28},
    }
    write_json(
        run_dir / "data_report.json",
        data | {"records_truncated": 214, "tokens": 812_345, "supervised_tokens": 301_222},
    )
    run = {
        "argv": ["train.py", "adapter=qlora", "quant=nf4"],
        "git": {"commit": "5068a8c", "dirty": False},
        "seed": 1,
    }
    versions = {"python": "3.11.9", "torch": "2.10.0", "peft": "0.19.1"}
    write_json(run_dir / "run.json", run | {"versions": versions, "hardware": {"cpu": "2 cores", "gpus": []}})
    with open(run_dir / "config.yaml", "w", encoding="utf-8") as file:
        file.write(
            "task: sft\nseed: 1\nadapter:\n  kind: qlora\n  rank: 8\noptim:\n  name: paged_adamw8bit\n  lr: 0.0002\n"
        )
    with open(run_dir / "mask_preview.txt", "w", encoding="utf-8") as file:
        file.write(
            "record 0 (42 tokens, 17 trained)\n  ### Instruction: What does str.strip do?\n> Return a copy of <s>.\n"
        )
    return run_dir


class Page(HTMLParser):
    """Checks nesting while it reads, and keeps text, tags and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data


def assert_only_our_script(html: str, *, live: bool = False) -> None:
    """One script, which the page's policy names by its hash, and no address that the page could ask."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    tags = Page(html).tags
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv"))
    own = "; connect-src 'self'" if live else ""
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{own}"
    assert html.index("http-equiv") < html.index("<script"), "a policy says nothing of what stands before it"
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "embed", "base", "form")]
    assert not [attrs["src"] for _, attrs in tags if attrs.get("src")]
    assert not re.findall(r"url\((?!#)|@import", html.split("</style>")[0])


def script() -> ModuleType:
    """scripts/report.py as a module."""
    path = Path(__file__).parents[2] / "scripts" / "report.py"
    spec = importlib.util.spec_from_file_location("report_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Losses = dict[int, float]


def small_run(
    folder: Path, *, adapter: str = "none", quant: str = "none", seed: int = 1, losses: Losses | None = None,
    matches: Losses | None = None, rate: float = 100.0, flops: float = 1e6, speed: float = 1000.0, peak: float = 1.5,
    base: float | None = 0.5, trained: int = 1000, bits: float = 32.0, status: str = "finished", **more: Any,
) -> Path:  # fmt: skip
    """A run of 20 steps, logged every 10: ``rate`` tokens and ``flops`` a step, ``speed`` tokens a second."""
    folder.mkdir(parents=True)
    losses = {0: 4.0, 10: 2.0, 20: 1.0} if losses is None else losses
    rows: list[dict[str, Any]] = [
        {"step": 0, "time": 3.0, "memory/load/peak_gb": 0.9, "memory/load/planned_gb": 1.0}
    ]
    rows += [{"step": 0, "time": 4.0, "val/loss": losses[0]}] if 0 in losses else []
    for step in (10, 20):
        done = {"train/tokens": rate * step, "train/flops": flops * step, "perf/tokens_per_second": speed}
        rows.append({"step": step, "time": 4.0 + step, "train/loss": 5.0 / step, "memory/backward/peak_gb": peak,
                     "memory/backward/planned_gb": 1.4, **done})  # fmt: skip
        if step in losses:
            rows.append({"step": step, "time": 4.5 + step, "val/loss": losses[step]})
        if matches and step in matches:
            rows[-1]["val/exact_match"] = matches[step]
    write_lines(folder / "metrics.jsonl", rows)
    config: dict[str, Any] = {
        "task": "sft",
        "seed": seed,
        "run_name": folder.name,
        "output_root": str(folder.parent),
    }
    config |= {
        "adapter": {"kind": adapter},
        "quant": {"kind": quant},
        "optim": {"lr": 0.001},
        "logger": {"group": folder.name},
    }
    config["adapter"] |= {"rank": 8} if adapter != "none" else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | more, allow_unicode=True), encoding="utf-8")
    summary = {"status": status, "exit_code": 0 if status == "finished" else 1, "best/val_loss": min(losses.values(), default=None),
               "model/params_trainable": trained, "model/base_bits_per_param": bits, "memory/peak_gb": peak}  # fmt: skip
    write_json(folder / "summary.json", summary | ({} if base is None else {"memory/base_gb": base}))
    samples = [
        Sample(step, 0, "2 + 2 =", "greedy", 0, f"{adapter} says {step}", 3, "eos").row() for step in (0, 20)
    ]
    write_lines(folder / "samples.jsonl", samples)
    return folder


def groups_of(entries: list[Entry]) -> list[Group]:
    return grouped(read_result(entry) for entry in entries)


def page_of(entries: list[Entry], **options: Any) -> Page:
    return Page(render(entries, title="a sweep", **options))
