"""Samplers by name, the keys that all of them have, and configs frozen before those keys existed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab.config.compose import CONF, dump_yaml, load_frozen
from lmlab.config.named import named_sampler, sampler_names
from lmlab.generation.samplers import load_sampler
from lmlab.records import UserError

from .conftest import CommandLine, Compose

COMMON = list(yaml.safe_load((CONF / "sampler" / "_constraints.yaml").read_text(encoding="utf-8")))


def test_a_name_means_what_it_means_on_the_command_line(run_config: Compose) -> None:
    config = run_config("sampler=top_k")
    assert {name: named_sampler(name) for name in sampler_names()} == config.samplers
    assert named_sampler("top_k") == config.sampler


def test_overrides_are_checked_like_any_value() -> None:
    sampler = named_sampler("top_p", {"top_p": 0.5, "repetition_penalty": 1.1, "stop": ["\n"]})
    assert sampler.model_dump() == {**named_sampler("top_p").model_dump(), "top_p": 0.5} | {
        "repetition_penalty": 1.1,
        "stop": ["\n"],
    }


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        (
            "topp",
            {},
            r"unknown sampler 'topp' \(sampler\): did you mean 'top_p'\? one of combined, greedy, min_p",
        ),
        ("../adapter/qlora", {}, "unknown sampler '../adapter/qlora'"),
        ("_constraints", {}, "unknown sampler '_constraints'"),
        ("greedy", {"top_k": 3}, "greedy has no top_k"),
        ("top_p", {"top_p": 2.0}, r"top_p=2.0 is not allowed \(sampler top_p\): Input should be less than"),
        ("greedy", {"repetition_penalty": 0.0}, "Input should be greater than 0"),
    ],
)
def test_what_is_wrong_with_a_name_or_an_override_is_said(
    name: str, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        named_sampler(name, overrides)


def test_common_keys_stand_everywhere_and_need_no_plus(run_config: Compose, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object"}), encoding="utf-8")
    assert COMMON == [
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words",
        "begins_with",
        "stop",
        "json_schema",
    ]
    for place in ("sampler", "samplers.combined"):
        config = run_config(
            *(f"{place}.repetition_penalty=1.2", f"{place}.bad_words=[one,' two']", f"{place}.stop=['\n']"),
            *(f"{place}.begins_with='Yes, '", f"{place}.json_schema={schema}"),
        )
        sampler = config.sampler if place == "sampler" else config.samplers["combined"]
        assert (sampler.repetition_penalty, sampler.bad_words, sampler.stop) == (1.2, ["one", " two"], ["\n"])
        assert (sampler.begins_with, sampler.json_schema) == ("Yes, ", {"type": "object"})
    assert run_config("sampler.no_repeat_ngram_size=3").sampler.no_repeat_ngram_size == 3
    written = run_config("sampler.json_schema={type: integer, minimum: 0}").sampler.json_schema
    assert written == {"type": "integer", "minimum": 0}


def test_a_frozen_config_holds_the_schema_itself(run_config: Compose, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["yes", "no"]}), encoding="utf-8")
    config = run_config(f"sampler.json_schema={schema}")
    schema.unlink()
    frozen = tmp_path / "config.yaml"
    frozen.write_text(dump_yaml(config), encoding="utf-8")
    assert load_frozen(frozen) == config


def test_what_was_frozen_before_these_keys_existed_still_loads(run_config: Compose, tmp_path: Path) -> None:
    config = run_config()
    values = yaml.safe_load(dump_yaml(config))
    for sampler in (values["sampler"], *values["samplers"].values()):
        for key in COMMON:
            del sampler[key]
    frozen = tmp_path / "config.yaml"
    frozen.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_frozen(frozen) == config
    assert load_sampler(values["sampler"]) == config.sampler


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["sampler.json_schema=nowhere.json"],
            "'nowhere.json' is not allowed (sampler.json_schema): give a JSON schema, or the path",
        ),
        (["samplers.top_p.json_schema={type: objekt}"], "(samplers.top_p.json_schema): give a JSON schema"),
        (["sampler.stop='.'"], "(sampler.stop): must be a valid list"),
        (["sampler.bad_words=[1]"], "(sampler.bad_words.0): must be a valid string"),
        (["sampler.repetition_penalti=2"], "did you mean 'sampler.repetition_penalty'?"),
        (
            ["sampler.no_repeat_ngram_size=2", "sampler.json_schema={type: object}"],
            "no_repeat_ngram_size=0 with",
        ),
    ],
)
def test_errors_of_the_common_keys_are_one_line(
    command_line: CommandLine, arguments: list[str], said: str
) -> None:
    code, _, err = command_line(*arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
