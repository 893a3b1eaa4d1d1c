"""The same training however a global batch is cut: 1 process, 2 and 4 ranks by DDP, 2 ranks with shares; whole runs over gloo.

The ranks of one count are started once and take one prepared run after the other, as `python -m lmlab.worker` would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from lmlab.config.compose import CONF, load_frozen, to_run_config
from lmlab.journal import RunDir, read_json
from lmlab.models.build import ASSETS
from lmlab.start import create_run, plan_run
from lmlab.training.checkpoint import newest_checkpoint
from lmlab.worker import run_rank
from tests.integration.conftest import lines
from tests.training.exact import distance, on_ranks

pytestmark = pytest.mark.slow
# fp32 sums in another order over 6 steps of SGD.
RELATIVE = 1e-5
SEEN = 1e-3  # what training changed, relative to the weights: a hundred times what may differ
STEPS = 6
TOLD = (
    "data=skills",
    "data.num_records=60",
    "data.test_fraction=0.1",
    "trainer.memory_plan=false",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_n_steps=3",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "optim.schedule=constant",
    "logger=none",
)
QUIET = ("samples.prompts=0", "metrics=none", "optim=sgd", "optim.lr=0.5")
CASES = {
    f"{adapter}{'-checkpointing' if checkpointing else ''}": (
        *QUIET,
        f"adapter={adapter}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
    )
    for adapter in ("none", "lora", "qlora")
    for checkpointing in (False, True)
}
# With samples and text metrics, which all ranks must enter together where each has a share of the weights.
SHARDED = {
    adapter: (f"adapter={adapter}", "samples.prompts=2", "sampler.max_new_tokens=8", *rest)
    for adapter, rest in {"none": ("optim.lr=1e-3",), "lora": ("optim=sgd", "optim.lr=0.5")}.items()
}


def cut(ranks: int, strategy: str = "auto") -> tuple[str, ...]:
    """A global batch of 8 rows."""
    return (
        "trainer.batch_size=2",
        f"trainer.accumulate_grad_batches={4 // ranks}",
        f"trainer.devices={ranks}",
        f"trainer.strategy={strategy}",
    )


def prepare(root: Path, name: str, *overrides: str) -> RunDir:
    """A run's directory, as train.py makes it, to be started by whoever."""
    told = [f"run_name={name}", f"output_root={root}", *TOLD, *overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plan = plan_run(to_run_config(compose("train", told)), told)
    create_run(plan, told)
    plan.run.release()
    return plan.run


def train_all(paths: list[str]) -> list[int]:
    """Be a rank of each of these runs, one after the other."""
    runs = [RunDir(path) for path in paths]
    return [run_rank(run, load_frozen(run.config)) for run in runs]


def on(ranks: int, *runs: RunDir) -> None:
    paths = [str(run.path) for run in runs]
    codes = [train_all(paths)] if ranks == 1 else on_ranks(ranks, train_all, paths)
    assert codes == [[0] * len(runs)] * ranks


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    (file,) = [*run.path.glob("model/*.safetensors"), *run.path.glob("adapter/*.safetensors")]
    return load_file(file)


def logged(run: RunDir, name: str) -> list[float]:
    return [row[name] for row in lines(run.metrics) if name in row]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def by_ddp(root: Path) -> dict[tuple[int, str], RunDir]:
    runs = {
        (ranks, case): prepare(root, f"{case}-{ranks}", *told, *cut(ranks))
        for ranks in (1, 2, 4)
        for case, told in CASES.items()
    }
    for ranks in (1, 2, 4):
        on(ranks, *(run for (count, _), run in runs.items() if count == ranks))
    return runs


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ddp_against_one_process(by_ddp: dict[tuple[int, str], RunDir], case: str, ranks: int) -> None:
    one, several = by_ddp[1, case], by_ddp[ranks, case]
    assert distance(weights(one), weights(several)) < RELATIVE
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert logged(several, name) == pytest.approx(logged(one, name), rel=RELATIVE)
    assert len(logged(one, "train/loss")) == STEPS
    if case.startswith("none"):
        start = load_file(ASSETS / "tiny-base" / "model.safetensors")
        assert distance(start, weights(one)) > SEEN, "a difference would not be seen"


def test_each_rank_has_the_quantized_base(by_ddp: dict[tuple[int, str], RunDir]) -> None:
    for ranks in (1, 2, 4):
        assert read_json(by_ddp[ranks, "qlora"].summary)["model/base_bits_per_param"] < 5


def test_checkpointing_changes_nothing(by_ddp: dict[tuple[int, str], RunDir]) -> None:
    for adapter in ("none", "lora", "qlora"):
        plain, checkpointed = (weights(by_ddp[4, f"{adapter}{end}"]) for end in ("", "-checkpointing"))
        assert distance(plain, checkpointed) < RELATIVE


@pytest.fixture(scope="module")
def sharded(root: Path) -> dict[str, RunDir]:
    """Runs with shares beside those of one process, and runs that change from the one to the other after 3 steps."""
    runs: dict[str, RunDir] = {}
    for case, told in SHARDED.items():
        runs[f"{case} alone"] = prepare(root, f"{case}-alone", *told, *cut(1))
        runs[f"{case} sharded"] = prepare(root, f"{case}-sharded", *told, *cut(2, "fsdp"))
        runs[f"{case} out"] = prepare(
            root, f"{case}-out", *told, *cut(2, "fsdp"), f"trainer.max_steps={STEPS // 2}"
        )
        runs[f"{case} in"] = prepare(root, f"{case}-in", *told, *cut(1), f"trainer.max_steps={STEPS // 2}")
    on(1, *(run for name, run in runs.items() if name.endswith(("alone", "in"))))
    for case, told in SHARDED.items():
        prepare(root, f"{case}-in", *told, *cut(2, "fsdp"), "resume=auto")
    on(2, *(run for name, run in runs.items() if not name.endswith("alone")))
    for case, told in SHARDED.items():
        prepare(root, f"{case}-out", *told, *cut(1), "resume=auto")
    on(1, *(run for name, run in runs.items() if name.endswith("out")))
    return runs


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("kind", ["sharded", "in", "out"])
def test_shares_against_one_process(sharded: dict[str, RunDir], case: str, kind: str) -> None:
    """``in``: saved by one process, gone on with in shares; ``out``: the other way round."""
    one, other = sharded[f"{case} alone"], sharded[f"{case} {kind}"]
    assert weights(one).keys() == weights(other).keys()
    assert distance(weights(one), weights(other)) < RELATIVE
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/exact_match"):
        assert logged(other, name) == pytest.approx(logged(one, name), rel=RELATIVE)
    assert logged(other, "test/loss")[-1] == pytest.approx(logged(one, "test/loss")[-1], rel=RELATIVE)
    assert newest_checkpoint(other.checkpoints) == other.checkpoints / f"step-{STEPS:08d}"


@pytest.mark.parametrize("case", SHARDED)
def test_all_ranks_sample_the_same_texts_as_one_process(sharded: dict[str, RunDir], case: str) -> None:
    def texts(run: RunDir) -> list[tuple[Any, ...]]:
        return [(row["step"], row["sampler"], row["text"]) for row in lines(run.samples)]

    one, two = texts(sharded[f"{case} alone"]), texts(sharded[f"{case} sharded"])
    assert len(one) == 2 * 2 * 3
    assert one == two


def test_saved_files_are_those_of_one_process(sharded: dict[str, RunDir]) -> None:
    for case, kind in (("none", "model"), ("lora", "adapter")):
        for folder in (kind, f"best/{kind}"):
            one, two = (
                {file.name for file in (sharded[f"{case} {how}"].path / folder).iterdir()}
                for how in ("alone", "sharded")
            )
            assert one == two
    configs = [
        read_json(sharded[f"none {how}"].path / "model" / "config.json") for how in ("alone", "sharded")
    ]
    assert configs[0] == configs[1]
