"""Bad command lines: exit code 2 and one line that names the key, the value, what is allowed and what was meant."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmlab.config.compose import CONF, run_app
from lmlab.config.errors import combined, known_keys
from lmlab.config.plaintext import refuse_secrets
from lmlab.records import RefusedError, UserError

from .conftest import CommandLine, Compose

ROOT = CONF.parent
LINE = re.compile(r"error: (?P<what>.+?) \((?P<where>[^()]+)\): (?P<fix>.+)\n")

TWO = "[{metric:val/loss,direction:minimize},{metric:memory/peak_gb,direction:minimize}]"
FSDP = ("trainer.strategy=fsdp", "trainer.devices=2")

# command line -> (the key it names, what else the line must say)
BAD: dict[tuple[str, ...], tuple[str, list[str]]] = {
    # mistyped keys
    ("optim.lrr=1",): ("optim.lrr", ["unknown key", "did you mean 'optim.lr'?"]),
    ("optim.learningrate=1",): ("optim.learningrate", ["unknown key", "optim has name, lr, weight_decay"]),
    ("adaptr=none",): ("adaptr", ["unknown key", "did you mean 'adapter'?"]),
    ("+adapter.rnk=4",): ("adapter.rnk", ["unknown key", "did you mean 'adapter.rank'?"]),
    ("adapter.r=4",): ("adapter.r", ["did you mean 'adapter.rank'?"]),
    ("+foo=1",): ("foo", ["unknown key", "--help"]),
    ("+foo.bar=1",): ("foo.bar", ["unknown key", "--help"]),
    ("++data.max_lenght=3",): ("data.max_lenght", ["did you mean 'data.max_length'?"]),
    ("samplers.top_p.topp=.5",): ("samplers.top_p.topp", ["did you mean 'samplers.top_p.top_p'?"]),
    ("callbacks=early_stopping", "callbacks.early_stopping.patiens=1"): (
        "callbacks.early_stopping.patiens",
        ["did you mean 'callbacks.early_stopping.patience'?"],
    ),
    ("metrics=exact_match", "metrics.exact_match.max_example=1"): (
        "metrics.exact_match.max_example",
        ["did you mean 'metrics.exact_match.max_examples'?"],
    ),
    ("data.columns.txt=body",): ("data.columns.txt", ["did you mean 'data.columns.text'?"]),
    ("model=llama_tiny", "model.config.hiden_size=64"): (
        "model.config.hiden_size",
        ["did you mean 'model.config.hidden_size'?"],
    ),
    ("~nope",): ("nope", ["unknown key"]),
    ("sweep=ddp",): ("sweep", ["are for W&B", "wandb sweep conf/sweep/ddp.yaml"]),
    ("++hydra.x=1",): ("hydra.x", ["unknown key", "--cfg hydra"]),
    ("hydra.job.nam=x",): ("hydra.job.nam", ["unknown key"]),
    ("hydra.sweeper.x=1",): ("hydra.sweeper.x", ["unknown key"]),
    # a key of another group, or of another option
    ("lr=3",): ("lr", ["did you mean 'optim.lr'?"]),
    ("max_steps=3",): ("max_steps", ["did you mean 'trainer.max_steps'?"]),
    ("optimizer.lr=3",): ("optimizer.lr", ["did you mean 'optim.lr'?"]),
    ("adapter.lr=3",): ("adapter.lr", ["did you mean 'optim.lr'?"]),
    ("model.max_length=3",): ("model.max_length", ["did you mean 'data.max_length'?"]),
    ("sampler.temperature=.5",): (
        "sampler.temperature",
        ["sampler=greedy has no temperature", "sampler=temperature or sampler=top_k"],
    ),
    ("samplers.top_p.temperature=.5",): ("samplers.top_p.temperature", ["kind top_p has no temperature"]),
    ("adapter=none", "adapter.rank=3"): ("adapter.rank", ["adapter=none has no rank", "adapter=lora"]),
    ("tokenizer.vocab_size=9",): ("tokenizer.vocab_size", ["tokenizer=bpe has it"]),
    # mistyped options
    ("adapter=qlra",): ("adapter", ["no option 'qlra'", "did you mean 'qlora'?", "lora, none, qlora"]),
    ("quant=nf5",): ("quant", ["no option 'nf5'", "did you mean 'nf4'?"]),
    ("data=texts",): (
        "data",
        ["did you mean 'text'? one of alpaca, c4,", " text, tinystories,"],
    ),
    ("experiment=nosuch",): ("experiment", ["no option 'nosuch'", "tiny_base"]),
    ("optim.name=adamm",): ("optim.name", ["'adamm'", "did you mean 'adamw'?", "sgd"]),
    ("adapter.kind=lorra",): ("adapter.kind", ["'lorra'", "did you mean 'lora'?"]),
    ("adapter=",): ("adapter", ["no option ''"]),
    ("trainer=3",): ("trainer", ["no option '3'", "cpu, ddp, default, fsdp, gpu"]),
    ("trainer=null",): ("trainer", ["no option 'null'"]),
    ("hydra/sweeper=foo",): ("hydra/sweeper", ["no option 'foo'"]),
    # wrong types and ranges
    ("optim.lr=abc",): ("optim.lr", ["'abc'", "must be a valid number"]),
    ("optim.lr=nan",): ("optim.lr", ["nan", "finite"]),
    ("optim.lr=inf",): ("optim.lr", ["inf", "finite"]),
    ("optim.lr=-1",): ("optim.lr", ["-1", "greater than 0"]),
    ("optim.lr.x=3",): ("optim.lr", ["{'x': 3}", "must be a valid number"]),
    ("trainer.max_steps=1.5",): ("trainer.max_steps", ["1.5", "must be a valid integer"]),
    ("trainer.batch_size=0",): ("trainer.batch_size", ["0 is", "greater than or equal to 1"]),
    ("trainer.compile=yes",): ("trainer.compile", ["'yes'", "true or false"]),
    ("trainer.precision=8",): ("trainer.precision", ["8", "one of auto, fp32, bf16, fp16"]),
    ("trainer.strategy=dpp",): ("trainer.strategy", ["did you mean 'ddp'?"]),
    ("optim.betas=[1]",): ("optim.betas", ["[1]", "must have at least 2 items"]),
    ("adapter.target_modules=3",): ("adapter.target_modules", ["3", "string", "list"]),
    ("data.val_fraction=1",): ("data.val_fraction", ["1", "less than 1"]),
    ("seed=abc",): ("seed", ["'abc'", "integer"]),
    ("run_name=17",): ("run_name", ["17", "quote the number"]),
    ("checkpoint=3",): ("checkpoint", ["3", "group of keys"]),
    ("plugins=foo",): ("plugins", ["'foo'", "must be a valid list"]),
    # values that are not there
    ("optim.lr=${nope}",): ("optim.lr", ["'nope' not found"]),
    ("data=text",): ("data.path", ["a value is missing", "add data.path=..."]),
    ("~adapter",): ("adapter", ["a value is missing"]),
    ("~adapter.kind",): ("adapter.kind", ["a value is missing"]),
    # grammar
    ("optim.lr=[1",): ("command line", ["cannot read 'optim.lr=[1'", "key=value"]),
    ("adapter",): ("command line", ["cannot read 'adapter'", "key=value"]),
    ("=3",): ("command line", ["'=3' has no key"]),
    ("--epochs", "3"): ("command line", ["--epochs", "key=value"]),
    ("--cfg", "foo"): ("command line", ["'foo'", "job"]),
    ("-sc", "bash"): ("--shell-completion", ["-sc install=bash"]),
    ("--config-dir", "no-such-folder"): ("command line", ["no-such-folder"]),
    ("optim.lr=1,2",): ("optim.lr", ["optim.lr=1,2", "-m"]),
    ("+optim.lr=3",): ("optim.lr", ["without the +"]),
    ("+adapter=none",): ("adapter", ["without the +"]),
    # rules over several keys
    ("trainer.max_epochs=1",): ("trainer", ["max_steps=200", "max_epochs=1.0", "null"]),
    ("trainer.max_steps=null",): ("trainer", ["max_steps=None", "max_epochs=None"]),
    ("adapter=none", "quant=nf4"): ("quant", ["adapter=none with quant=nf4", "adapter=qlora quant=nf4"]),
    ("adapter=none", "quant=int8"): ("quant", ["adapter=none with quant=int8", "adapter=lora quant=int8"]),
    ("adapter=none", "quant=bf16", "trainer=cpu"): ("quant", ["trainer.precision=bf16"]),
    ("adapter=qlora", "quant=none"): ("quant", ["adapter=qlora over quant=none", "quant=nf4"]),
    ("adapter=qlora", "quant=int8"): ("quant", ["adapter=qlora over quant=int8", "quant=fp4"]),
    ("adapter=qlora", "quant=fp16"): ("quant", ["adapter=qlora over quant=fp16", "adapter=lora"]),
    ("model=llama_tiny", "tokenizer=from_model"): ("tokenizer", ["tokenizer=bpe"]),
    ("tokenizer=bpe",): ("tokenizer", ["tokenizer=from_model"]),
    ("trainer=cpu", "trainer.precision=fp16"): ("trainer.precision", ["fp16", "bf16"]),
    (*FSDP, "adapter=qlora"): ("trainer.strategy", ["fsdp over quant=nf4", "quant=bf16"]),
    (*FSDP, "quant=int8"): ("trainer.strategy", ["fsdp over quant=int8"]),
    FSDP[:1]: ("trainer.strategy", ["on one device", "trainer.devices=2"]),
    (*FSDP, "trainer.compile=true"): ("trainer.compile", ["fsdp with trainer.compile=true"]),
    (*FSDP, "optim.name=adamw8bit"): ("optim.name", ["fsdp with optim.name=adamw8bit", "adamw or sgd"]),
    (*FSDP, "tokenizer.added_tokens=[x]"): ("tokenizer.added_tokens", ["fsdp", "adapter=none"]),
    ("resume=auto", "overwrite=true", "run_name=x"): ("overwrite", ["resume=auto"]),
    ("samples.grid=[greedy,topp]",): ("samples.grid", ["'topp'", "did you mean 'top_p'?"]),
    ("plugins=[no_such_plugin]",): ("plugins", ["'no_such_plugin'", "PYTHONPATH"]),
    # in a multirun, before any job
    ("-m", "adapter=qlra,lora"): ("adapter", ["did you mean 'qlora'?"]),
    ("-m", "optim.lrr=1,2"): ("optim.lrr", ["did you mean 'optim.lr'?"]),
    ("-m", "optim.lr=interval(0,1)"): ("optim.lr", ["choice", "range", "hparams_search=optuna"]),
    # a search
    ("optim.lr=interval(0,1)",): ("optim.lr", ["'optim.lr=interval(0,1)' is many values", "add -m"]),
    ("hparams_search=optna",): ("hparams_search", ["did you mean 'optuna'?", "none, optuna"]),
    ("hparams_search.n_trials=3",): ("hparams_search.n_trials", ["hparams_search=optuna has it"]),
    ("hparams_search=optuna", "hparams_search.sampler=tpee"): (
        "hparams_search.sampler",
        ["did you mean 'tpe'? one of tpe, random, grid, nsga2"],
    ),
    ("hparams_search=optuna", "hparams_search.pruner=medain"): (
        "hparams_search.pruner",
        ["did you mean 'median'? one of none, median, hyperband, successive_halving"],
    ),
    ("hparams_search=optuna", "hparams_search.n_trial=3"): (
        "hparams_search.n_trial",
        ["did you mean 'hparams_search.n_trials'?"],
    ),
    ("hparams_search=optuna", f"hparams_search.objectives={TWO}", "hparams_search.pruner=median"): (
        "hparams_search.pruner",
        ["2 objectives", "pruner=none"],
    ),
    ("hparams_search=optuna", "hparams_search.objectives=[{metric:val/loss,direction:less}]"): (
        "hparams_search.objectives.0.direction",
        ["'less'", "minimize, maximize"],
    ),
    ("hparams_search=optuna", "hparams_search.objectives=[]"): ("hparams_search.objectives", ["at least 1"]),
    ("-m", "hparams_search=optuna"): ("hparams_search", ["anything to search", "interval(1e-4, 1e-2)"]),
    ("-m", "hparams_search=optuna", "optim.lrr=interval(1e-4,1)"): ("optim.lrr", ["mean 'optim.lr'?"]),
    ("-m", "hparams_search=optuna", "optim.lr=interval(0,1)"): ("optim.lr", ["0.0", "greater than 0"]),
    ("-m", "hparams_search=optuna", "optim.lr=tag(lgo,interval(1e-4,1))"): ("optim.lr", ["mean 'log'?"]),
    ("-m", "hparams_search=optuna", "optim.lr=tag(log,interval(0,1))"): ("optim.lr", ["begin above 0"]),
    ("-m", "hparams_search=optuna", "hparams_search.sampler=grid", "optim.lr=interval(1e-4,1)"): (
        "optim.lr",
        ["sampler=grid needs a list of values", "range"],
    ),
    ("-m", "hparams_search=optuna", "hparams_search.n_trials=3,4", "optim.lr=interval(1e-4,1)"): (
        "hparams_search.n_trials",
        ["many searches"],
    ),
    ("-m", "hparams_search=optuna", "hparams_search.sampler=tp", "optim.lr=interval(1e-4,1)"): (
        "hparams_search.sampler",
        ["did you mean 'tpe'?"],
    ),
    ("-m", "hparams_search=optuna", "run_name=a/b", "optim.lr=interval(1e-4,1)"): ("run_name", ["'a/b'"]),
}


def only_line(result: tuple[int, str, str]) -> re.Match[str]:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    match = LINE.fullmatch(err)
    assert match, err
    assert "Error executing job" not in err
    assert "To append to your config" not in err, "Hydra's advice to add a + is wrong here"
    return match


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_a_bad_command_line_is_one_line(command_line: CommandLine, arguments: tuple[str, ...]) -> None:
    where, said = BAD[arguments]
    result = command_line(*arguments)
    assert only_line(result)["where"] == where
    for text in said:
        assert text in result[2]


@pytest.mark.parametrize(
    ("arguments", "where", "others"),
    [
        (("optim.lr=abc", "trainer.batch_size=0"), "optim.lr", ["trainer.batch_size"]),
        (("optim.lrr=1", "trainer.batch_size=0"), "optim.lrr", ["trainer.batch_size"]),
        (("optim.lrr=1", "trainr.batch_size=0", "~nope"), "nope", ["optim.lrr", "trainr.batch_size"]),
        (("adapter=qlra", "optim.lrr=1", "data=text"), "adapter", ["data.path", "optim.lrr"]),
        (("adapter=qlra", "quant=nf5"), "quant", ["adapter"]),
        (("adapter=none", "quant=nf4", "trainer.max_epochs=1"), "quant", ["trainer"]),
    ],
)
def test_all_problems_are_named(
    command_line: CommandLine, arguments: tuple[str, ...], where: str, others: list[str]
) -> None:
    result = command_line(*arguments)
    match = only_line(result)
    named = {match["where"], *result[2].rpartition("(also wrong: ")[2].rstrip(")\n").split(", ")}
    assert named == {where, *others}


def test_a_good_command_line_says_nothing(command_line: CommandLine) -> None:
    assert command_line("optim.lr=0.5", "adapter=qlora", "+hydra.job.env_set.A=b") == (0, "", "")


def test_the_refused_kind_survives_company() -> None:
    refused, other = RefusedError("a", where="x", fix="b"), UserError("c", where="y", fix="d")
    assert isinstance(combined([refused]), RefusedError)
    assert isinstance(combined([refused, RefusedError("e", where="z", fix="f")]), RefusedError)
    assert not isinstance(combined([refused, other]), RefusedError)


def test_known_keys_follow_the_registered_classes() -> None:
    keys = known_keys()
    assert keys["adapter.rank"] == ["lora", "qlora"]
    assert keys["tokenizer.vocab_size"] == ["bpe"]
    assert keys["trainer.max_steps"] == []
    assert not [key for key in keys if key.startswith(("hydra", "defaults", "experiment", "debug"))]


# --- secrets --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("logger.notes=hf_abcdefghijklmnopqrstuv", "logger.notes"),
        ("logger.tags=[a,sk-proj-abcdefghijklmnop1234]", "logger.tags[1]"),
        ("run_name=ghp_abcdefghijklmnopqrstuv", "run_name"),
        ("logger.entity='see wandb_v1_abcdefghijklmnopqrst here'", "logger.entity"),
        ("+logger.api_key=abc", "logger.api_key"),
        ("+model.config.hf_token=abc", "model.config.hf_token"),
        ("+data.columns.password=abc", "data.columns.password"),
    ],
)
def test_a_secret_is_refused_and_never_shown(command_line: CommandLine, override: str, where: str) -> None:
    result = command_line("model=llama_tiny", override)
    match = only_line(result)
    assert match["where"] == where
    assert ".env" in match["fix"]
    assert override.partition("=")[2].strip("'[]") not in result[2]


def test_a_secret_in_a_broken_setting_is_not_shown(command_line: CommandLine) -> None:
    result = command_line("logger.notes=[hf_abcdefghijklmnopqrstuv")
    only_line(result)
    assert "abcdefgh" not in result[2]


def test_what_the_environment_keeps_secret_is_refused(
    run_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", COMMIT)  # W&B's older keys look like commits
    with pytest.raises(UserError, match=r"secret.*logger\.notes") as caught:
        run_config("logger.notes=${oc.env:WANDB_API_KEY}")
    assert COMMIT not in str(caught.value)
    monkeypatch.delenv("WANDB_API_KEY")
    assert run_config(f"logger.notes={COMMIT}").logger.notes == COMMIT


@pytest.mark.parametrize(
    "schema", [{"const": "hf_abcdefghijklmnopqrstuv"}, {"required": ["hf_abcdefghijklmnopqrstuv"]}]
)
def test_a_secret_in_a_file_that_a_setting_names_is_refused(
    run_config: Compose, tmp_path: Path, schema: dict[str, Any]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    with pytest.raises(UserError, match=r"secret.*sampler\.json_schema") as caught:
        run_config(f"sampler.json_schema={file}")
    assert "abcdefgh" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"revision": COMMIT}},
        {"tokenizer": {"kind": "bpe", "vocab_size": 9, "special_tokens": ["<|endoftext|>"]}},
        {"tokenizer": {"eos_token": "</s>", "pad_token": "<pad>"}},
        {"callbacks": {"x": {"monitor": "val/loss", "tokens": "many", "keyboard": "y", "monkey": "z"}}},
        {"logger": {"api_key": "", "token": None}},
        {"data": {"path": "/data/tokenizer/hf_short/sk-short"}},
        {"x": {"num_key_value_heads": 3, "max_token": 5}},
        {"sampler": {"json_schema": {"properties": {"token": {"default": "x"}}, "default": {"token": "x"}}}},
    ],
)
def test_what_only_resembles_a_secret_passes(values: dict[str, Any]) -> None:
    before = copy.deepcopy(values)
    refuse_secrets(values)
    assert values == before


# --- real processes -------------------------------------------------------------------------------------------------


def train(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C"},
    )
    assert list(cwd.iterdir()) == []
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("optim.lrr=1",), "optim.lrr"),
        (("optim.lr=${nope}",), "optim.lr"),
        (("-m", "adapter=lora,qlora", "optim.lr=abc"), "optim.lr"),
    ],
)
def test_as_typed(tmp_path: Path, arguments: tuple[str, ...], where: str) -> None:
    assert only_line(train(*arguments, cwd=tmp_path))["where"] == where


def test_help_names_groups_keys_and_flags(tmp_path: Path) -> None:
    code, out, err = train("--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    for text in ("adapter: lora, none, qlora", "python train.py -m", "max_steps: 200", "-sc install=bash"):
        assert text in out
    assert "$" not in out.replace("${oc.env", "").replace('"$(python', ""), "a placeholder was not filled in"
    assert "_common" not in out, "not an option to choose"


def test_cfg_shows_the_composed_config(tmp_path: Path) -> None:
    code, out, err = train("--cfg", "job", "--resolve", "adapter=qlora", "run_name='ä b'", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "kind: nf4" in out
    assert "output_root: outputs" in out


@pytest.mark.parametrize("told", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_a_script_that_plans_or_checks_starts_no_sweep(command_line: CommandLine, told: str) -> None:
    code, out, line = command_line(told, "seed=1,2", sweeps=False)
    assert (code, out) == (2, "")
    assert line == "error: a sweep would train every combination (--multirun): give one value for each key\n"


def test_plan_py_refuses_a_sweep(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), "-m", "optim.lr=none,nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: a sweep would train")


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(config: object, overrides: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "outputs/run.json")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert run_app(full) == 1
    assert capsys.readouterr().err == "error: No space left on device (outputs/run.json): make room\n"
