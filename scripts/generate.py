"""Write text from a run directory, an adapter or a Hugging Face model: `python scripts/generate.py RUN --prompt ...`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lmlab.config.compose import load_env, report_error
from lmlab.records import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument("model", help="a run's directory, an adapter, a model directory or a hub id")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--system", help="a system message before each prompt, for models trained on conversations"
    )
    parser.add_argument("--prompts-file", help="one prompt a line, or .jsonl with a prompt field")
    parser.add_argument(
        "--sampler", help="greedy, temperature, top_k, top_p, top_p_temperature (default: the run's own)"
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has seed + 1, ...")
    parser.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, without the run's template"
    )
    parser.add_argument("--best", action="store_true", help="of a run: its best weights instead of its last")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--out", help="write JSON lines there instead of text to the terminal")
    options = parser.parse_args(arguments)
    load_env()
    try:
        return _generate(options)
    except UserError as error:
        return report_error(error)


def _generate(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    sampler_values = _sampler_values(options)
    from lmlab.generation.samplers import load_sampler
    from lmlab.load import load_for_use

    usable = load_for_use(options.model, accelerator=options.accelerator, use_best=options.best)
    if options.sampler is None:  # the run's own, or greedy where there is none
        sampler_values = {**(usable.sampler or _named_sampler("greedy")), **sampler_values}
    sampler = load_sampler(sampler_values)
    if options.raw:
        full = prompts
    else:
        full = [usable.prompting(prompt, system=options.system) for prompt in prompts]
    seeds = [options.seed + index for index in range(len(prompts))]
    texts = usable.generator(full, sampler=sampler, seeds=seeds)
    rows = [
        {
            "prompt": prompt,
            "sampler": sampler.kind,
            "seed": seed,
            "text": text.text,
            "new_tokens": text.new_tokens,
            "stop_reason": text.stop_reason,
        }
        for prompt, seed, text in zip(prompts, seeds, texts, strict=True)
    ]
    if options.out:
        Path(options.out).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        print(options.out)
        return 0
    for row, given in zip(rows, full, strict=True):
        print((given if given == row["prompt"] else f"> {row['prompt']}\n") + row["text"])
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file:
        try:
            lines = [
                line
                for line in Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
            prompts += (
                [json.loads(line)["prompt"] for line in lines]
                if options.prompts_file.endswith(".jsonl")
                else lines
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"prompts cannot be read: {error}",
                where=options.prompts_file,
                fix="one a line, or .jsonl with a prompt field",
            ) from error
    if not prompts:
        raise UserError("no prompt", where="--prompt", fix="give --prompt '...' or --prompts-file FILE")
    return prompts


def _sampler_values(options: argparse.Namespace) -> dict[str, Any]:
    """The chosen sampler's values (conf/sampler) with what the command line changes."""
    values = {} if options.sampler is None else _named_sampler(options.sampler)
    changed = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
    }
    return {**values, **{key: value for key, value in changed.items() if value is not None}}


def _named_sampler(name: str) -> dict[str, Any]:
    from lmlab.config.named import named_sampler

    return named_sampler(name).model_dump()


if __name__ == "__main__":
    sys.exit(main())
