"""`make demo`: pretrain a model from scratch, fine-tune that very model with LoRA, QLoRA-tune the embedded base."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    stamp = datetime.now().strftime("%m%d-%H%M%S")
    base = f"outputs/pretrain/demo-base-{stamp}"
    steps = [
        (
            "1. Pretrain a small model from scratch, with its own tokenizer, on the documentation of your Python",
            [
                "task=pretrain",
                f"run_name=demo-base-{stamp}",
                "trainer.max_steps=250",
                "trainer.val_every_n_steps=125",
                "optim.lr=3e-3",
            ],
        ),
        (
            "2. Fine-tune that very model with LoRA",
            [
                "model=pretrained",
                f"model.name_or_path={base}",
                f"run_name=demo-lora-{stamp}",
                "trainer.max_steps=100",
            ],
        ),
        (
            "3. Fine-tune the embedded base with QLoRA: its weights really are stored in 4 bits",
            ["adapter=qlora", "quant=nf4", f"run_name=demo-qlora-{stamp}", "trainer.max_steps=100"],
        ),
    ]
    began = time.monotonic()
    for title, overrides in steps:
        command = ["train.py", *overrides, "output_root=outputs"]
        print(f"\n=== {title}\n$ python {' '.join(command)}\n", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            return code
    print(f"\ndemo done in {time.monotonic() - began:.0f} s")
    print(f"report of the last run: {ROOT / 'outputs' / 'sft' / f'demo-qlora-{stamp}' / 'report.html'}")
    print("(steps 2 and 3 tune different models: the one of step 1, minutes old, and the embedded one)")
    print("next: . .venv/bin/activate && python train.py -m experiment=skills adapter=none,lora,qlora")
    return 0


if __name__ == "__main__":
    sys.exit(main())
