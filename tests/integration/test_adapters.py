"""Several adapters on one base: switched by name to the last bit, checked one by one, combined and saved for PEFT alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmlab.config.named import named_sampler
from lmlab.load import UsableModel, combine_and_save, load_for_use, weights_folder
from lmlab.models.adapter_files import check_adapter
from lmlab.models.build import ASSETS, Pretrained, base_fingerprint
from lmlab.models.quantize import Unquantized, quants
from lmlab.records import UserError

BASE = ASSETS / "tiny-base"
PROMPTS = ["os.path.join returns", "A list"]
GREEDY = named_sampler("greedy", {"max_new_tokens": 8})


def write_adapter(folder: Path, *, seed: int, info: dict[str, Any] | None = None, **config: Any) -> str:
    """A LoRA adapter as a PEFT user saves it, B drawn; with an lmlab.json where ``info`` is given."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.peft_config["default"].base_model_name_or_path = str(BASE)
    model.save_pretrained(folder, save_embedding_layers=False)
    if info is not None:
        fingerprint = base_fingerprint(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
        about = {"base": str(BASE), "base_fingerprint": fingerprint, "quant": {"kind": "none"}, **info}
        (folder / "lmlab.json").write_text(json.dumps(about), encoding="utf-8")
    return str(folder)


def logits(usable: UsableModel) -> torch.Tensor:
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        return usable.model(ids).logits


def texts(usable: UsableModel) -> list[str]:
    return [found.text for found in usable.generator(PROMPTS, sampler=GREEDY, seeds=[0, 1])]


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters of different ranks, scales and targets on the tiny base."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": write_adapter(root / "a", seed=1, info={}),
        "b": write_adapter(root / "b", seed=2, info={"template": "{{ instruction }}!"}, r=6, use_rslora=True),
        "c": write_adapter(root / "c", seed=3, target_modules=["q_proj", "v_proj"], r=2),
    }


def alone(path: str, **options: Any) -> torch.Tensor:
    return logits(load_for_use(path, accelerator="cpu", **options))


def test_switching_is_exact_to_the_last_bit(made: dict[str, str]) -> None:
    usable = load_for_use(made["a"], accelerator="cpu", adapters={"b": made["b"], "c": made["c"]})
    assert usable.adapter_names == ("default", "b", "c")
    assert usable.source == str(BASE)
    expected = {"default": alone(made["a"]), "b": alone(made["b"]), "c": alone(made["c"])}
    before_text = texts(usable)
    base = logits(load_for_use(str(BASE), accelerator="cpu"))
    for name in ("c", "default", "b"):
        with usable.using(name) as current:
            assert torch.equal(logits(current), expected[name])
            with usable.using(None):
                assert torch.equal(logits(usable), base)
                with usable.using("c"):
                    assert torch.equal(logits(usable), expected["c"])
            assert torch.equal(logits(usable), expected[name])
    assert torch.equal(logits(usable), expected["default"])
    assert texts(usable) == before_text
    assert not any(p.requires_grad for p in usable.model.parameters())


def test_decoding_follows_the_adapter_in_force(made: dict[str, str]) -> None:
    usable = load_for_use(made["a"], accelerator="cpu", adapters={"b": made["b"]})
    expected = {name: texts(load_for_use(made[name], accelerator="cpu")) for name in ("a", "b")}
    base = texts(load_for_use(str(BASE), accelerator="cpu"))
    assert expected["a"] != expected["b"] != base != expected["a"]
    for _ in range(2):
        assert texts(usable) == expected["a"]
        with usable.using("b") as current:
            assert texts(current) == expected["b"]
            assert current.prompting("x") == "x!"
        with usable.using(None):
            assert texts(usable) == base


def test_a_plain_model_takes_adapters_by_name(made: dict[str, str]) -> None:
    usable = load_for_use(str(BASE), accelerator="cpu", adapters={"a": made["a"], "c": made["c"]})
    assert usable.adapter_names == ("a", "c")
    assert torch.equal(logits(usable), alone(made["a"]))
    assert load_for_use(str(BASE), accelerator="cpu").adapter_names == ()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_is_stored_as_asked(made: dict[str, str], kind: str) -> None:
    values = {"kind": kind, **({"double_quant": True} if kind == "nf4" else {})}
    quant: Any = quants.class_of(kind).model_validate(values)
    usable = load_for_use(made["a"], accelerator="cpu", adapters={"c": made["c"]}, quant=quant)
    assert usable.quant == quant
    expected = alone(made["a"])
    near = (logits(usable) - expected).abs().max() / expected.abs().max()
    assert 0 < near < 0.3  # 4 bits: some 10 % of a weight
    plain = load_for_use(str(BASE), accelerator="cpu", quant=quant)
    with usable.using(None):
        assert torch.equal(logits(usable), logits(plain))


# --- what is refused -------------------------------------------------------------------------------------------------


