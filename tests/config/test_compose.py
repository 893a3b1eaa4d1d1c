"""What the YAMLs compose to: every option of every group, the defaults, who beats whom, and the frozen copy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lmlab.config.compose import CONF, dump_yaml, fingerprint, load_frozen, to_run_config
from lmlab.plugged import samplers_of
from lmlab.records import RefusedError, UserError
from lmlab.registry import data_sources

from .conftest import Compose

OPTIONS = sorted(
    f"{file.parent.name}={file.stem}"
    for file in CONF.glob("*/[!_]*.yaml")
    if file.parent.name not in ("hydra", "sweep")  # the files of sweep are W&B's
)

PROMISED_TEXT = """
    task=pretrain run_name=a seed=7 output_root=elsewhere resume=auto overwrite=false plugins=[]
    model.gradient_checkpointing=true tokenizer.vocab_size=999
    data.path=elsewhere.txt data.format=text data.template=alpaca data.columns.text=body data.max_length=64
    data.packing=true data.val_fraction=0.25 data.test_fraction=0.1 data.cross_document_attention=false
    data.chat_template=chatml data.too_long=drop data.on_bad_record=skip
    trainer.max_steps=null trainer.max_epochs=2 trainer.batch_size=3 trainer.accumulate_grad_batches=4
    trainer.accelerator=cpu trainer.devices=2 trainer.num_nodes=2 trainer.strategy=ddp trainer.precision=bf16
    trainer.gradient_clip_val=0.5 trainer.val_every_n_steps=11 trainer.log_every_n_steps=12 trainer.compile=false
    trainer.on_nonfinite=skip trainer.max_nonfinite_steps=3 trainer.auto_batch=true checkpoint.on_error=raise
    adapter.rank=5 adapter.alpha=6 adapter.dropout=0.1 adapter.target_modules=[q_proj] quant.double_quant=false
    optim.name=paged_adamw8bit optim.lr=0.5 optim.weight_decay=0.125 optim.warmup_steps=13 optim.schedule=linear
    sampler.temperature=0.5 sampler.top_p=0.25 sampler.max_new_tokens=14
    samples.every_n_steps=15 samples.prompts=2 samples.grid=[top_k] checkpoint.every_n_steps=16 checkpoint.keep=2
    logger.mode=offline logger.project=p logger.group=g launcher.jobs=2
