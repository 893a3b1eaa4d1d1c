"""The decoding loop: equal to transformers' greedy ids, independent rows, nothing left changed, stops, errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lmlab.generation import decode
from lmlab.generation.decode import Generated, context_length, generate
from lmlab.generation.samplers import GreedySampler, SamplerConfig, TemperatureSampler, TopPTemperatureSampler
from lmlab.records import RunFailedError, UserError

DATA = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data"))
CONTEXT = 48
SIZES: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SIZES |= {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**ROPE),
    "qwen2": lambda: hf.Qwen2Config(**ROPE),
    # A window of 6 so that rows leave the batch after the sliding layers have begun to forget.
    "gemma2": lambda: hf.Gemma2Config(**ROPE, head_dim=16, sliding_window=6),
    "gpt2": lambda: hf.GPT2Config(**SIZES, n_positions=CONTEXT),
    # No position_ids (positions come from the mask) and no limit on the context.
    "bloom": lambda: hf.BloomConfig(**SIZES),
    # No key-value cache at all: the whole text is read anew for each token.
    "mamba": lambda: hf.MambaConfig(**SIZES, state_size=8),
    # Recurrent state beside keys and values in one cache.
    "lfm2": lambda: hf.Lfm2Config(**ROPE, layer_types=["conv", "full_attention"]),
}
PROMPTS = [
    torch.randint(5, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 9, 1, 12, 6)
]
SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str = "llama") -> nn.Module:
    """A random model whose logits are spread out, so that no two tokens are tied to within rounding."""
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


def greedy(max_new_tokens: int = 24) -> SamplerConfig:
    return GreedySampler(kind="greedy", max_new_tokens=max_new_tokens)


def warm(max_new_tokens: int = 16) -> SamplerConfig:
    return TopPTemperatureSampler(
        kind="top_p_temperature", temperature=1.2, top_p=0.95, max_new_tokens=max_new_tokens
    )


def run(model: nn.Module, prompts: Any = PROMPTS, **options: Any) -> list[Generated]:
    """`generate` with the defaults of these tests."""
    settings: dict[str, Any] = {"sampler": greedy(), "eos_token_ids": (), "seeds": SEEDS[: len(prompts)]}
    return generate(model, prompts, **{**settings, **options})


def transformers_greedy(model: Any, eos: list[int] | None) -> list[list[int]]:
    """The new ids of transformers' own generate for PROMPTS in one left-padded batch, cut before the eos."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=eos
    )
    rows = out[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in (eos or ())), len(row))] for row in rows]


