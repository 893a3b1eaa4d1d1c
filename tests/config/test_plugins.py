"""A researcher's own package with its own YAML adds to every open group, with no change to lmlab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from lmlab import registry
from lmlab.config.compose import CONF, dump_yaml, load_frozen
from lmlab.records import UserError
from lmlab.registry import Config, Functions, Registry, load_plugins

from .conftest import CommandLine, Compose

CODE = '''
from collections.abc import Iterator
from typing import Literal
from pydantic import Field
from lmlab.data.sources import DataConfig, Intake
from lmlab.evaluation.text import MetricConfig, make_exact_match
from lmlab.generation.samplers import SamplerConfig
from lmlab.models.adapters import AdapterConfig
from lmlab.records import Record
from lmlab.registry import adapters, callbacks, data_sources, metrics, samplers
from lmlab.training.options import CallbackConfig


@adapters.register
class BiasOnly(AdapterConfig):
    """Trains the biases."""

    kind: Literal["bias_only"]
    strength: float = Field(gt=0)

    def apply(self, model, *, seed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model


@data_sources.register
class Counting(DataConfig):
    """One, two, three."""

    kind: Literal["counting"]
    up_to: int = Field(ge=1)

    def content_key(self) -> str:
        return f"counting-{self.up_to}"

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        for number in range(self.up_to):
            intake.read += 1
            yield Record({"instruction": "next", "input": str(number), "output": str(number + 1)}, "counting")


@samplers.register
class Last(SamplerConfig):
    """Takes the last token."""

    kind: Literal["last"]
    eagerness: float = Field(ge=0)


@metrics.register
class Shout(MetricConfig):
    """Exact match, louder."""

    kind: Literal["shout"]

    def build(self):
        return make_exact_match()


@callbacks.register
class Bell(CallbackConfig):
    """Rings."""

    kind: Literal["bell"]
    every: int = Field(ge=1)
'''
YAML = {
    "adapter/mine.yaml": "kind: bias_only\nstrength: 0.5\n",
    "data/mine.yaml": "kind: counting\nup_to: 9\ntemplate: brief\n",
    "sampler/mine.yaml": "kind: last\neagerness: 1.0\nmax_new_tokens: 4\n",
    "metrics/mine.yaml": "mine:\n  kind: shout\n  max_examples: 3\n  max_new_tokens: 2\n",
    "callbacks/mine.yaml": "mine:\n  kind: bell\n  every: 5\n",
}
CHOSEN = ["adapter=mine", "data=mine", "sampler=mine", "metrics=mine", "callbacks=mine"]

pytestmark = pytest.mark.usefixtures("fresh_registries")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an outside package ``outside_lab``; its YAML is in ``conf``."""
    root = tmp_path / "a researcher's own"
    (root / "outside_lab").mkdir(parents=True)
    (root / "outside_lab" / "__init__.py").write_text(CODE, encoding="utf-8")
    for name, text in YAML.items():
        file = root / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(root))
    return root


def module(outside: Path, name: str, code: str) -> str:
    (outside / f"{name}.py").write_text(code, encoding="utf-8")
    return name


