"""The GPU suite: everything in one process, under 8 minutes, one JSON.

    python benchmarks/gpu.py --out gpu.json [--sections device,head,qlora8b,lora8b,lora1b,profile8b,storages1b,compiled8b,plan,generate] [--peer]

Random weights of the Llama 3.2 1B and 3.1 8B shapes, documents of mixed lengths (log-normal, mean about 250 tokens),
two thirds of each supervised. lmlab runs through its own module and Lightning loop; TRL (SFTTrainer, bf16, packing
bfd, SDPA, no checkpointing unless said) gets the same documents, the same adapter and about as many tokens a step.
Contenders alternate: A B A B. Peak memory is torch's max_memory_allocated. The file is written after each section, so
that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TOKENS = 8192  # a step
STEPS, WARMUP = 8, 3
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense, vendor's data sheets


# --- models and documents ----------------------------------------------------------------------------------------------


def base(shape: str) -> Any:
    """Drawn on the GPU itself, in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        torch.manual_seed(0)
        config = LlamaConfig(**COMMON, **SHAPES[shape])
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def adapter() -> Any:
    from lmlab.models.adapters import Lora

    return Lora(kind="lora", rank=16, alpha=32.0, dropout=0.0, target_modules="all-linear")


def stored(name: str) -> Any:
    from lmlab.models import quantize  # noqa: F401 - registers them
    from lmlab.registry import quants

    options = {"kind": name, "double_quant": True} if name in ("nf4", "fp4") else {"kind": name}
    return quants.class_of(name).model_validate(options)


def own_model(shape: str, storage: str, *, checkpointing: bool, compiled: bool = False) -> Any:
    """As `lmlab.assemble` builds it on a GPU."""
    from lmlab.models.attention import use_packed_attention
    from lmlab.models.build import compile_layers, enable_checkpointing
    from lmlab.models.fused import use_fused_layers
    from lmlab.models.hardware import move_rest_to

    model = base(shape)
    if checkpointing:
        enable_checkpointing(model)
    stored(storage).apply(model, compute_dtype=torch.bfloat16)
    move_rest_to(model, torch.bfloat16)
    use_fused_layers(model, compiled=compiled)
    model = adapter().apply(model, seed=0).cuda().train()
    use_packed_attention(model)
    if compiled:
        compile_layers(model)
    return model