"""
PROMISED = PROMISED_TEXT.split()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_validates(composed: Compose, option: str) -> None:
    group, name = option.split("=")
    needed = {
        "tokenizer=bpe": ["model=llama_tiny"],
        "tokenizer=chars": ["model=llama_tiny"],
        "experiment=nodes_64": ["data.path=given"],  # its tokenizer is that of the data
    }
    values = composed(option, *needed.get(option, []))
    for key in OmegaConf.missing_keys(values):
        listed = [{"path": "given.jsonl", "weight": 1}]
        OmegaConf.update(values, key, listed if key == "data.sources" else "given")
    config = to_run_config(values)
    chosen: Any = getattr(config, group, None)
    if hasattr(chosen, "kind") and group not in ("model", "data"):
        assert chosen.kind == name
    if group == "data":
        assert chosen.kind == (name if name in data_sources.names() else "hub"), "else a preset of the hub"
    if group in ("callbacks", "metrics"):
        assert sorted(chosen) == ([] if name == "none" else [name])
    if group == "task":
        assert config.task == name


def test_there_are_the_options_the_design_names() -> None:
    promised = """task=sft task=pretrain model=tiny model=llama_tiny model=llama_30m model=gpt2_tiny model=gpt2_124m
        model=pretrained data=python_help data=skills data=text data=jsonl data=hub tokenizer=from_model tokenizer=bpe
        tokenizer=file adapter=none adapter=lora adapter=qlora quant=none quant=fp16 quant=bf16 quant=int8 quant=nf4
        quant=fp4 sampler=greedy sampler=temperature sampler=top_k sampler=top_p sampler=top_p_temperature"""
    assert set(promised.split()) <= set(OPTIONS)


def test_defaults_of_a_plain_start(run_config: Compose) -> None:
    config = run_config()
    assert (config.task, config.model.name_or_path, config.data.kind) == (
        "sft",
        "lmlab:tiny-base",
        "python_help",
    )
    assert (config.tokenizer.kind, config.adapter.kind, config.quant.kind) == ("from_model", "lora", "none")
    assert (config.sampler.kind, config.trainer.max_steps, config.output_root) == ("greedy", 200, "outputs")
    assert config.samples.grid == ["greedy", "top_p_temperature"]
    named = "greedy temperature top_k top_p top_p_temperature min_p typical combined"
    assert set(config.samplers) == set(named.split())
    assert all(sampler.kind == name for name, sampler in config.samplers.items())
    assert config.trainer.precision == "auto"
    assert [step for step in range(1, 131) if config.trainer.log_due(step)] == [*range(1, 101), 110, 120, 130]


def test_defaults_of_pretraining(run_config: Compose) -> None:
    config = run_config("task=pretrain")
    assert (config.task, config.model.name, config.data.kind) == ("pretrain", "llama_tiny", "python_help")
    assert (config.tokenizer.kind, config.adapter.kind, config.quant.kind) == ("bpe", "none", "none")
    assert config.data.format_for("pretrain") == "text"


def test_output_root_comes_from_the_environment(run_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMLAB_OUTPUT_ROOT", "/somewhere/else")
    assert run_config().output_root == "/somewhere/else"
    assert run_config("output_root=here").output_root == "here"


@pytest.mark.parametrize(
    ("overrides", "quant"),
    [
        (["adapter=qlora"], "nf4"),
        (["adapter=qlora", "quant=fp4"], "fp4"),
        (["quant=fp4", "adapter=qlora"], "fp4"),
        (["adapter=lora", "quant=int8"], "int8"),
    ],
)
def test_an_option_chooses_and_the_command_line_wins(
    run_config: Compose, overrides: list[str], quant: str
) -> None:
    assert run_config(*overrides).quant.kind == quant


def test_command_line_beats_the_tasks_choices(run_config: Compose) -> None:
    config = run_config("task=pretrain", "model=gpt2_tiny", "tokenizer=file", "tokenizer.path=x")
    assert (config.model.name, config.tokenizer.kind) == ("gpt2_tiny", "file")
    assert run_config("task=pretrain", "model=tiny").tokenizer.kind == "from_model"
    assert list(run_config("data=skills").metrics) == ["exact_match"]
    assert run_config("data=skills", "metrics=none").metrics == {}


def test_experiment_beats_task_and_debug_beats_experiment(run_config: Compose, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /task: pretrain\n  - override /model: gpt2_tiny\n  - override /adapter: lora\n"
        "trainer: {max_steps: 7, batch_size: 5}\n",
        encoding="utf-8",
    )
    config = run_config("experiment=mine", config_dir=tmp_path)
    assert (config.task, config.model.name, config.adapter.kind) == ("pretrain", "gpt2_tiny", "lora")
    assert (config.trainer.max_steps, config.trainer.batch_size) == (7, 5)
    told = run_config("experiment=mine", "trainer.max_steps=9", "model=llama_tiny", config_dir=tmp_path)
    assert (told.trainer.max_steps, told.trainer.batch_size, told.model.name) == (9, 5, "llama_tiny")
    debug = run_config("experiment=mine", "debug=fdr", config_dir=tmp_path)
    assert (debug.trainer.max_steps, debug.trainer.batch_size) == (1, 5)


def test_every_promised_key_stands_in_a_yaml(composed: Compose) -> None:
    # No `+`: Hydra itself refuses a key that does not stand there.
    config = composed("data=text", "adapter=qlora", "sampler=top_p_temperature", *PROMISED)
    for override in PROMISED:
        key, _, value = override.partition("=")
        assert OmegaConf.select(config, key) == yaml.safe_load(value), key
    assert to_run_config(config).trainer.max_epochs == 2
    assert composed("sampler=top_k", "sampler.top_k=3").sampler.top_k == 3
    assert composed("model.name_or_path=x").model.name_or_path == "x"


def test_compiled_layers_do_not_recompute_over_a_quantized_base(run_config: Compose) -> None:
    asked = ["adapter=qlora", "trainer.compile=true"]
    assert run_config(*asked).trainer.compile
    with pytest.raises(
        UserError, match=r"does not recompute.*\(trainer.compile\): switch one of the two off"
    ):
        run_config(*asked, "model.gradient_checkpointing=true")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["task=pretrain", "tokenizer.vocab_size=300", "trainer.max_steps=null", "trainer.max_epochs=0.5"],
        ["adapter=qlora", "data=skills", "callbacks=early_stopping", "optim.lr=1e-9", "run_name='1e5'"],
        ["data=text", "data.path='ä b/ü.txt'", "samples.prompts=['yes','1','a: b','  x\\n','äß','null']"],
        ["optim=sgd", "adapter.target_modules=[q_proj,v_proj]", "model.revision=0123456789"],
    ],
)
def test_the_frozen_copy_gives_an_equal_object(
    run_config: Compose, tmp_path: Path, overrides: list[str]
) -> None:
    config = run_config(*overrides)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_frozen(file) == config
    assert fingerprint(load_frozen(file)) == fingerprint(config)
    assert dump_yaml(load_frozen(file)) == file.read_text(encoding="utf-8")


def test_equal_configs_are_equal_and_different_ones_are_not(run_config: Compose) -> None:
    assert run_config() == run_config()
    assert run_config() != run_config("seed=2")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run_name=other", True),
        ("output_root=other", True),
        ("logger.mode=disabled", True),
        ("launcher.jobs=3", True),
        ("hparams_search=optuna", True),
        ("seed=2", False),
        ("optim.lr=0.5", False),
        ("adapter.rank=3", False),
        ("trainer.max_steps=3", False),
    ],
)
def test_fingerprint_sees_what_changes_results(run_config: Compose, override: str, same: bool) -> None:
    assert (fingerprint(run_config(override)) == fingerprint(run_config())) is same


def test_a_frozen_object_cannot_be_changed(run_config: Compose) -> None:
    config: Any = run_config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 3.0


@pytest.mark.parametrize("content", [b"", b"just text\n", b"[1, 2]\n", b"a: [1\n", b"a: \xff\n", None])
def test_a_file_that_is_no_frozen_config_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    reads: list[Any] = [lambda: load_frozen(file), lambda: samplers_of(str(tmp_path), wanted=["a_plugin_s"])]
    if content is None:  # weights with the record of their run alone have no samplers of their own
        assert reads.pop()() == {}
    for read in reads:
        with pytest.raises(UserError) as caught:
            read()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "precision"), [("llama_tiny", "fp32"), ("llama_30m", "bf16")])
def test_the_width_of_the_model_decides_about_a_cpu_s_bf16(
    run_config: Compose, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    from lmlab.models import hardware
    from lmlab.planning import device_and_precision

    monkeypatch.setattr(hardware, "_has_amx", lambda: True)
    config = run_config(f"model={model}", "tokenizer=bpe", "trainer.accelerator=cpu")
    assert device_and_precision(config) == ("cpu", precision)


def test_the_ablation_has_what_its_claims_need(run_config: Compose) -> None:
    file = CONF / "experiment" / "ablate_adapters.yaml"
    swept = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]
    assert list(swept) == ["adapter", "quant", "seed"]
    assert len(swept["seed"].split(",")) >= 3, "a spread wants three seeds"
    trained = []
    for adapter in swept["adapter"].split(","):
        for quant in swept["quant"].split(","):
            with contextlib.suppress(RefusedError):  # a row of the sweep, not a failure
                config = run_config("experiment=ablate_adapters", f"adapter={adapter}", f"quant={quant}")
                trained.append((config.adapter.kind, config.quant.kind))
    assert trained == [
        ("none", "none"),
        ("lora", "none"),
        ("lora", "int8"),
        ("lora", "nf4"),
        ("qlora", "nf4"),
    ]