def test_every_open_group_takes_a_plugins_class(
    outside: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    from lmlab.config import compose

    validate = compose.to_run_config
    monkeypatch.setattr("tests.config.conftest.to_run_config", lambda c: seen.append(validate(c)) or seen[-1])
    result = command_line(
        *("--config-dir", str(outside / "conf"), "plugins=[outside_lab]", *CHOSEN),
        *("+sampler@samplers.mine=mine", "samples.grid=[greedy,mine]", "adapter.strength=0.25"),
    )
    assert result == (0, "", "")
    (config,) = seen
    assert (config.adapter.kind, config.adapter.strength) == ("bias_only", 0.25)
    assert (config.data.up_to, config.data.max_length) == (9, 512), "common keys come from lmlab"
    assert (config.sampler.eagerness, config.samplers["mine"].kind) == (1.0, "last")
    assert (config.metrics["mine"].kind, config.callbacks["mine"].every) == ("shout", 5)
    assert type(config.adapter).__module__ == "outside_lab"
    frozen = tmp_path / "config.yaml"
    frozen.write_text(dump_yaml(config), encoding="utf-8")
    assert load_frozen(frozen) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adapter=mine", "adapter.strenght=1"], "(adapter.strenght): did you mean 'adapter.strength'?"),
        (
            ["adapter=mine", "adapter.strength=0"],
            "0 is not allowed (adapter.strength): must be greater than 0",
        ),
        (
            ["adapter=mine", "adapter.rank=1"],
            "(adapter.rank): adapter=bias_only has no rank; adapter=lora or",
        ),
        (["adapter=mien"], "no option 'mien' (adapter): did you mean 'mine'? one of lora, mine, none, qlora"),
        (["callbacks=mine", "callbacks.mine.evry=1"], "did you mean 'callbacks.mine.every'?"),
        (["adapter.kind=bias_onli"], "did you mean 'bias_only'?"),
    ],
)
def test_errors_know_the_plugin(
    outside: Path, command_line: CommandLine, arguments: list[str], said: str
) -> None:
    code, _, err = command_line("--config-dir", str(outside / "conf"), "plugins=[outside_lab]", *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_without_the_plugin_its_kind_is_unknown(outside: Path, run_config: Compose) -> None:
    with pytest.raises(UserError, match=r"'bias_only' is not allowed \(adapter.kind\): one of none, lora"):
        run_config("adapter=none", "++adapter.kind=bias_only")


CLASH = """
from typing import Literal
from lmlab.models.adapters import AdapterConfig
from lmlab.registry import adapters

@adapters.register
class {name}(AdapterConfig):
    kind: Literal["{kind}"]
"""


@pytest.mark.parametrize("name", ["Lora", "MyLora"])
def test_a_taken_name_is_refused(outside: Path, run_config: Compose, name: str) -> None:
    before = registry.adapters.class_of("lora")
    plugin = module(outside, "outside_clash", CLASH.format(name=name, kind="lora"))
    with pytest.raises(UserError, match=rf"plugin 'outside_clash'.*adapter.kind=lora.*outside_clash.{name}"):
        run_config(f"plugins=[{plugin}]")
    assert registry.adapters.class_of("lora") is before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1/0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("import outside_nowhere", "No module named 'outside_nowhere'"),
        (
            CLASH.format(name="X", kind="x").replace('Literal["x"]', "str"),
            'needs a field kind: Literal["its name"]',
        ),
        (
            CLASH.format(name="X", kind="x").replace("kind:", "sort:"),
            'needs a field kind: Literal["its name"]',
        ),
    ],
)
def test_a_broken_plugin_is_one_line(outside: Path, run_config: Compose, code: str, said: str) -> None:
    module(outside, "outside_broken", code)
    with pytest.raises(UserError) as caught:
        run_config("plugins=[outside_broken]")
    assert "plugin 'outside_broken' cannot be imported" in str(caught.value)
    assert said in str(caught.value)
    assert "PYTHONPATH" not in str(caught.value), "it was found"


def test_entry_points_are_plugins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "some.package"

        def load(self) -> None:
            raise RuntimeError("out of order")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "lmlab.plugins" else [])
    with pytest.raises(UserError, match=r"some\.package.*out of order"):
        load_plugins([])


def test_a_reload_of_the_same_class_is_no_clash() -> None:
    def define() -> type[Config]:
        class Same(Config):
            kind: Literal["same"]

        return Same

    fruits = Registry("fruit")
    first, second = fruits.register(define()), fruits.register(define())
    assert first is not second
    assert fruits.class_of("same") is second


def test_functions_of_one_name_clash_too() -> None:
    colours: Functions[Any] = Functions("colour")
    colours.register("red")(len)
    with pytest.raises(ValueError, match="colour=red is registered twice"):
        colours.register("red")(max)
    assert colours.get("red") is len
    with pytest.raises(UserError, match="did you mean 'red'"):
        colours.get("rad")


def test_as_typed(outside: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(CONF.parent / "train.py"), "--config-dir", str(outside / "conf")),
            *("plugins=[outside_lab]", "adapter=mine", "--cfg", "job"),
        ],
        cwd=outside,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(outside)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "adapter:\n  kind: bias_only\n  strength: 0.5\n" in done.stdout