def documents(count: int, *, longest: int = 2048, seed: int = 0) -> list[Any]:
    """Examples of random tokens, the first third of each not supervised."""
    from lmlab.records import IGNORE_INDEX, Example

    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.empty(()).log_normal_(5.2, 0.8, generator=generator).clamp(16, longest))
        ids = torch.randint(0, 128000, (length,), generator=generator)
        labels = ids.roll(-1)
        labels[: length // 3] = IGNORE_INDEX
        labels[-1] = 128001
        found.append(Example(ids, labels, (length,)))
    return found


def batches(examples: list[Any], tokens: int) -> list[Any]:
    """Flat rows of at most ``tokens``, in order."""
    from lmlab.data.packing import collate_flat

    rows: list[list[Any]] = [[]]
    for example in examples:
        if rows[-1] and sum(len(e.input_ids) for e in rows[-1]) + len(example.input_ids) > tokens:
            rows.append([])
        rows[-1].append(example)
    return [collate_flat(row) for row in rows[:-1]]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# --- contenders --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of the steps after the warm-up, read when the GPU is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def own_steps(model: Any, rows: list[Any], *, optim: str = "adamw") -> dict[str, Any]:
    """lmlab's module in lmlab's Trainer."""
    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader

    from lmlab.models.flops import step_flops
    from lmlab.models.hardware import choose_hardware
    from lmlab.models.head import NLL
    from lmlab.models.memory import MemoryMeter
    from lmlab.training.fit import build_trainer
    from lmlab.training.modules import SFTModule, Validation
    from lmlab.training.options import AdamW, TrainerConfig

    clock = Clock()

    class Tick(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clock.tick()

    options = TrainerConfig(
        max_steps=len(rows), max_epochs=None, batch_size=1, accumulate_grad_batches=1, accelerator="gpu", devices=1,
        num_nodes=1, strategy="auto", precision="bf16", gradient_clip_val=1.0, val_every_n_steps=10**6,
        val_batch_size=1, max_val_rows=None, log_every_n_steps=10**6, num_workers=0, compile=False, on_nonfinite="stop",
        max_nonfinite_steps=10, auto_batch=False, memory_plan=False, layer_stats=False,
    )  # fmt: skip
    schedule: dict[str, Any] = {
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "schedule": "constant",
        "min_lr_ratio": 0.0,
    }
    module = SFTModule(
        model, loss=NLL, optim=AdamW(name=optim, lr=1e-4, betas=[0.9, 0.95], eps=1e-8, **schedule),  # type: ignore[arg-type]
        max_steps=len(rows), validation=Validation(supervised_bytes=1), meter=MemoryMeter(on_cuda=True),
    )  # fmt: skip
    hardware = choose_hardware("gpu", "bf16", frozen_storage="bf16")
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as root:
        trainer = build_trainer(
            options, hardware, max_steps=len(rows), callbacks=[Tick()], root=Path(root), world_size=1
        )
        trainer.fit(module, train_dataloaders=DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    timed = rows[WARMUP:]
    seconds = clock.times[-1] - clock.times[WARMUP - 1]
    tokens = sum(row.num_tokens for row in timed)
    supervised = sum(len(row.supervised_index) for row in timed)
    squares = sum(float(row.cu_seqlens.diff().double().square().sum()) for row in timed)
    flops = step_flops(model, checkpointing=False).of(tokens, supervised, squares / tokens)
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "mfu": flops / seconds / peak_flops(),
        "loss": module.totals.loss / max(1.0, module.totals.supervised),
    }


def trl_steps(shape: str, examples: list[Any], *, checkpointing: bool = False) -> dict[str, Any]:
    """TRL's SFTTrainer, packing bfd: 4 rows of 2,048 a step, which it flattens into one of 8,192."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, seen = Clock(), []

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    class Counted(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(int(inputs["input_ids"].numel()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = get_peft_model(
        base(shape), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = [{"input_ids": e.input_ids.tolist(), "labels": [-100, *e.labels.tolist()[:-1]]} for e in examples]
    with tempfile.TemporaryDirectory() as root:
        told = SFTConfig(
            output_dir=root, per_device_train_batch_size=TOKENS // 2048, max_steps=STEPS + WARMUP, learning_rate=1e-4,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, bf16=True, packing=True, max_length=2048,
            packing_strategy="bfd", gradient_checkpointing=checkpointing, logging_steps=100, save_strategy="no",
            report_to="none", disable_tqdm=True, optim="adamw_torch_fused", max_grad_norm=1.0, dataset_num_proc=None,
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        trainer = Counted(
            model=model, args=told, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(PreTrainedTokenizerFast),
            callbacks=[Tick()],
        )  # fmt: skip
        trainer.train()
    seconds = clock.times[-1] - clock.times[WARMUP - 1]
    tokens = sum(seen[WARMUP:])
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def word_tokenizer(kind: Any) -> Any:
    """SFTTrainer wants one, though the rows are ids already."""
    from tokenizers import Tokenizer, models

    return kind(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0}, "<e>")), eos_token="<e>", pad_token="<e>"
    )


def peak_flops() -> float:
    name = torch.cuda.get_device_name()
    return next((v for k, v in BF16_PEAK.items() if k in name), float("nan"))


# --- sections ----------------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a, repeats=10)
    return {"name": torch.cuda.get_device_name(), "gemm_8192_bf16_tflops": 2 * 8192**3 / seconds / 1e12}


def timed(run: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median seconds, after two runs."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def head() -> dict[str, Any]:
    """Head and loss of 8,192 positions, width 4,096, vocabulary 128,256: milliseconds, MB, error against fp64 (by parts)."""
    from lmlab.models import linear_loss

    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for trained in (False, True):
        matrix = torch.nn.Linear(
            4096, 128256, bias=False, device="cuda", dtype=torch.bfloat16
        ).requires_grad_(trained)
        hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(0, 128256, (8192,), device="cuda")

        def own(matrix: Any = matrix, hidden: Any = hidden, labels: Any = labels) -> Any:
            args = (hidden, matrix.weight, None, labels, linear_loss.PLAIN_TAIL, linear_loss.HeadLoss())
            return linear_loss._ChunkedCrossEntropy.apply(*args)

        def full(matrix: Any = matrix, hidden: Any = hidden, labels: Any = labels) -> Any:
            return torch.nn.functional.cross_entropy(matrix(hidden).float(), labels, reduction="sum")

        def cce(matrix: Any = matrix, hidden: Any = hidden, labels: Any = labels) -> Any:
            # not used by lmlab: see linear_loss
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(hidden, matrix.weight, labels, reduction="sum", filter_eps=None)

        def liger(matrix: Any = matrix, hidden: Any = hidden, labels: Any = labels) -> Any:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss(reduction="sum")(matrix.weight, hidden, labels)

        full().backward()
        reference = hidden.grad.float()
        for name, run in (("own", own), ("full", full), ("cut-cross-entropy", cce), ("liger", liger)):
            key = f"{name}, head {'trained' if trained else 'frozen'}"
            try:
                free()
                hidden.grad = None
                matrix.weight.grad = None
                before = torch.cuda.memory_allocated()
                run().backward()
                error = ((hidden.grad.float() - reference).norm() / reference.norm()).item()
                peak = torch.cuda.max_memory_allocated() - before
                seconds = timed(lambda run=run: run().backward())
                found[key] = {"ms": seconds * 1e3, "mb": peak / 1e6, "difference_to_full": error}
            except Exception as problem:
                found[key] = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        del matrix, hidden
    return found


def own_run(
    shape: str, storage: str, *, checkpointing: bool = False, compiled: bool = False, rows: Any = None
) -> dict[str, Any]:
    free()
    rows = rows or batches(documents(700), TOKENS)[: STEPS + WARMUP]
    return own_steps(own_model(shape, storage, checkpointing=checkpointing, compiled=compiled), rows)


def lora(shape: str, *, peer: bool, rounds: int) -> dict[str, Any]:
    """bf16 LoRA, no checkpointing, against TRL packed."""
    found: dict[str, Any] = {"own": [], "trl": []}
    for _ in range(rounds):
        found["own"].append(own_run(shape, "bf16"))
        if peer:
            free()
            found["trl"].append(trl_steps(shape, documents(700)))
    return found


def profile(shape: str) -> dict[str, Any]:
    """Kernels of one forward and backward pass, bf16 LoRA, by the time they take: milliseconds, launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from lmlab.models.head import loss_sum

    free()
    model = own_model(shape, "bf16", checkpointing=False)
    batch = batches(documents(700), TOKENS)[0].to(torch.device("cuda"))

    def step() -> None:
        loss_sum(model, batch).backward()

    seconds = timed(step)
    with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    rows = [[e.key[:160], round(e.self_device_time_total / 1e3, 2), e.count] for e in kernels[:40]]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    return {"tokens": batch.num_tokens, "wall_ms": seconds * 1e3, "kernels_ms": busy, "kernels": rows}


def storages(shape: str) -> dict[str, Any]:
    """LoRA over each storage of the frozen base, no checkpointing."""
    found: dict[str, Any] = {}
    for _ in range(2):
        for storage in ("bf16", "int8", "nf4", "int4"):
            found.setdefault(storage, []).append(own_run(shape, storage))
    return found


def compiled(shape: str) -> dict[str, Any]:
    """Layers compiled one by one: what the first steps cost and what the others gain."""
    began = time.perf_counter()
    result = own_run(shape, "bf16", compiled=True)
    return result | {"whole_seconds": time.perf_counter() - began}


def qlora8b() -> dict[str, Any]:
    """Micro-batches of two documents of 2,048 tokens, checkpointing: memory and speed against LoRA in bf16."""
    from lmlab.data.packing import collate_flat
    from lmlab.records import Example

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 128000, (2048,), generator=generator) for _ in range(2 * (STEPS + WARMUP))]
    whole = [Example(i, i.roll(-1), (2048,)) for i in ids]
    rows = [collate_flat(whole[2 * i : 2 * i + 2]) for i in range(STEPS + WARMUP)]
    found: dict[str, Any] = {"bf16": [], "nf4": []}
    for _ in range(2):
        for storage in ("bf16", "nf4"):
            free()
            model = own_model("8b", storage, checkpointing=True)
            free()
            loaded = torch.cuda.memory_allocated() / 1e9
            optim = "paged_adamw8bit" if storage == "nf4" else "adamw"
            found[storage].append({"loaded_gb": loaded, **own_steps(model, rows, optim=optim)})
            del model
    return found


