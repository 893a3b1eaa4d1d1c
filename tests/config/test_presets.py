"""Presets of published models: composed, of the published number of parameters, and the experiments made of them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmlab.models.sharded_plan import run_groups
from lmlab.models.traffic import Traffic
from lmlab.planning import ConfigPlan, model_config, plan_of_config
from lmlab.presets import BEGIN, END, WAYS, planned, preset_names, size_of, write_table
from lmlab.records import UserError

from .conftest import Compose

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PUBLISHED = {  # trained parameters, tied ones once: "Model size" of the hub's pages, of Pythia its README's table
    "pythia_160m": 162_322_944,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b_base": 596_049_920,
    "qwen3_1_7b_base": 1_720_574_976,
    "qwen3_8b_base": 8_190_735_360,
    "qwen3_14b_base": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b_base": 30_532_122_624,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_1_70b": 70_553_706_496,
    "gemma_2_2b": 2_614_341_888,
    "gemma_3_1b_it": 999_885_952,
    "mistral_7b_v0_3": 7_248_023_552,
    "phi_4_mini_instruct": 3_836_021_760,
    "phi_4": 14_659_507_200,
    "olmo_2_1124_7b": 7_298_617_344,
    "olmo_2_1124_13b": 13_716_198_400,
}
FAMILIES = [  # one of each kind of shape; the others are slow
    "pythia_160m",
    "smollm2_135m",
    "qwen2_5_0_5b",
    "qwen3_0_6b_base",
    "llama_3_2_1b",
    "gemma_3_1b_it",
]
ROOM_GB = 1.0
"""Left of a card: the CUDA context, some 0.5 GB, and fragmentation."""
CARDS = {"gpu_8gb": 8, "gpu_24gb": 24, "gpu_48gb": 48, "gpu_80gb": 80, "gpu_140gb": 140}


def slow_but(names: list[str], all_of: Any) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in all_of]


def test_every_preset_has_its_published_size_here() -> None:
    assert preset_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", slow_but(FAMILIES, PUBLISHED))
def test_a_preset_has_exactly_the_published_parameters(run_config: Compose, name: str) -> None:
    config = run_config(f"model=scratch/{name}")
    assert (config.model.kind, config.model.label) == ("scratch", name)
    assert size_of(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", slow_but(FAMILIES, PUBLISHED))
def test_its_namesake_is_on_the_hub(run_config: Compose, name: str) -> None:
    config = run_config(f"model={name}", "adapter=qlora")
    assert (config.model.kind, config.tokenizer.kind, config.quant.kind) == (
        "pretrained",
        "from_model",
        "nf4",
    )
    assert re.sub(r"[-.]", "_", config.model.name_or_path.split("/")[1]).lower() == name


def test_a_scratch_preset_takes_another_vocabulary(run_config: Compose) -> None:
    config = run_config("model=scratch/llama_3_2_1b", "tokenizer=bpe", "tokenizer.vocab_size=1000")
    assert model_config(config).vocab_size == 1000
    file = run_config("model=scratch/llama_3_2_1b", "tokenizer=file", "tokenizer.path=x")
    assert file.tokenizer.kind == "file"


def shape(run_config: Compose, name: str) -> Any:
    return model_config(run_config(f"model=scratch/{name}"))


def test_what_sets_a_family_apart_is_in_its_shape(run_config: Compose) -> None:
    gemma = shape(run_config, "gemma_2_2b")
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping, gemma.sliding_window) == (
        50,
        30,
        4096,
    )
    assert gemma.layer_types[:2] == ["sliding_attention", "full_attention"]
    assert gemma.rms_norm_eps == 1e-6
    gemma = shape(run_config, "gemma_3_1b_it")
    assert gemma.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
    thetas = {kind: values["rope_theta"] for kind, values in gemma.rope_parameters.items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    factors = [shape(run_config, name).rope_parameters["factor"] for name in ("llama_3_2_1b", "llama_3_1_8b")]
    assert factors == [32.0, 8.0]
    assert shape(run_config, "mistral_7b_v0_3").sliding_window is None
    spreads = [shape(run_config, name).initializer_range for name in ("smollm2_135m", "smollm2_360m")]
    assert spreads == [1 / 24, 0.02]


@pytest.mark.parametrize(
    ("name", "rotated"), [("pythia_160m", 16), ("phi_4_mini_instruct", 96), ("phi_4", 128)]
)
def test_the_share_of_a_head_that_is_rotated(run_config: Compose, name: str, rotated: int) -> None:
    config = shape(run_config, name)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    frequencies = dict(model.named_buffers())
    found = {tuple(b.shape) for n, b in frequencies.items() if n.endswith("rotary_emb.inv_freq")}
    assert found == {(rotated // 2,)}


# --- what they take ---------------------------------------------------------------------------------------------------


def rows_of_page() -> dict[str, list[str]]:
    made = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in made]
    assert cells[0] == ["preset", "parameters", *WAYS]
    return {row[0].strip("`"): row[1:] for row in cells[2:]}


def test_the_page_has_all_presets_and_their_sizes() -> None:
    rows = rows_of_page()
    assert {name: int(cells[0].replace(",", "")) for name, cells in rows.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("pythia_160m", "QLoRA, nf4"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("smollm2_135m", "full"),
                ("gemma_2_2b", "LoRA, int8"),
                ("qwen3_8b_base", "LoRA, int4"),
                ("qwen3_30b_a3b_base", "LoRA, bf16"),
                ("llama_3_1_70b", "QLoRA, nf4"),
            ]
        ),
    ],
)
def test_the_page_says_what_the_plan_says_now(name: str, way: str) -> None:
    assert rows_of_page()[name][1 + list(WAYS).index(way)] == str(planned(name, way))


def test_a_table_goes_between_the_marks_of_a_page_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_table(page, lambda: "| new |")
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"

    def never() -> str:
        raise AssertionError("the work of minutes was begun")

    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="no place for the table"):
        write_table(page, never)
    with pytest.raises(UserError, match="no page to write to"):
        write_table(tmp_path / "none.md", never)


def in_scratch(run_config: Compose, experiment: str, *more: str) -> Any:
    """An experiment with its model's shape in place of the one on the hub, which no plan could read here."""
    hub = run_config(f"experiment={experiment}", *more)
    name = re.sub(r"[-.]", "_", hub.model.name_or_path.split("/")[1]).lower()
    return run_config(f"experiment={experiment}", f"model=scratch/{name}", *more)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", CARDS)
