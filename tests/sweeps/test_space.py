"""Hydra's grammar as distributions, and values of them as overrides again."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from lmlab.config.compose import CONF
from lmlab.records import UserError
from lmlab.sweeps.space import parse_space

optuna = pytest.importorskip("optuna", reason="pip install 'lmlab[optuna]'")
Categorical = optuna.distributions.CategoricalDistribution
Float = optuna.distributions.FloatDistribution
Int = optuna.distributions.IntDistribution

GRAMMAR: dict[str, Any] = {
    "interval(0, 1)": Float(0, 1),
    "interval(1e-4, 1e-2)": Float(1e-4, 1e-2),
    "tag(log, interval(1e-4, 1e-2))": Float(1e-4, 1e-2, log=True),
    "int(interval(4, 32))": Int(4, 32),
    "tag(int, interval(4, 32))": Int(4, 32),
    "tag(log, int(interval(4, 32)))": Int(4, 32, log=True),
    "tag(log, int, interval(4, 32))": Int(4, 32, log=True),
    "range(3)": Int(0, 2),
    "range(1, 4)": Int(1, 3),
    "range(4, 16, step=4)": Int(4, 12, step=4),
    "range(4, 17, 4)": Int(4, 16, step=4),
    "range(5, 0, -2)": Int(1, 5, step=2),
    "range(7, 8)": Int(7, 7),
    "tag(log, range(1, 9))": Int(1, 8, log=True),
    "range(0.1, 0.5, 0.1)": Float(0.1, 0.4, step=0.1),
    "range(0, 1, 0.25)": Float(0, 0.75, step=0.25),
    "float(range(1, 4))": Float(1, 3, step=1),
    "shuffle(range(1, 4))": Int(1, 3),
    "choice(4,8,16)": Categorical([4, 8, 16]),
    "4,8": Categorical([4, 8]),
    "choice(lora,'b c',true,1.5)": Categorical(["lora", "b c", True, 1.5]),
    "lora,null": Categorical(["lora", None]),  # Hydra's choice() takes no null
    "choice([q_proj,v_proj],all-linear)": Categorical(["[q_proj,v_proj]", "all-linear"]),
    "choice(1,true,1.0)": Categorical(["1", "True", "1.0"]),
    "choice(4,4,8)": Categorical([4, 8]),
    "sort(choice(8,4))": Categorical([4, 8]),
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_every_form_of_the_grammar(text: str) -> None:
    assert parse_space([f"a.b={text}"]).distributions == {"a.b": GRAMMAR[text]}


@pytest.mark.parametrize("text", GRAMMAR)
def test_what_is_drawn_is_typed_so_that_hydra_reads_the_same(text: str) -> None:
    space = parse_space([f"++a.b={text}", "c=1"])
    (axis,) = space.axes
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(10):
        value = axis.suggest(study.ask())
        typed, rest = space.overrides({"a.b": value})
        assert rest == "c=1"
        assert typed.startswith("++a.b=")
        read = OverridesParser.create().parse_override(typed)
        assert not read.is_sweep_override()
        if isinstance(value, float) and getattr(axis.distribution, "step", None) is not None:
            assert read.value() == pytest.approx(value)
            assert len(typed) < len("++a.b=0.12345"), "no digits of binary fractions"
        elif isinstance(GRAMMAR[text], Categorical) and axis.texts == GRAMMAR[text].choices:
            assert typed == f"++a.b={value}"
        elif value == "[q_proj,v_proj]":
            assert read.value() == ["q_proj", "v_proj"]
        else:
            assert read.value() == value
            assert type(read.value()) is type(value)


def test_glob_asks_hydra_for_the_options() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        (axis,) = parse_space(["adapter=glob(*lora)"], loader).axes
    assert axis.distribution == Categorical(["lora", "qlora"])


def test_a_grid_has_every_combination_in_hydras_order() -> None:
    space = parse_space(["a=choice(x,y)", "fixed=1", "b=range(0.1,0.4,0.1)", "c=range(2,6,2)"])
    expected = [(a, b, c) for a in "xy" for b in (0.1, 0.2, 0.3) for c in (2, 4)]
    assert space.grid() == expected


def test_the_first_point() -> None:
    space = parse_space(["a=choice(x,y)", "~b", "c=interval(1,2)", "d=range(3,0,-1)"])
    assert space.first() == ["a=x", "~b", "c=1.0", "d=1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tag(lgo, interval(1,2))", "did you mean 'log'"),
        ("tag(log, choice(1,2))", "a list has no tags"),
        ("tag(int, range(1,2))", "one of log"),
        ("tag(log, interval(0,1))", "begin above 0"),
        ("tag(log, interval(-1,1))", "begin above 0"),
        ("interval(2,1)", r"write interval\(1"),
        ("range(3,3)", "its end is left out"),
        ("tag(log, range(1,9,2))", "use tag"),
        ("tag(log, range(0,9))", "use tag"),
        ("tag(log, range(0.5,9))", "use tag"),
    ],
)
def test_what_no_distribution_can_be_made_of(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_space([f"a.b={text}"])
    assert caught.value.where == "a.b"


def test_one_key_twice() -> None:
    with pytest.raises(UserError, match="searched twice"):
        parse_space(["a=1,2", "+a=interval(1,2)"])


@pytest.mark.parametrize("text", ["interval(1,2)", "int(interval(1,2))", "tag(log,range(1,9))"])
def test_a_grid_of_endless_values(text: str) -> None:
    space = parse_space([f"a={text}"])
    if text.startswith("int("):
        assert space.grid() == [(1,), (2,)]
        return
    with pytest.raises(UserError, match="sampler=grid"):
        space.grid()
