"""Sources and configs that cannot be trained end in one line; scratch weights follow their seed; fingerprints tell bases apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from lmlab.models.attention import use_packed_attention
from lmlab.models.build import (
    Pretrained,
    Scratch,
    base_fingerprint,
    build_model,
    context_length,
    resolve_source,
)
from lmlab.records import UserError

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 48,
}


def scratch(architecture: str = "llama", config: dict[str, Any] | None = None) -> Scratch:
    return Scratch(
        kind="scratch",
        name="tiny",
        architecture=architecture,
        config=LLAMA if config is None else config,
        gradient_checkpointing=False,
    )


def pretrained(path: Path | str, **changes: Any) -> Pretrained:
    return Pretrained(
        kind="pretrained",
        name_or_path=str(path),
        revision=None,
        trust_remote_code=False,
        gradient_checkpointing=changes.get("gradient_checkpointing", False),
    )


def build(about: Pretrained | Scratch, seed: int = 0) -> Any:
    return build_model(about, about.hf_config(97), seed=seed, dtype=torch.float32)


def refusal(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build(scratch()).save_pretrained(folder)
    return folder


# --- where the model lies -----------------------------------------------------------------------------------------


def test_resolve_source_directories(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(str(saved)) == str(saved.resolve())
    assert resolve_source("some-org/some-model") == "some-org/some-model"
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    assert resolve_source(str(run)) == str((run / "model").resolve())
    monkeypatch.chdir(tmp_path)
    assert resolve_source("base") == resolve_source("./base") == str(saved.resolve())


def test_resolve_source_errors(tmp_path: Path) -> None:
    assert "no such model directory" in refusal(lambda: resolve_source(str(tmp_path / "nothing")))
    assert "no such model directory" in refusal(lambda: resolve_source("./nothing"))
    assert "no such model directory" in refusal(lambda: resolve_source("outputs/sft/run"))
    assert "no config.json" in refusal(lambda: resolve_source(str(tmp_path)))
    for place in (tmp_path / "a", tmp_path / "run" / "adapter"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(lambda: resolve_source(str(tmp_path / "a")))
    assert "holds an adapter" in refusal(lambda: resolve_source(str(tmp_path / "run")))


# --- configs ------------------------------------------------------------------------------------------------------


def test_config_errors_of_scratch_models() -> None:
    text = refusal(lambda: scratch("lama").hf_config(97))
    assert "unknown architecture 'lama'" in text
    assert "llama" in text
    for architecture in ("t5", "clip", "bert", "xlnet"):
        text = refusal(lambda a=architecture: scratch(a, {}).hf_config(97))
        assert f"'{architecture}' is not a causal language model" in text
    assert "refuses this config" in refusal(
        lambda: scratch("llama", LLAMA | {"hidden_size": "wide"}).hf_config(97)
    )
    assert scratch("bert", {"is_decoder": True}).hf_config(97).vocab_size == 97


def test_config_errors_of_saved_models(saved: Path, tmp_path: Path) -> None:
    BertConfig(hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    T5Config(d_model=64).save_pretrained(tmp_path / "t5")
    assert "'bert' is not a causal language model without is_decoder" in refusal(
        lambda: pretrained(tmp_path / "bert").hf_config(None)
    )
    assert "'t5' is not" in refusal(lambda: pretrained(tmp_path / "t5").hf_config(None))
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"lama9"'))
    assert "no usable config" in refusal(lambda: pretrained(saved).hf_config(None))
    config.write_text("{broken")
    assert "no usable config" in refusal(lambda: pretrained(saved).hf_config(None))


def test_context_length() -> None:
    assert context_length(scratch().hf_config(97)) == 48
    assert context_length(scratch("gpt2", {"n_positions": 32}).hf_config(97)) == 32
    assert context_length(scratch("bloom", {}).hf_config(97)) is None


# --- weights ------------------------------------------------------------------------------------------------------


def test_a_pickle_is_not_opened(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(lambda: build(pretrained(saved)))


def test_damaged_and_foreign_weights(saved: Path) -> None:
    weights = saved / "model.safetensors"
    whole = {k: v.clone() for k, v in load_file(weights).items()}  # load_file maps the file
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refusal(lambda: build(pretrained(saved)))
    weights.write_bytes(b"not safetensors")
    assert "cannot be loaded" in refusal(lambda: build(pretrained(saved)))
    some = {k: v for k, v in whole.items() if "q_proj" not in k}
    save_file(some, weights, metadata={"format": "pt"})
    assert "2 tensors are missing" in refusal(lambda: build(pretrained(saved)))
    save_file(whole | {"model.norm.weight": torch.ones(32)}, weights, metadata={"format": "pt"})
    assert "cannot be loaded" in refusal(lambda: build(pretrained(saved)))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = build(scratch("llama", LLAMA | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = build(pretrained(tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_scratch_follows_its_seed_and_leaves_the_global_rng_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(scratch(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build(scratch(), seed=3).state_dict(), build(scratch(), seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    with torch.random.fork_rng():  # the same draws as transformers after torch.manual_seed
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        plain = AutoModelForCausalLM.from_config(scratch().hf_config(97)).state_dict()
    assert all(torch.equal(first[name], plain[name]) for name in first)


def test_gradient_checkpointing_is_switched_on(saved: Path) -> None:
    about = pretrained(saved, gradient_checkpointing=True)
    assert build(about).is_activation_checkpointing
    assert not build(pretrained(saved)).is_activation_checkpointing


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_fingerprint_survives_saving_and_the_attention_implementation(saved: Path) -> None:
    """Also for a scratch model before it is saved: an adapter over it is loaded over the saved one."""
    first = base_fingerprint(build(scratch()))
    model = build(pretrained(saved))
    assert base_fingerprint(model) == first
    use_packed_attention(model)
    assert base_fingerprint(model) == first
    model.set_attn_implementation("eager")
    assert base_fingerprint(model) == first


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "gemma3_text"])
def test_fingerprint_of_other_architectures_survives_saving(architecture: str, tmp_path: Path) -> None:
    config = {"n_embd": 64, "n_layer": 2, "n_head": 4} if architecture == "gpt2" else LLAMA
    model = build(scratch(architecture, config))
    first = base_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert base_fingerprint(build(pretrained(tmp_path))) == first


def test_fingerprint_tells_other_weights_and_configs(saved: Path) -> None:
    first = base_fingerprint(build(pretrained(saved)))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        model = build(pretrained(saved))
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        changed = base_fingerprint(model)
        assert changed["tensors"] != first["tensors"], name
        assert changed["config"] == first["config"]
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    changed = base_fingerprint(build(pretrained(saved)))
    assert changed["config"] != first["config"]
    assert changed["tensors"] == first["tensors"]


def test_fingerprint_tells_a_base_with_a_merged_adapter(saved: Path) -> None:
    """Same embeddings, norms and head; only linear layers in between differ."""
    model = build(pretrained(saved))
    first = base_fingerprint(model)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]
    assert base_fingerprint(merged) != first