def test_an_experiment_fits_its_card_and_uses_it(run_config: Compose, experiment: str) -> None:
    config = in_scratch(run_config, experiment)
    assert config.trainer.accelerator == "gpu"
    peak = plan_of_config(config).made().total_gb
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if f"`{experiment}`" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        f"`{experiment}`",
        f"`{config.model.label}`",
        f"{config.adapter.kind} over {config.quant.kind}",
        str(config.trainer.batch_size),
        f"{peak:.1f} GB",
    ]
    assert 0.6 * CARDS[experiment] <= peak <= CARDS[experiment] - ROOM_GB


def test_an_experiment_for_a_card_takes_any_data(run_config: Compose) -> None:
    config = run_config("experiment=gpu_24gb", "data=ultrachat", "data.chat_template=chatml")
    assert (config.data.name, config.data.max_length) == ("HuggingFaceH4/ultrachat_200k", 2048)
    assert config.trainer.rows_per_step == 32


# --- many nodes -------------------------------------------------------------------------------------------------------

NODES = ["experiment=nodes_64", "data.path=corpus", "tokenizer=bpe", "tokenizer.vocab_size=128256"]
"""As it is planned where there is no corpus whose tokenizer could be looked at."""


def test_64_nodes_compose_with_the_tokenizer_of_their_corpus(run_config: Compose) -> None:
    config = run_config("experiment=nodes_64", "data.path=corpus")
    assert config.tokenizer.path == "corpus/tokenizer"
    assert (config.trainer.strategy, config.trainer.precision) == ("fsdp", "bf16")
    assert config.trainer.rows_per_step * config.data.max_length == 512 * 2 * 4096


