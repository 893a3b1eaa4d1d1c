"""What other programs need of an export: llama.cpp's GGUF file, an Ollama Modelfile, vLLM's command line.

A step is run where its tool is found, and otherwise written down as a command that nobody has tried here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlab.records import UserError

CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
UNVERIFIED = "unverified: the tool was not at hand"


@dataclass(frozen=True)
class Step:
    """One way to use an export elsewhere.

    Attributes:
        name: of the tool.
        commands: what to type, with ``DIR`` for the export's directory.
        state: ``done``, ``failed: reason`` or that it is unverified.
    """

    name: str
    commands: tuple[str, ...]
    state: str

    def line(self) -> str:
        """For the terminal."""
        return f"{self.name} ({self.state}): {' && '.join(self.commands)}"


def find_converter() -> tuple[str, ...] | None:
    """How to start llama.cpp's converter: in $LLAMA_CPP, or on PATH; None where it is neither.

    A script is run by the Python of $LLAMA_CPP_PYTHON if that is set, since it needs the ``gguf`` package.
    """
    python = os.environ.get("LLAMA_CPP_PYTHON") or sys.executable
    home = os.environ.get("LLAMA_CPP")
    if home:
        script = Path(home).expanduser()
        script = script / CONVERTER if script.is_dir() else script
        if not script.is_file():
            raise UserError(
                f"no {CONVERTER} there", where=f"LLAMA_CPP={home}", fix="set it to a checkout of llama.cpp"
            )
        return python, str(script)
    found = shutil.which(CONVERTER) or shutil.which("convert-hf-to-gguf")
    return None if found is None else ((python, found) if found.endswith(".py") else (found,))


def gguf(folder: Path, *, name: str, dtype: str) -> Step:
    """Convert a merged export by llama.cpp's own converter, ``folder/NAME-TYPE.gguf``; failing leaves no file."""
    outtype = GGUF_TYPES[dtype]
    file = f"{name}-{outtype}.gguf"
    shown = (f"python {CONVERTER} DIR --outfile DIR/{file} --outtype {outtype}",)
    command = find_converter()
    if command is None:
        return Step("GGUF", shown, UNVERIFIED + " (set LLAMA_CPP to a checkout of llama.cpp)")
    target = folder / file
    arguments = [*command, str(folder), "--outfile", str(target), "--outtype", outtype, "--model-name", name]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == 0 and _is_gguf(target):
        return Step("GGUF", shown, f"done: {file}")
    target.unlink(missing_ok=True)
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return Step("GGUF", shown, f"failed: {_reason(lines)}")


def _reason(lines: Sequence[str]) -> str:
    if any("BPE pre-tokenizer was not recognized" in line for line in lines):
        return "llama.cpp knows only the pre-tokenizers of published models, and this tokenizer's is none of them"
    return lines[-1].strip()[:200]


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def modelfile(
    *, source: str, info: Mapping[str, Any], chat_template: str | None, stops: Sequence[str]
) -> str:
    """An Ollama Modelfile.

    Args:
        source: what stands after FROM: a GGUF file, or ``.`` for the safetensors beside it.
        info: lmlab.json.
        stops: texts that end an answer.
    """
    lines = [f"FROM {source}"]
    template = ollama_template(info, chat_template)
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    elif chat_template:
        lines.append(
            "# Ollama's templates are Go's: translate chat_template.jinja, or use /api/generate with raw=true"
        )
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    sampler = info.get("sampler") or {}
    ends = dict.fromkeys([*stops, *(sampler.get("stop") or [])])
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in ends]
    if sampler.get("kind") == "greedy":
        lines.append("PARAMETER temperature 0")
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if isinstance(sampler.get(name), (int, float)) and sampler.get("kind") != "greedy":
            lines.append(f"PARAMETER {name} {sampler[name]}")
    for ours, theirs in (("repetition_penalty", "repeat_penalty"), ("max_new_tokens", "num_predict")):
        if isinstance(sampler.get(ours), (int, float)):
            lines.append(f"PARAMETER {theirs} {sampler[ours]}")
    return "\n".join(lines) + "\n"


def ollama_template(info: Mapping[str, Any], chat_template: str | None) -> str | None:
    """The training's prompt in Go's template language, for the forms that lmlab ships; None for others."""
    from lmlab.export.templates import GO_CHATS, GO_PROMPTS

    if info.get("format") == "messages":
        return GO_CHATS.get(chat_template or "")
    return GO_PROMPTS.get(str(info.get("template") or ""))


def ollama(folder: Path, *, name: str, has_gguf: bool) -> Step:
    """``ollama create`` where Ollama is installed and its service answers."""
    shown = (f"cd DIR && ollama create {name.lower()} -f Modelfile", f"ollama run {name.lower()}")
    if shutil.which("ollama") is None:
        return Step("Ollama", shown, UNVERIFIED)
    if not has_gguf:
        return Step("Ollama", shown, "not run: it wants --gguf for most architectures")
    done = subprocess.run(
        ["ollama", "create", name.lower(), "-f", "Modelfile"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return Step("Ollama", shown, "done" if done.returncode == 0 else f"failed: {lines[-1][:200]}")


def vllm(*, name: str, kind: str, base: str | None, rank: int | None) -> Step:
    """The command that serves it; vLLM is a server, so it is not started here."""
    if kind == "adapter":
        command = (
            f"vllm serve {base} --enable-lora --max-lora-rank {_lora_rank(rank)} --lora-modules {name}=DIR"
        )
    else:
        command = f"vllm serve DIR --served-model-name {name}"
    state = "not started: it is a server" if shutil.which("vllm") else UNVERIFIED
    return Step("vLLM", (command,), state)


def _lora_rank(rank: int | None) -> int:
    """The smallest ``--max-lora-rank`` that vLLM takes for an adapter of this rank."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= (rank or 16)), 512)


def as_markdown(steps: Sequence[Step]) -> str:
    """For the model card."""
    return "\n\n".join(
        f"**{step.name}** ({step.state})\n\n```sh\n" + "\n".join(step.commands) + "\n```" for step in steps
    )