@pytest.mark.parity
@pytest.mark.parametrize("can_drop", [True, False], ids=["rows-leave", "rows-stay-masked"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_against_transformers_greedy_with_ragged_prompts_and_eos_in_the_middle(
    name: str, can_drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_drop:
        monkeypatch.setattr(decode, "_can_drop", lambda cache: False)
    model = build(name)
    free = transformers_greedy(model, None)
    eos = [free[0][4], free[3][10]]
    expected = transformers_greedy(model, eos)
    assert len({len(row) for row in expected}) > 1, "the rows should end at different steps"
    rows = run(model, eos_token_ids=eos)
    assert [row.token_ids for row in rows] == expected
    assert [row.stop_reason for row in rows] == ["length" if len(row) == 24 else "eos" for row in expected]


@pytest.mark.parity
def test_against_transformers_greedy_on_real_weights() -> None:
    folder = DATA / "stories260k-hf"
    if not folder.is_dir():
        pytest.skip(f"no real weights at {folder}: set LMLAB_TEST_DATA")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    reference = json.loads((folder / "reference.json").read_text())
    for case in reference["prompts"]:
        prompt, whole = case["prompt_ids"], case["greedy_ids"]
        sampler = greedy(len(whole) - len(prompt))
        [row] = run(model, [prompt], sampler=sampler, eos_token_ids=[model.config.eos_token_id])
        assert prompt + row.token_ids == whole


def test_a_row_depends_on_its_seed_alone(llama: nn.Module) -> None:
    together = run(llama, sampler=warm(), eos_token_ids=[7])
    pairs = zip(PROMPTS, SEEDS, strict=True)
    alone = [run(llama, [p], sampler=warm(), eos_token_ids=[7], seeds=[seed])[0] for p, seed in pairs]
    assert together == alone
    backwards = run(llama, PROMPTS[::-1], sampler=warm(), eos_token_ids=[7], seeds=SEEDS[::-1])
    assert backwards[::-1] == together


def test_seeds_decide_the_text(llama: nn.Module) -> None:
    first = run(llama, [PROMPTS[0]] * 3, sampler=warm(), seeds=[1, 2, 1])
    assert first[0] == first[2] != first[1]
    assert run(llama, [PROMPTS[0]] * 3, sampler=warm(), seeds=[1, 2, 1]) == first


def test_the_global_random_state_is_neither_read_nor_written(llama: nn.Module) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(llama, sampler=warm())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run(llama, sampler=warm()) == first


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_training_flags_are_put_back_per_module(fails: bool) -> None:
    model = build()
    model.train()
    model.get_submodule("model.layers.0").eval()
    model.get_submodule("model.layers.0.mlp").train()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []

    def on_token(row: int, token: int) -> None:
        seen.append(any(module.training for module in model.modules()))
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run(model, on_token=on_token)
    else:
        run(model, on_token=on_token)
    assert not any(seen)
    assert [module.training for module in model.modules()] == before


def test_the_model_can_be_trained_on_afterwards() -> None:
    model = build().train()
    run(model, sampler=greedy(2))
    model(input_ids=torch.tensor([PROMPTS[3]])).logits.logsumexp(-1).sum().backward()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_and_peft_models_work_alike() -> None:
    from peft import LoraConfig, get_peft_model

    plain = run(build())
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build(), config).train()  # type: ignore[arg-type] - lora_B starts at 0: the same model
    assert run(model) == plain
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted = run(model)
    assert adapted != plain
    assert adapted == run(model.merge_and_unload())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_stops_a_row(name: str) -> None:
    prompts = [PROMPTS[0], [5] * (CONTEXT - 1), [6] * (CONTEXT - 4)]
    rows = run(build(name), prompts, sampler=greedy(9))
    assert [len(row.token_ids) for row in rows] == [9, 1, 4]
    assert [row.stop_reason for row in rows] == ["length", "context", "context"]
    # Both at once: the caller got all that was asked for.
    assert run(build(name), prompts, sampler=greedy(4))[2].stop_reason == "length"


def test_rows_kept_beyond_their_context_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("gpt2"), [PROMPTS[0], [5] * (CONTEXT - 1)]
    expected = run(model, prompts)
    monkeypatch.setattr(decode, "_can_drop", lambda cache: False)
    assert run(model, prompts) == expected


def test_finished_rows_leave_the_batch_and_one_forward_makes_one_token(llama: nn.Module) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = llama.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    free = run(llama, sampler=greedy(6))
    shapes.clear()
    rows = run(llama, sampler=greedy(6), eos_token_ids=[free[0].token_ids[2]])
    handle.remove()
    lengths = [len(row.token_ids) for row in rows]
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert shapes == [(5, 12)] + [(count, 1) for count in live[:-1]]
    assert len(set(live)) > 1


def test_eos_as_the_very_first_token(llama: nn.Module) -> None:
    first = [row.token_ids[0] for row in run(llama, sampler=greedy(1))]
    assert run(llama, eos_token_ids=first) == [Generated([], "eos")] * 5


def test_on_token_streams_every_new_token_in_order(llama: nn.Module) -> None:
    streamed: dict[int, list[int]] = {index: [] for index in range(5)}
    free = run(llama)
    rows = run(
        llama, eos_token_ids=[free[1].token_ids[5]], on_token=lambda row, token: streamed[row].append(token)
    )
    assert [streamed[index] for index in range(5)] == [row.token_ids for row in rows]


def test_the_pad_token_does_not_matter(llama: nn.Module) -> None:
    assert run(llama, pad_token_id=0) == run(llama, pad_token_id=96)


def test_logits_of_a_16_bit_model_are_sampled_in_fp32(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    real = decode.draw
    monkeypatch.setattr(decode, "draw", lambda scores, g: (seen.append(scores.dtype), real(scores, g))[1])
    run(build().to(torch.bfloat16), sampler=warm(2))
    assert set(seen) == {torch.float32}


def test_context_length_is_read_from_the_text_config(llama: nn.Module) -> None:
    assert context_length(llama) == context_length(build("gpt2")) == CONTEXT
    assert context_length(build("bloom")) is None
    assert context_length(nn.Linear(1, 1)) is None


def test_no_prompts_give_no_rows(llama: nn.Module) -> None:
    assert run(llama, []) == []


def test_an_empty_prompt_is_refused_by_its_index(llama: nn.Module) -> None:
    with pytest.raises(UserError, match=r"prompt 1") as error:
        run(llama, [[5], [], [6]])
    assert error.value.fix


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 10])
def test_a_prompt_that_leaves_no_room_is_refused(llama: nn.Module, length: int) -> None:
    with pytest.raises(UserError, match=rf"{length} tokens.*context is {CONTEXT}.*prompt 2") as error:
        run(llama, [[5], [6], [7] * length])
    assert str(CONTEXT - 1) in str(error.value.fix)


def test_weights_that_have_diverged_are_named() -> None:
    model = build()
    nn.init.constant_(model.get_parameter("model.norm.weight"), float("nan"))
    for sampler in (greedy(), TemperatureSampler(kind="temperature", temperature=1.0, max_new_tokens=2)):
        with pytest.raises(RunFailedError, match="not finite"):
            run(model, sampler=sampler)


def test_as_many_seeds_as_prompts(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="5 prompts but 2 seeds"):
        run(llama, seeds=[1, 2])