@pytest.mark.slow
def test_64_nodes_by_hand(run_config: Compose) -> None:
    """16 bytes a parameter over 512 ranks; bf16 weights twice (the root once), fp32 gradients once."""
    plan = plan_of_config(run_config(*NODES))
    made, sent = plan.made(), plan.traffic()
    share = PUBLISHED["llama_3_1_70b"] / 512
    held = made.phases["optimizer"]
    for kind, size in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
        assert held[kind] == pytest.approx(size * share, rel=0.01), kind
    assert held["gathered"] == 0
    root = 2 * 128256 * 8192 + 8192
    layers = PUBLISHED["llama_3_1_70b"] - root
    assert sent["fsdp"].all_gather == pytest.approx(2 * (2 * layers + root), rel=0.01)
    assert sent["fsdp"].reduce_scatter == pytest.approx(4 * (layers + root), rel=0.01)
    assert sent["ddp"] == Traffic(all_reduce=2 * 4 * (layers + root) * 511 // 512)
    assert plan.host_gb() == pytest.approx(8 * 4 * PUBLISHED["llama_3_1_70b"] / 1e9)
    assert made.total_gb < 79, "of a card of 80 GB"


def small(run_config: Compose, *words: str) -> ConfigPlan:
    told = ["model=llama_tiny", "tokenizer=bpe", "trainer=gpu", "adapter=none", "data.max_length=64", *words]
    return plan_of_config(run_config(*told))


def test_a_share_shrinks_with_the_ranks_and_the_micro_batch_s_own_does_not(run_config: Compose) -> None:
    two, eight = (
        small(run_config, "trainer.strategy=fsdp", f"trainer.devices={n}", "samples.grid=[]").made()
        for n in (2, 8)
    )
    for kind in ("weights", "gradients", "optimizer"):
        ratio = two.phases["optimizer"][kind] / eight.phases["optimizer"][kind]
        assert ratio == pytest.approx(4, rel=0.05), kind
    assert two.phases["forward"]["activations"] == eight.phases["forward"]["activations"]
    assert two.phases["backward"]["gathered"] == pytest.approx(eight.phases["backward"]["gathered"], rel=0.05)


def test_traffic_of_one_rank_is_none_and_grows_with_micro_batches_under_fsdp_only(
    run_config: Compose,
) -> None:
    assert small(run_config).traffic() == {}
    once = small(run_config, "trainer.devices=4").traffic()
    twice = small(run_config, "trainer.devices=4", "trainer.accumulate_grad_batches=2").traffic()
    assert twice["ddp"] == once["ddp"]
    assert twice["fsdp"].total == 2 * once["fsdp"].total


def test_groups_told_from_one_layer_are_those_of_all(run_config: Compose) -> None:
    plan = small(run_config, "trainer.devices=2")
    apart: Any = _Apart()
    whole = run_groups(replace(plan.run(), adapter=apart))
    assert run_groups(plan.run()) == whole
    assert len(whole.layers) == plan.hf_config.num_hidden_layers


@pytest.mark.slow
def test_a_plan_of_the_cache_is_not_that_of_another_optimizer_s_state(run_config: Compose) -> None:
    plain, heavy = (
        small(run_config, "samples.grid=[]", "optim=sgd", f"optim.momentum={momentum}").made()
        for momentum in (0.0, 0.9)
    )
    assert plain.phases["optimizer"]["optimizer"] == 0
    assert heavy.phases["optimizer"]["optimizer"] == heavy.phases["optimizer"]["gradients"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_registries")
def test_a_plan_of_the_cache_is_not_that_of_a_plugin_s_older_code(
    run_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import torch
from typing import Literal
from lmlab.models.adapters import AdapterConfig
from lmlab.registry import adapters

@adapters.register
class Some(AdapterConfig):
    kind: Literal["some"]

    def apply(self, model, *, seed, token_rows=()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("WHICH" in name)
        return model
"""
    monkeypatch.syspath_prepend(str(tmp_path))
    trained = []
    for which in ("norm", "mlp"):
        sys.modules.pop("outside_some", None)
        (tmp_path / "outside_some.py").write_text(source.replace("WHICH", which), encoding="utf-8")
        words = ["plugins=[outside_some]", "~adapter", "+adapter.kind=some", "samples.grid=[]"]
        told = ["model=llama_tiny", "tokenizer=bpe", "trainer=gpu", "data.max_length=64"]
        trained.append(plan_of_config(run_config(*told, *words)).made().phases["optimizer"]["gradients"])
    assert 0 < trained[0] < trained[1]


class _Apart:
    """No adapter, whose layers are said to differ, so that all are built."""

    same_in_all_layers = False
    freezes_base = False
    kind = "none"

    def apply(self, model: Any, *, seed: int) -> Any:
        return model
