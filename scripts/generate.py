"""Write text from a run directory, an adapter or a Hugging Face model: `python scripts/generate.py RUN --prompt ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmlab.config.compose import run_script
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.chat.prompts import Asked

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
            "begins_with", "json_schema", "max_new_tokens")  # fmt: skip
LISTS = {"stop": "stop", "bad_word": "bad_words"}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return run_script(lambda: _generate(options), stopped="\ninterrupted")  # while it loads


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument("model", help="a run's directory, an adapter, a model directory or a hub id")
    parser.add_argument("stdin", nargs="?", choices=("-",), help="-: prompts from standard input, one a line")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt a line, or .jsonl with a field prompt (and system)"
    )
    parser.add_argument(
        "--system", help="a system message before each prompt, for models trained on conversations"
    )
    parser.add_argument("--raw", action="store_true", help="prompts as they are, without the run's template")
    parser.add_argument(
        "--sampler",
        action="append",
        metavar="NAME",
        help="a name of conf/sampler or of the run's config (default: the run's own); several: every prompt under each of them",
    )
    for name, kind, help in (
        ("temperature", float, "divides the logits; 0: the most likely token"),
        ("top-k", int, "only the k most likely tokens"),
        ("top-p", float, "the most likely tokens that together reach p"),
        ("min-p", float, "tokens at least p times as likely as the most likely one"),
        ("typical-p", float, "locally typical tokens that together reach p"),
        ("repetition-penalty", float, "above 1: tokens already there are less likely"),
        ("no-repeat-ngram-size", int, "no n-gram of that many tokens twice"),
        ("begins-with", str, "the text begins with this"),
        ("json-schema", str, "a .json file: the text is JSON that this schema allows"),
        ("max-new-tokens", int, "at most that many"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=help)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends before this; several times")
    parser.add_argument("--bad-word", action="append", metavar="TEXT", help="never comes; several times")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has seed + 1, ...")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a further adapter on the same base",
    )
    parser.add_argument(
        "--use", metavar="NAME", help="that adapter, or base: without any (default: the first)"
    )
    parser.add_argument("--best", action="store_true", help="of a run: its best weights instead of its last")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the text as it is written, one prompt at a time (default: of one prompt, on a terminal)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="JSON lines, written batch by batch, instead of text here"
    )
    return parser


def _generate(options: argparse.Namespace) -> int:
    from lmlab.chat.choice import check_seed, chosen_sampler, further_adapters, using
    from lmlab.chat.prompts import read_prompts
    from lmlab.chat.writing import Output, full_prompts, write_texts
    from lmlab.plugged import samplers_of

    _refuse(options)
    adapters = further_adapters(options.adapter)
    names, changes = options.sampler or [None], _changes(options)
    further = samplers_of(options.model, wanted=names)
    if options.sampler:  # a wrong one is told before anything is loaded
        for name in names:
            chosen_sampler({}, name, changes, also=further)
    asked = read_prompts(options.prompt, options.stdin or options.prompts_file)
    check_seed(options.seed, where="--seed", texts=len(asked))
    if options.out:
        _refuse_lost_fields(asked)
    alone = len(asked) * len(names) == 1
    streams = options.stream if options.stream is not None else alone and sys.stdout.isatty()
    output = Output(options.out, streams=streams)
    from lmlab.load import load_for_use

    usable = load_for_use(
        options.model, accelerator=options.accelerator, use_best=options.best, adapters=adapters
    )
    with using(usable, options.use) as view:
        chosen = [chosen_sampler(view.sampler, name, changes, also=further) for name in names]
        full = full_prompts(view, asked, system=options.system, raw=options.raw)
        samplers = {name or own.kind: own for name, own in zip(names, chosen, strict=True)}
        rows = write_texts(
            view,
            asked,
            full,
            samplers=samplers,
            seed=options.seed,
            batch_size=1 if output.streams else options.batch_size,
            on_text=output.piece if output.streams else None,
        )
        return output.write(rows, asked=asked, full=full, samplers=list(samplers))


def _refuse(options: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other, one of which would go unheard."""
    if options.batch_size < 1:
        raise UserError("no batch", where="--batch-size", fix="1 or more")
    if options.stdin and options.prompts_file:
        raise UserError("two sources of prompts", where="-", fix="give either - or --prompts-file")
    if options.raw and options.system:
        raise UserError("a system message with --raw", where="--system", fix="leave one of them out")
    if options.out and options.stream:
        raise UserError("texts go to a file, not here", where="--stream", fix="leave --stream or --out out")
    names = options.sampler or []
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is named twice", where="--sampler", fix="name it once")
    if (
        options.out
        and options.prompts_file
        and os.path.realpath(options.out) == os.path.realpath(options.prompts_file)
    ):
        raise UserError(
            "the prompts would be overwritten", where=options.out, fix="name another file with --out"
        )
    for text in options.stop or []:
        if "\\n" in text:
            print(
                f"warning: --stop '{text}' holds a backslash and an n, not a new line: in bash write $'\\n'",
                file=sys.stderr,
            )


def _refuse_lost_fields(asked: Sequence[Asked]) -> None:
    """Raise UserError for a prompt's line with a field that its output line has for something else."""
    from lmlab.chat.writing import ROW

    for one in asked:
        if taken := [name for name in ROW if name in one.carried]:
            what = f"its field {taken[0]} would be overwritten in the output"
            raise UserError(what, where=one.where, fix="give that field another name")


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line changes."""
    given = {name: getattr(options, name) for name in SETTINGS}
    given |= {field: getattr(options, option) for option, field in LISTS.items()}
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