def generate() -> dict[str, Any]:
    """1B shape, 32 prompts of about 32 tokens, 64 new ones, greedy: tokens per second, and whether ids agree."""
    from lmlab.generation.decode import generate as own_generate
    from lmlab.generation.samplers import GreedySampler
    from lmlab.models.decoding import ready_to_decode

    free()
    model = base("1b").eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, 128000, (int(n),), generator=draw).tolist()
        for n in torch.randint(16, 48, (32,), generator=draw)
    ]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).cuda()
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).cuda()

    def own() -> list[list[int]]:
        sampler = GreedySampler(kind="greedy", max_new_tokens=64)
        with ready_to_decode(model, compute_dtype=torch.bfloat16, num_steps=64):
            rows = own_generate(model, prompts, sampler=sampler, eos_token_ids=(), seeds=range(32))
        return [row.token_ids for row in rows]

    def theirs(**told: Any) -> list[list[int]]:
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0,
            eos_token_id=None, **told,
        )  # fmt: skip
        return out[:, width:].tolist()

    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], list[list[int]]]] = {"own": own, "transformers": theirs}
    first = {name: run() for name, run in runs.items()}
    same = [a == b for a, b in zip(first["own"], first["transformers"], strict=True)]
    found["rows_with_equal_ids"] = sum(same)
    for _ in range(3):
        for name, run in runs.items():
            found.setdefault(name, []).append(32 * 64 / timed(run, repeats=1))
    try:
        began = time.perf_counter()
        theirs(cache_implementation="static")
        found["static_first_seconds"] = time.perf_counter() - began
        found["transformers static"] = [
            32 * 64 / timed(lambda: theirs(cache_implementation="static"), repeats=3)
        ]
    except Exception as problem:
        found["transformers static"] = f"{type(problem).__name__}: {problem}"[:300]
    return found


