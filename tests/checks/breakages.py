"""Each invariant of scripts/check.py broken on purpose, in the code that it is about and nowhere else.

A breakage is a module of lmlab and a function that puts something wrong into it. In this process ``put`` is
``monkeypatch.setattr``; in another, and in the processes that it starts, broken/sitecustomize.py puts it in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Put = Callable[[Any, str, Any], None]


def average_of_averages(modules: Any, put: Put) -> None:
    """Each micro-batch is divided by its own tokens, as Lightning's users usually have it."""
    right = modules.CausalLMModule.training_step

    def training_step(self: Any, batch: Any, batch_index: int) -> Any:
        return right(self, batch, batch_index) / max(1, len(batch.supervised_index))

    put(modules.CausalLMModule, "training_step", training_step)


def leak(attention: Any, put: Put) -> None:
    """In rows longer than those of the probe the last three documents see one another."""
    right = attention.Documents.__init__

    def init(self: Any, cu_seqlens: Any, *device: Any) -> None:
        import torch

        if int(cu_seqlens[-1]) > 64 and len(cu_seqlens) > 3:
            cu_seqlens = torch.cat([cu_seqlens[:-3], cu_seqlens[-1:]])
        right(self, cu_seqlens, *device)

    put(attention.Documents, "__init__", init)


def no_fresh_adapter(adapters: Any, put: Put) -> None:
    """B does not begin at zero."""
    right = adapters.Lora.apply

    def apply(self: Any, model: Any, **told: Any) -> Any:
        adapted = right(self, model, **told)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.data.fill_(1e-3)
        return adapted

    put(adapters.Lora, "apply", apply)


def shifted_positions(decode: Any, put: Put) -> None:
    """With the cache each token is told the position after its own."""
    right = decode._Batch._call

    def call(self: Any, given: dict[str, Any]) -> Any:
        if given["input_ids"].shape[1] == 1:
            given = {**given, "position_ids": given["position_ids"] + 1}
        return right(self, given)

    put(decode._Batch, "_call", call)


def scaled_tensor(assemble: Any, put: Put) -> None:
    """The first tensor of saved weights is a thousandth too large."""
    right = assemble.save_weights

    def save_weights(model: Any, tokenizer: Any, folder: Path, **told: Any) -> None:
        from safetensors.torch import load_file, save_file

        right(model, tokenizer, folder, **told)
        (file,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
        tensors = load_file(file)
        first = min(tensors)
        save_file({**tensors, first: tensors[first] * 1.001}, file, metadata={"format": "pt"})

    put(assemble, "save_weights", save_weights)


def global_random(decode: Any, put: Put) -> None:
    """Sampling draws from the random state that training has too."""
    right = decode.draw

    def draw(scores: Any, generators: Any) -> Any:
        import torch

        torch.rand(1)
        return right(scores, generators)

    put(decode, "draw", draw)


def forgotten_moments(checkpoint: Any, put: Put) -> None:
    """A resumed run begins with the optimizer's moments at zero."""
    right = checkpoint.FolderCheckpointIO.load_checkpoint

    def load_checkpoint(self: Any, *given: Any, **told: Any) -> Any:
        state = right(self, *given, **told)
        for optimizer in state["optimizer_states"]:
            for of_parameter in optimizer["state"].values():
                of_parameter["exp_avg"].zero_()
        return state

    put(checkpoint.FolderCheckpointIO, "load_checkpoint", load_checkpoint)


def no_all_reduce(strategy: Any, put: Put) -> None:
    """Ranks keep their gradients to themselves."""
    from torch.nn.parallel import DistributedDataParallel

    right = DistributedDataParallel.forward

    def forward(self: Any, *given: Any, **told: Any) -> Any:
        self.require_backward_grad_sync = False
        return right(self, *given, **told)

    put(DistributedDataParallel, "forward", forward)


BREAKAGES: dict[str, tuple[str, Callable[[Any, Put], None]]] = {
    "accumulation": ("lmlab.training.modules", average_of_averages),
    "packing": ("lmlab.models.attention", leak),
    "lora_init": ("lmlab.models.adapters", no_fresh_adapter),
    "cache": ("lmlab.generation.decode", shifted_positions),
    "save_load": ("lmlab.assemble", scaled_tensor),
    "sampling": ("lmlab.generation.decode", global_random),
    "resume": ("lmlab.training.checkpoint", forgotten_moments),
    "ddp": ("lmlab.training.strategy", no_all_reduce),
}
"""By the check that must find it."""
