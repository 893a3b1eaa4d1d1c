"""TRL's SFTTrainer and Hugging Face's Trainer (with PEFT) in the fine-tuning suite; runs in the peers' own environment.

    .venv-peers/bin/python benchmarks/finetune_peers.py FOLDER --library trl --layout grouped --mode lora --batch-size 8

FOLDER is what finetune_setting.py made: weights, initial adapter, rows of token ids. Nothing of lmlab is imported. The
timed rows are the same for every layout: in the given order after some warm-up steps, or, where the library itself
decides on the order (grouped, packed), as a whole second epoch over them, the first being the warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from side_by_side import status_gb, write_figures

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
PACKED_TOKENS_PER_TRIPLE = 128  # 8 triples of 123 tokens fill a packed row of 1,024
IN_ORDER = ("padded", "padding_free")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--library", choices=("trl", "hf"), required=True)
    parser.add_argument("--layout", choices=("padded", "grouped", "packed", "padding_free"), default="padded")
    parser.add_argument("--mode", choices=("lora", "full", "qlora"), default="lora")
    parser.add_argument("--batch-size", type=int, default=8, help="triples a step")
    parser.add_argument(
        "--shipped", action="store_true", help="the library's own defaults: bf16, checkpointing"
    )
    parser.add_argument("--rows", default="48:128", help="the timed rows, first:end")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--losses", action="store_true", help="record each step's loss (for the gate)")
    options = parser.parse_args()
    import_everything(options.library)
    after_imports = status_gb("VmRSS")
    trainer, clock, tokens, supervised = make_trainer(options)
    trainer.train()
    figures: dict[str, Any] = {
        "rss_after_imports_gb": after_imports,
        "versions": {name: version(name) for name in PACKAGES},
        "trained_tensors": sum(p.requires_grad for p in trainer.model.parameters()),
        "dtype": str(next(p for p in trainer.model.parameters() if p.requires_grad).dtype),
    }
    if options.losses:
        figures["losses"] = trainer.recorded
    elif clock.seconds:
        figures.update(
            seconds=clock.seconds,
            timed_steps=clock.steps,
            tokens_per_second=tokens / clock.seconds,
            supervised_per_second=supervised / clock.seconds,
        )
    write_figures(figures)
    return 0


def import_everything(library: str) -> None:
    """All of it, so that growth of memory afterwards is the training's."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    if library == "trl":
        import trl.trainer.sft_trainer  # noqa: F401  # pyright: ignore[reportMissingImports]


def make_trainer(options: argparse.Namespace) -> tuple[Any, Any, int, int]:
    """(trainer, clock, tokens and supervised tokens of the timed rows)."""
    rows = json.loads((options.folder / "rows.json").read_text(encoding="utf-8"))
    first, end = map(int, options.rows.split(":"))
    timed = rows[first:end]
    tokens = sum(len(row["input_ids"]) for row in timed)
    supervised = sum(label != -100 for row in timed for label in row["labels"][1:])
    if options.layout in IN_ORDER:
        warmup = options.warmup_steps
        used = rows[first - warmup * options.batch_size : end]
        epochs = 1
    else:  # the library orders rows itself
        warmup, used, epochs = None, timed, 2
    clock = make_clock(warmup)
    trainer = (trl_trainer if options.library == "trl" else hf_trainer)(options, used, epochs, clock)
    return trainer, clock, tokens, supervised


def make_clock(warmup: int | None) -> Any:
    """A callback that times from the end of ``warmup`` steps, or of the first epoch, to the end of the last step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began = self.ended = 0.0
            self.first_step = self.last_step = 0

        @property
        def seconds(self) -> float:
            return self.ended - self.began if self.began else 0.0

        @property
        def steps(self) -> int:
            return self.last_step - self.first_step

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if warmup == 0:
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended, self.last_step = time.perf_counter(), state.global_step
            if state.global_step == warmup:
                self.began, self.first_step = self.ended, state.global_step

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if warmup is None and not self.began:
                self.began, self.first_step = time.perf_counter(), state.global_step

    return Clock()


def load_model(options: argparse.Namespace) -> Any:
    """The base in fp32 (or nf4 with fp32 products), with the initial adapter unless all is trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    told: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if options.mode == "qlora":
        told["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(options.folder / "base", **told)
    model.config.use_cache = False
    if options.mode == "full":
        return model
    return PeftModel.from_pretrained(model, options.folder / options.mode / "adapter", is_trainable=True)


def arguments(options: argparse.Namespace, epochs: int) -> dict[str, Any]:
    """What both trainers are told: the optimizer and order of the setting, nothing saved, nothing reported."""
    told: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="lmlab-benchmark-peer-"),
        "per_device_train_batch_size": options.batch_size,
        "num_train_epochs": epochs,
        "learning_rate": options.lr,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "seed": 1,
        "train_sampling_strategy": "group_by_length" if options.layout == "grouped" else "sequential",
    }
    if not options.shipped:
        told.update(bf16=False, fp16=False, gradient_checkpointing=False)
    return told


def trl_trainer(options: argparse.Namespace, rows: list[Any], epochs: int, clock: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    told = arguments(options, epochs)
    told["max_length"] = 512
    if options.layout == "packed":
        told.update(packing=True, packing_strategy="bfd", max_length=8 * PACKED_TOKENS_PER_TRIPLE)
        told["per_device_train_batch_size"] = max(1, options.batch_size // 8)
    if options.layout == "padding_free":
        told.update(padding_free=True, max_length=None)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "base")
    tokenizer.pad_token = tokenizer.eos_token
    return recording(SFTTrainer)(
        model=load_model(options),
        args=SFTConfig(**told),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )


def hf_trainer(options: argparse.Namespace, rows: list[Any], epochs: int, clock: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "base")
    tokenizer.pad_token = tokenizer.eos_token
    return recording(Trainer)(
        model=load_model(options),
        args=TrainingArguments(**arguments(options, epochs)),
        train_dataset=Dataset.from_list(rows),
        # The usual collator for ids with labels: pads both to the longest of the batch.
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=[clock],
    )


def recording(kind: type[Any]) -> type[Any]:
    """The trainer itself; for the gate it also keeps each step's loss unrounded."""
    if "--losses" not in sys.argv:
        return kind

    class Recording(kind):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            made = super().compute_loss(*args, **kwargs)
            loss = made[0] if isinstance(made, tuple) else made
            self.__dict__.setdefault("recorded", []).append(float(loss.detach()))
            return made

    return Recording


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    sys.exit(main())