def planned(
    shape: str, storage: str, *, checkpointing: bool, lengths: list[int], supervised: int
) -> dict[str, float]:
    """Planned peaks of forward and backward in GB, on the CPU's stand-ins."""
    from transformers import LlamaConfig

    from lmlab.models.build import Scratch
    from lmlab.models.head import NLL
    from lmlab.models.plan import PlannedRun, Workload, plan

    scratch = Scratch(
        kind="scratch", name=shape, architecture="llama", config={}, gradient_checkpointing=checkpointing
    )

    def optimizer(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, fused=True)

    work = Workload(tuple(lengths), supervised, (16,), 16, flat=True)
    run = PlannedRun(
        scratch,
        LlamaConfig(**COMMON, **SHAPES[shape]),
        stored(storage),
        adapter(),
        NLL,
        optimizer,
        work,
        torch.bfloat16,
        "cuda",
        mixed=False,
    )
    return {phase: sum(kinds.values()) / 1e9 for phase, kinds in plan(run).phases.items()}


PLANS = [
    (shape, storage, checkpointing, tokens)
    for shape, storage, checkpointing, tokens in (
        ("1b", "bf16", False, 4096), ("1b", "bf16", True, 8192), ("1b", "nf4", False, 4096), ("1b", "nf4", True, 16384),
        ("8b", "bf16", False, 4096), ("8b", "nf4", True, 4096),
    )
]  # fmt: skip


