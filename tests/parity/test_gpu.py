"""On a CUDA device: packed attention, head and loss, fused LoRA over every storage, and whole runs, against the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_peft import peft_model
from test_quantize_bitsandbytes import ALL, label, quantized
from tiny import distance, documents, flat, gradients, padded, random_model

from lmlab.models import attention as packed
from lmlab.models.attention import NAME, Documents, attention, use_packed_attention
from lmlab.models.build import compile_layers, enable_checkpointing
from lmlab.models.hardware import choose_hardware, move_rest_to
from lmlab.models.head import NLL, loss_sum
from lmlab.models.lora import use_fused_lora
from lmlab.records import PackedBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "phi3",
    "gpt_oss",
    "mixtral",
]


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def step(model: Any, batch: PackedBatch) -> tuple[float, torch.Tensor]:
    device = next(model.parameters()).device
    loss = loss_sum(model, batch.to(device))
    loss.backward()
    return loss.item(), gradients(model).float().cpu()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_against_cpu_fp32_loss_and_gradients(model_type: str) -> None:
    model = random_model(model_type)
    use_packed_attention(model)
    expected, reference = step(model, flat(documents()))
    found, grads = step(model.to(CUDA), flat(documents()))
    assert found == pytest.approx(expected, rel=1e-4)
    assert distance(grads, reference) < 1e-4  # other kernels, other order of sums


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_against_eager_documents_alone_in_bf16(model_type: str) -> None:
    """No further from the fp32 logits than twice transformers' eager attention in bf16, document by document."""
    model = random_model(model_type).to(CUDA).eval()
    examples = documents([5, 40, 13, 40, 3])
    ids = [e.input_ids[None].to(CUDA) for e in examples]
    with torch.no_grad():
        exact = torch.cat([model(input_ids=i, use_cache=False).logits[0] for i in ids]).float()
        model.to(torch.bfloat16)
        eager = torch.cat([model(input_ids=i, use_cache=False).logits[0] for i in ids]).float()
        batch = flat(examples).to(CUDA)
        assert batch.cu_seqlens is not None
        with attention(model, NAME):
            arguments: dict[str, Any] = {
                "lmlab_documents": Documents(batch.cu_seqlens, CUDA),
                "use_cache": False,
            }
            ours = (
                model(input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
                .logits[0]
                .float()
            )
    assert distance(ours, exact) < 2 * distance(eager, exact)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_documents_stay_apart_in_varlen_attention(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = packed._varlen
    monkeypatch.setattr(packed, "_varlen", lambda *a, **k: calls.append(1) or own(*a, **k))
    model = random_model(model_type).to(CUDA, torch.bfloat16).eval()
    use_packed_attention(model)

    def logits(seed: int) -> list[torch.Tensor]:
        examples = [documents([7, 30, 12], seed=seed)[0], *documents([7, 30, 12])[1:]]
        batch = flat(examples).to(CUDA)
        assert batch.cu_seqlens is not None
        arguments: dict[str, Any] = {"lmlab_documents": Documents(batch.cu_seqlens, CUDA), "use_cache": False}
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        return list(out.logits[0].split([7, 30, 12]))

    first, second = logits(5), logits(6)
    assert len(calls) == 4, "two layers, two passes"
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("storage", ALL, ids=label)
def test_against_peft_fused_lora_fp32(storage: dict[str, Any]) -> None:
    models = []
    for _ in range(2):
        base = random_model("llama").to(CUDA)
        models.append(peft_model(quantized(base, storage)).to(CUDA).train())
        use_packed_attention(models[-1])
    assert use_fused_lora(models[1]) > 0
    (expected, reference), (found, grads) = (step(m, flat(documents())) for m in models)
    assert found == pytest.approx(expected, rel=1e-4)
    assert distance(grads, reference) < 1e-4


@pytest.mark.parametrize(
    ("storage", "compiled"),
    [
        *((storage, False) for storage in (ALL[2], ALL[3], ALL[4], ALL[-1])),
        (ALL[2], True),  # over fewer bits checkpointing in compiled layers is refused
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else "compiled" if value else "eager",
)
def test_a_bf16_base_trains_with_checkpointing(storage: dict[str, Any], compiled: bool) -> None:
    base = random_model("llama", std=0.08).to(CUDA)
    enable_checkpointing(base)
    base = quantized(base, storage)
    move_rest_to(base, torch.bfloat16)
    model = peft_model(base, init_lora_weights=True).to(CUDA).train()
    use_fused_lora(model)
    use_packed_attention(model)
    if compiled:
        assert compile_layers(model) == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for i in range(20):
        batch = flat(documents([5, 9, 13 - i % 3, 9, 3])).to(CUDA)
        loss = loss_sum(model, batch) / len(batch.supervised_index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_kernels_against_fp64(softcap: float | None) -> None:
    pytest.importorskip("liger_kernel")
    from lmlab.models import linear_loss

    torch.manual_seed(0)
    tail = linear_loss.Tail(scale=0.5, softcap=softcap)
    head = torch.nn.Linear(256, 5000, bias=False, device=CUDA, dtype=torch.bfloat16)
    hidden = torch.randn(700, 256, device=CUDA, dtype=torch.bfloat16)
    labels = torch.randint(0, 5000, (700,), device=CUDA)
    x, w = hidden.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(tail(x @ w.t()), labels, reduction="sum")
    exact.backward()
    for kernel in (True, False):
        y = hidden.clone().requires_grad_()
        head.weight.grad = None
        if kernel:
            assert linear_loss._cuda_kernel(y, None, tail, linear_loss.HeadLoss()) is not None
            loss: Any = linear_loss.total(
                y, labels, head=head, tail=tail, loss=NLL.total, cross_entropy=linear_loss.HeadLoss()
            )
        else:
            args = (y, head.weight, None, labels, tail, linear_loss.HeadLoss())
            loss = linear_loss._ChunkedCrossEntropy.apply(*args)
        loss.backward()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
        for found, expected in ((y.grad, x.grad), (head.weight.grad, w.grad)):
            assert found is not None
            assert expected is not None
            assert distance(found.double(), expected) < 1e-2  # logits and gradients rounded to bf16


def test_padded_rows_under_autocast() -> None:
    model = random_model("llama")
    model.set_attn_implementation("sdpa")
    expected, reference = step(model, padded(documents()))
    with torch.autocast("cuda", torch.bfloat16):
        found, grads = step(model.to(CUDA), padded(documents()))
    assert found == pytest.approx(expected, rel=2e-2)
    assert distance(grads, reference) < 0.2


def test_policy_on_a_gpu() -> None:
    assert choose_hardware("auto", "auto").lightning_precision == "bf16-mixed"
    frozen = choose_hardware("auto", "auto", frozen_storage="nf4")
    assert (frozen.precision, frozen.mixed, frozen.lightning_precision) == ("bf16", False, "32-true")
    assert choose_hardware("auto", "fp16", frozen_storage="nf4").lightning_precision == "16-mixed"


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=lora"],
        ["adapter=lora", "quant=bf16"],
        ["adapter=qlora", "quant=nf4", "model.gradient_checkpointing=true"],
        ["adapter=lora", "quant=int8", "trainer.precision=fp16"],
        ["adapter=lora", "quant=int4"],
        ["adapter=lora", "adapter.dora=true", "quant=nf4"],
        ["task=pretrain", "trainer.compile=true"],
        ["adapter=lora", "data.packing=true"],
    ],
    ids=lambda o: " ".join(o),
)
def test_a_whole_run(overrides: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "train.py",
        *overrides,
        "logger.mode=disabled",
        "trainer.max_steps=12",
        "metrics=none",
    ]
    command += ["trainer.val_every_n_steps=12", f"output_root={tmp_path}", "run_name=r", "samples.prompts=2"]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        "LMLAB_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=env, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (run,) = tmp_path.glob("*/r")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < losses[0]
    assert any("memory/vram_allocated_gb" in line for line in lines)
    assert "wandb" not in done.stderr
    assert "no memory plan" not in done.stdout + done.stderr
    assert "without CUDA graphs" not in done.stderr
    if "trainer.compile=true" not in overrides:
        summary = json.loads((run / "summary.json").read_text())
        print({k: v for k, v in summary.items() if k.endswith("plan_error")})