def copy_with(folder: str, to: Path, **info: Any) -> str:
    import shutil

    shutil.copytree(folder, to)
    old = json.loads((to / "lmlab.json").read_text(encoding="utf-8"))
    (to / "lmlab.json").write_text(json.dumps({**old, **info}), encoding="utf-8")
    return str(to)


def changed_base(to: Path, *, config: bool) -> str:
    """The tiny base with one tensor changed, or with another value in its config."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if config:
        model.config.rms_norm_eps = 1e-3
    else:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "down_proj" in n).add_(0.01)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(to)
    return str(to)


@pytest.mark.parametrize("config", [False, True], ids=["one tensor", "config"])
def test_a_wrong_base_is_refused_for_every_adapter(
    made: dict[str, str], tmp_path: Path, config: bool
) -> None:
    wrong = changed_base(tmp_path / "base", config=config)
    on_wrong = copy_with(made["a"], tmp_path / "on wrong", base=wrong)
    assert "another base" in refusal(lambda: load_for_use(on_wrong, accelerator="cpu"))
    model = AutoModelForCausalLM.from_pretrained(wrong, dtype=torch.float32)
    other = copy_with(made["a"], tmp_path / "other", base_fingerprint=base_fingerprint(model))
    line = refusal(lambda: load_for_use(made["a"], accelerator="cpu", adapters={"other": other}))
    assert "another base" in line
    assert "other" in line


@pytest.mark.parametrize(
    ("name", "says"),
    [("default", "two adapters"), ("model", "cannot name"), ("a.b", "cannot name"), ("keys", "cannot name")],
)
def test_names_that_adapters_cannot_have(made: dict[str, str], name: str, says: str) -> None:
    assert says in refusal(lambda: load_for_use(made["a"], accelerator="cpu", adapters={name: made["c"]}))


def test_a_second_adapter_is_checked_like_the_first(made: dict[str, str], tmp_path: Path) -> None:
    def load(path: str) -> str:
        return refusal(lambda: load_for_use(made["a"], accelerator="cpu", adapters={"second": path}))

    assert "no adapter there" in load(str(tmp_path / "nowhere"))
    assert "no adapter there" in load(str(BASE))
    over_nf4 = copy_with(made["a"], tmp_path / "nf4", quant={"kind": "nf4", "double_quant": True})
    assert "stored differently (default: none, second: nf4)" in load(over_nf4)
    foreign = Path(copy_with(made["a"], tmp_path / "foreign"))
    config = json.loads((foreign / "adapter_config.json").read_text(encoding="utf-8"))
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "megatron_config": {"x": 1}}))
    assert "names code to import" in load(str(foreign))
    short = Path(copy_with(made["a"], tmp_path / "short"))
    tensors = load_file(short / "adapter_model.safetensors")
    lost = sorted(tensors)[0]
    save_file(
        {k: v for k, v in tensors.items() if k != lost}, short / "adapter_model.safetensors", {"format": "pt"}
    )
    assert lost in load(str(short))
    usable = load_for_use(made["a"], accelerator="cpu")
    assert "it has default" in refusal(lambda: usable.using("nobody").__enter__())
    plain = load_for_use(str(BASE), accelerator="cpu")
    assert "it has none" in refusal(lambda: plain.using("nobody").__enter__())


def renamed(folder: str, to: Path, **config: Any) -> str:
    """The adapter with other values in adapter_config.json."""
    import shutil

    shutil.copytree(folder, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return str(to)


def test_a_second_adapter_without_a_fingerprint_must_name_the_same_base(
    made: dict[str, str], tmp_path: Path
) -> None:
    other = renamed(made["c"], tmp_path / "other", base_model_name_or_path="someone/another-model")
    line = refusal(lambda: load_for_use(made["a"], accelerator="cpu", adapters={"other": other}))
    assert "names another base: someone/another-model" in line
    (tmp_path / "link").symlink_to(BASE)
    same = renamed(made["c"], tmp_path / "same", base_model_name_or_path=str(tmp_path / "link"))
    assert load_for_use(made["a"], accelerator="cpu", adapters={"same": same}).adapter_names[1] == "same"


def test_the_revision_in_an_adapter_s_own_config_is_used(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = renamed(made["c"], tmp_path / "pinned", base_model_name_or_path="someone/a-model", revision="v7")
    asked: list[str | None] = []

    def config(about: Pretrained, vocab_size: int | None) -> Any:
        asked.append(about.revision)
        raise UserError("not here", where="hub", fix="none")

    monkeypatch.setattr(Pretrained, "hf_config", config)
    refusal(lambda: load_for_use(pinned, accelerator="cpu"))
    assert asked == ["v7"]


@pytest.mark.parametrize("init", ["OLoRA", "pissa_niter_4", "loftq", "not known yet"])
def test_inits_that_change_the_base_are_refused_however_they_are_written(tmp_path: Path, init: str) -> None:
    values = {"peft_type": "LORA", "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert "which changes the base" in refusal(lambda: check_adapter(tmp_path))


@pytest.mark.parametrize("changed", [True, False], ids=["other values", "the same values"])
def test_the_bare_base_is_refused_where_a_file_replaced_its_embedding(
    made: dict[str, str], tmp_path: Path, changed: bool
) -> None:
    folder = Path(copy_with(made["a"], tmp_path / "whole"))
    tensors = load_file(folder / "adapter_model.safetensors")
    base: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    embedding = base.get_input_embeddings().weight
    tensors["base_model.model.model.embed_tokens.weight"] = embedding.detach() + float(changed)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    usable = load_for_use(str(folder), accelerator="cpu")
    if changed:
        line = refusal(lambda: usable.using(None).__enter__())
        assert "replaced a tensor of its base (base_model.model.model.embed_tokens.weight)" in line
    else:
        with usable.using(None):
            assert torch.equal(logits(usable), logits(load_for_use(str(BASE), accelerator="cpu")))


# --- combined --------------------------------------------------------------------------------------------------------


def test_a_combination_is_the_weighted_sum_and_loads_with_peft_alone(
    made: dict[str, str], tmp_path: Path
) -> None:
    weights = {"a": 0.5, "b": -0.25, "c": 2.0}
    given = {name: (made[name], weight) for name, weight in weights.items()}
    combined = combine_and_save(given, tmp_path / "sum")
    assert combined.rank == 4 + 6 + 2
    assert combined.relative_error < 1e-6  # fp32 rounding of A
    info = json.loads((tmp_path / "sum" / "lmlab.json").read_text(encoding="utf-8"))
    assert info["combined"]["adapters"]["b"] == {"path": made["b"], "weight": -0.25}
    assert info["base_fingerprint"]
    with_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), str(tmp_path / "sum")
    ).eval()
    with torch.no_grad():
        found = with_peft(torch.arange(5, 17)[None]).logits
    ours = alone(str(tmp_path / "sum"))
    assert (ours - found).abs().max() / found.abs().max() < 1e-5
    by_hand = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    scales = {"a": 16 / 4, "b": 16 / 6**0.5, "c": 16 / 2}
    for name, weight in weights.items():
        tensors = load_file(Path(made[name]) / "adapter_model.safetensors")
        for key in (key for key in tensors if ".lora_A." in key):
            target: Any = by_hand.get_submodule(
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            update = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
            target.weight.data += (weight * scales[name] * update).float()
    with torch.no_grad():
        expected = by_hand(torch.arange(5, 17)[None]).logits
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-4


def test_best_weights_of_what_has_none_are_refused(tmp_path: Path) -> None:
    for told in (str(BASE), "some/hub-model", str(tmp_path)):
        said = refusal(lambda told=told: load_for_use(told, use_best=True))
        assert f"there are no best weights ({told}): leave --best out" in said
    (tmp_path / "best" / "model").mkdir(parents=True)
    assert weights_folder(tmp_path, use_best=True) == tmp_path / "best" / "model"


def test_what_cannot_be_combined_and_saved(made: dict[str, str], tmp_path: Path) -> None:
    def attempt(**options: Any) -> str:
        given = options.pop("given", {"a": (made["a"], 0.5), "b": (made["b"], 0.5)})
        return refusal(lambda: combine_and_save(given, options.pop("to", tmp_path / "to"), **options))

    assert "something already" in attempt(to=made["a"])
    assert "at least two" in attempt(given={"a": (made["a"], 1.0)})
    assert "cat or svd" in attempt(method="linear")
    assert "rank of its own" in attempt(rank=3)
    over_nf4 = copy_with(made["a"], tmp_path / "nf4", quant={"kind": "nf4", "double_quant": True})
    assert "stored differently" in attempt(given={"a": (made["a"], 0.5), "n": (over_nf4, 0.5)})
    for weight, said in ((float("nan"), "the weight of 'b' is nan"), (0.0, "all weights are 0")):
        assert said in attempt(given={"a": (made["a"], 0.0), "b": (made["b"], weight)})
    assert "rank=0" in attempt(method="svd", rank=0)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "is no directory" in attempt(to=tmp_path / "file" / "deeper")
    unlike = copy_with(made["b"], tmp_path / "unlike", template="another")
    assert "'u' was trained with another template than 'b'" in attempt(
        given={"a": (made["a"], 0.5), "b": (made["b"], 0.5), "u": (unlike, 0.5)}
    )
    assert not (tmp_path / "to").exists()
    given = {"a": (made["a"], 0.5), "n": (over_nf4, 0.5)}
    combine_and_save(given, tmp_path / "to", quant=Unquantized(kind="none"))
    assert json.loads((tmp_path / "to" / "lmlab.json").read_text())["quant"] == {"kind": "none"}
