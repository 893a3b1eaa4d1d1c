"""Every pair of options of all config groups at least once: each point trains two steps or is refused in one line.

Large models compose and are planned only; the hub and a GPU are not here, so their points end as a user's would: exit
code 2 and what to do.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab.config.compose import CONF, report_error, to_run_config
from lmlab.records import UserError

TINY = CONF.parent / "assets" / "tiny-base"
LARGE = ("gpt2_124m", "llama_30m")
NONE = ""
SHORT = (
    "trainer.max_steps=2",
    "trainer.max_epochs=null",
    "trainer.val_every_n_steps=2",
    "trainer.batch_size=2",
    "trainer.accumulate_grad_batches=1",
    "trainer.val_batch_size=8",
    "trainer.memory_plan=false",
    "data.max_length=48",
    "optim.warmup_steps=1",
    "samples.prompts=1",
    "samples.grid=[greedy]",
    "sampler.max_new_tokens=4",
    "samplers.greedy.max_new_tokens=4",
)


def options() -> dict[str, list[str]]:
    """Group -> its options, as they lie in conf/; for all names on the hub `model=pretrained` and `data=hub` stand."""
    groups = {
        folder.name: sorted(file.stem for file in folder.glob("[!_]*.yaml") if not names_on_the_hub(file))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "sweep"  # its files are W&B's
    }
    found = {name: names for name, names in groups.items() if names}
    for name in ("experiment", "debug"):
        found[name] = [NONE, *found[name]]
    return found


def names_on_the_hub(file: Path) -> bool:
    """Whether an option is ``pretrained`` or ``hub`` with a name filled in; tests/config/test_presets.py has those."""
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return not {"pretrained", "hub"}.isdisjoint(each for each in defaults if isinstance(each, str))


def covering_array(groups: dict[str, list[str]], *, seed: int = 0) -> list[dict[str, str]]:
    """Points that hold every pair of options of two groups; greedy, the same for the same groups."""
    draw = random.Random(seed)
    names = list(groups)
    open_pairs = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in groups[a] for y in groups[b]
    }
    points = []
    while open_pairs:
        best: tuple[int, dict[str, str]] = (-1, {})
        for _ in range(12):
            point = dict(draw.choice(sorted(open_pairs)))
            for name in draw.sample(names, len(names)):
                if name in point:
                    continue
                point[name] = max(
                    draw.sample(groups[name], len(groups[name])),
                    key=lambda option: sum(
                        pair_of(groups, (name, option), other) in open_pairs for other in point.items()
                    ),
                )
            covered = sum(
                pair_of(groups, a, b) in open_pairs for a, b in itertools.combinations(point.items(), 2)
            )
            best = max(best, (covered, point), key=lambda each: each[0])
        point = best[1]
        open_pairs -= {pair_of(groups, a, b) for a, b in itertools.combinations(point.items(), 2)}
        points.append({name: point[name] for name in names})
    return points


def pair_of(groups: dict[str, list[str]], one: tuple[str, str], other: tuple[str, str]) -> Any:
    """The pair in the order of the groups."""
    order = list(groups)
    return (one, other) if order.index(one[0]) < order.index(other[0]) else (other, one)


POINTS = covering_array(options())


def test_every_pair_is_in_it() -> None:
    groups = options()
    for a, b in itertools.combinations(groups, 2):
        wanted = set(itertools.product(groups[a], groups[b]))
        assert wanted <= {(point[a], point[b]) for point in POINTS}, (a, b)
    assert len(POINTS) < 3 * max(len(x) * len(y) for x, y in itertools.combinations(groups.values(), 2))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small data of every kind."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.txt").write_text("\n\n".join(f"This is paragraph {i} of a text." for i in range(400)))
    return {"jsonl": folder / "rows.jsonl", "text": folder / "text.txt"}


def overrides_of(point: dict[str, str], files: dict[str, Path], root: Path) -> list[str]:
    told = [f"{group}={option}" for group, option in point.items() if option != NONE]
    if point["data"] in files:
        told.append(f"data.path={files[point['data']]}")
    if point["data"] == "skills":
        told.append("data.num_records=60")
    if point["logger"] == "wandb":
        told.append("logger.mode=offline")
    if point["trainer"] == "ddp":
        told.append("trainer.devices=1")  # real ranks are tested in test_processes
    if point["tokenizer"] == "file":
        told.append(f"tokenizer.path={TINY}")
    if point["model"] == "pretrained":
        told.append(f"model.name_or_path={TINY}")
    if point["tokenizer"] == "bpe":
        told.append("tokenizer.vocab_size=300")
    told += SHORT
    if point["tokenizer"] in (
        "chars",
        "bpe",
        "file",
    ):  # up to four times as many tokens: Alpaca's words would leave no room
        told.append("data.template=brief")
    if point["model"] == "char_relu2":  # whose context is 64
        told.append("samples.prompts=0")
    return [*told, "run_name=run", f"output_root={root}", "trainer.compile=false"]


def mended(point: dict[str, str]) -> dict[str, str]:
    """The point with what cannot go together, or cannot be had here, replaced by what can: it has to train."""
    new = dict(point)
    if new["model"] in ("pretrained", "tiny"):
        new["tokenizer"] = "from_model"
    elif new["tokenizer"] == "from_model":
        new["tokenizer"] = "bpe"
    if new["model"] in LARGE and new["tokenizer"] == "chars":
        new["tokenizer"] = "bpe"  # a plan has to know the vocabulary
    if new["adapter"] == "none":
        new["quant"] = "none"
    elif new["adapter"] == "qlora" and new["quant"] not in ("nf4", "fp4"):
        new["quant"] = "nf4"
    if new["data"] in ("hub", "mix", "shards"):
        new["data"] = "jsonl"
    if new["data"] == "text":
        new["task"] = "pretrain"
    if new["trainer"] in ("gpu", "fsdp"):  # sharding takes two ranks, which have tests of their own
        new["trainer"] = "cpu"
    if new["callbacks"] == "harness":  # which wants a task; tests/evaluation has one
        new["callbacks"] = "none"
    new["hparams_search"] = "none"  # a search is a multirun
    new["experiment"] = NONE  # its own choices are for its own model and optimizer
    return new


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(POINTS)))
def test_a_point_trains_once_it_is_mended(
    index: int, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = outcome(mended(POINTS[index]), files, tmp_path, capfd)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(POINTS)))
def test_a_point_trains_or_is_refused_in_one_line(
    index: int, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = outcome(POINTS[index], files, tmp_path, capfd)
    assert code == 0 or "error: " in said


def outcome(
    point: dict[str, str], files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The exit code of that run and what it said on stderr, in the form that every run must keep to."""
    from hydra import compose, initialize_config_dir

    from lmlab.start import start

    told = overrides_of(point, files, tmp_path)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", overrides=told)
        if point["model"] in LARGE:
            code = planned(to_run_config(composed))
        else:
            code = start(composed, told)
    except UserError as error:
        code = report_error(error)
    said = capfd.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    if code == 2:
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    else:
        assert "error:" not in said
    return code, said


def planned(config: Any) -> int:
    from lmlab.models.plan import plan
    from lmlab.planning import device_and_precision, model_config, planned_run, workload_of_config

    device_type, precision = device_and_precision(config)
    hf_config = model_config(config)
    workload = workload_of_config(config, hf_config)
    run = planned_run(config, hf_config, workload, device_type=device_type, precision=precision)
    assert plan(run).total_gb > 0
    return 0