def plan_rows(tokens: int) -> list[Any]:
    return batches(documents(400, seed=3), tokens)[:3]


def make_plans(out: Path) -> None:
    """In a process of its own, without the GPU, while others use it."""
    found = []
    for shape, storage, checkpointing, tokens in PLANS:
        largest = max(plan_rows(tokens), key=lambda row: row.num_tokens)
        lengths = largest.cu_seqlens.diff().tolist()
        try:
            values: Any = planned(
                shape,
                storage,
                checkpointing=checkpointing,
                lengths=lengths,
                supervised=len(largest.supervised_index),
            )
        except Exception as problem:
            values = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        found.append(values)
        out.write_text(json.dumps(found))


def plans(plan_file: Path) -> list[dict[str, Any]]:
    """Planned against measured peak of a training step."""
    made = json.loads(plan_file.read_text()) if plan_file.exists() else []
    found = []
    for (shape, storage, checkpointing, tokens), plan_values in zip(PLANS, made, strict=False):
        free()
        largest = max(plan_rows(tokens), key=lambda row: row.num_tokens)
        model = own_model(shape, storage, checkpointing=checkpointing)
        free()
        measured = own_steps(model, [largest] * (WARMUP + 1))["peak_gb"]
        row: dict[str, Any] = {
            "shape": shape,
            "storage": storage,
            "checkpointing": checkpointing,
            "tokens": largest.num_tokens,
            "measured_gb": measured,
        }
        if "error" in plan_values:
            row |= plan_values
        else:
            row["planned_gb"] = max(plan_values["forward"], plan_values["backward"], plan_values["optimizer"])
            row["error"] = row["planned_gb"] / measured - 1
        found.append(row)
        del model
    return found


def sections(options: argparse.Namespace, plan_file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "device", device
    yield "head", head
    yield "qlora8b", qlora8b
    yield "lora8b", lambda: lora("8b", peer=options.peer, rounds=options.rounds)
    yield "lora1b", lambda: lora("1b", peer=options.peer, rounds=options.rounds)
    yield "profile8b", lambda: profile("8b")
    yield "storages1b", lambda: storages("1b")
    yield "compiled8b", lambda: compiled("8b")
    yield "plan", lambda: plans(plan_file)
    yield "generate", generate


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--sections", default="")
    parser.add_argument("--peer", action="store_true", help="also TRL, which must be installed")
    parser.add_argument("--rounds", type=int, default=2, help="of lmlab and peer in turn")
    parser.add_argument("--plans", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plans:
        make_plans(options.plans)
        return 0
    plan_file = options.out.with_suffix(".plans.json")
    wanted = set(filter(None, options.sections.split(",")))
    side = None
    if not wanted or "plan" in wanted:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
        side = subprocess.Popen([sys.executable, __file__, "--plans", str(plan_file)], env=environment)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "seconds": {}}
    for name, run in sections(options, plan_file):
        if wanted and name not in wanted:
            continue
        began = time.perf_counter()
        try:
            if name == "plan" and side is not None:
                side.wait(timeout=60)
            found[name] = run()
        except Exception as problem:
            traceback.print_exc()
            found[name] = {"error": f"{type(problem).__name__}: {problem}"[:500]}
        free()
        found["seconds"][name] = round(time.perf_counter() - began, 1)
        options.out.write_text(json.dumps(found, indent=1))
        print(name, found["seconds"][name], json.dumps(found[name])[:1500], flush=True)
    return 0


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in (
        "torch",
        "transformers",
        "peft",
        "lightning",
        "bitsandbytes",
        "trl",
        "liger-kernel",
        "cut-cross-entropy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


if __name__ == "__main__":
    sys.exit(main())
