"""A run's plugins come back with its weights; files of others import nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmlab import registry
from lmlab.config.named import named_sampler
from lmlab.generation.samplers import load_sampler
from lmlab.plugged import load_plugins_of, samplers_of
from lmlab.records import UserError

CODE = """
from typing import Literal
from lmlab.generation.samplers import SamplerConfig
from lmlab.registry import samplers

@samplers.register
class Odd(SamplerConfig):
    kind: Literal["odd_sampler"]
"""


@pytest.mark.parametrize("own", [True, False], ids=["a run of one's own", "files of others"])
@pytest.mark.parametrize("best", [True, False])
def test_a_run_whose_sampler_is_a_plugin_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool, best: bool
) -> None:
    package = f"outside_run_{own}_{best}".lower()
    (tmp_path / f"{package}.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry.samplers, "_classes", dict(registry.samplers._classes))
    sampler = {"kind": "odd_sampler", "max_new_tokens": 3}
    run = tmp_path / "run"
    weights = run / "best" / "adapter" if best else run / "adapter"
    weights.mkdir(parents=True)
    (run / "config.yaml").write_text(f"plugins: [{package}]", encoding="utf-8")
    about = {"sampler": sampler, "quant": {"kind": "none"}, "plugins": [package]}
    (weights / "lmlab.json").write_text(json.dumps(about), encoding="utf-8")
    if own:
        (run / "run.json").write_text("{}", encoding="utf-8")
    load_plugins_of(weights)
    if own:
        assert load_sampler(sampler).kind == "odd_sampler"
    else:
        with pytest.raises(UserError, match="unknown sampler 'odd_sampler'"):
            load_sampler(sampler)


def test_scripts_know_the_samplers_of_a_run_s_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_named.py").write_text(CODE.replace("odd_sampler", "odder"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry.samplers, "_classes", dict(registry.samplers._classes))
    run = tmp_path / "run"
    run.mkdir()
    config = {
        "plugins": ["outside_named"],
        "sampler": {"kind": "odder", "max_new_tokens": 3},
        "samplers": {"short": {"kind": "greedy", "max_new_tokens": 1}},
    }
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert samplers_of(str(run), wanted=["short"]) == {}, "no run.json: not a run of one's own"
    (run / "run.json").write_text("{}", encoding="utf-8")
    assert samplers_of(str(run), wanted=["greedy", None]) == {}, "nothing of it is needed"
    assert "odder" not in registry.samplers.names()
    found = samplers_of(str(run), wanted=["odder"])
    assert named_sampler("odder", {"max_new_tokens": 5}, also=found).max_new_tokens == 5
    assert named_sampler("short", also=found).max_new_tokens == 1
    with pytest.raises(UserError, match="did you mean 'odder'"):
        named_sampler("odderr", also=found)
