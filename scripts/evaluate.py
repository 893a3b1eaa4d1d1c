"""Measure models on any data: `python scripts/evaluate.py RUN_OR_MODEL [more...] --data FILE ...`.

Loss, perplexity and bits per byte of texts; of questions with answers also exact match and ROUGE of what is generated.
`--compare base,adapter,merged,none,nf4,...` measures forms of the same model, `--suite` tasks of the lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmlab.config.compose import run_script
from lmlab.records import UserError

# Python puts a script's folder first, and in it this file would be the package `evaluate` that tasks of the harness import.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return run_script(lambda: _evaluate(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a run's directory, an adapter, a model directory or a hub id",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="DATA",
        help="files, folders or globs; val or test (the run's own); a name in conf/data",
    )
    add(
        "--compare",
        metavar="FORMS",
        help="base, adapter, merged, a storage (none, bf16, int8, nf4, ...) or base+nf4; comma-separated",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting under data. or sampler., as data.max_length=1024 sampler.top_k=20",
    )
    add(
        "--task",
        choices=("sft", "pretrain"),
        help="pretrain scores every token of a record, sft the response (default: the run's own; sft for files)",
    )
    add(
        "--side",
        choices=("train", "val", "test", "all"),
        help="of the split (default: val of a named data set, all of files)",
    )
    add("--limit", type=int, metavar="N", help="only the first N records of each data set and task")
    add("--stride", type=int, metavar="N", help="overlapping windows of a text, N tokens apart")
    add("--batch-size", type=int, default=16, metavar="N", help="rows in one forward pass")
    _add_answers(add)
    _add_more(add)
    return parser


def _add_answers(add: Callable[..., Any]) -> None:
    """What is generated, and how."""
    add(
        "--sampler",
        help="of the answers: a name in conf/sampler or in the run's config (default: the run's own, or greedy)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="the same as --set sampler.max_new_tokens=N")
    add(
        "--answers",
        type=int,
        default=200,
        metavar="N",
        help="answers generated per data set, for its first questions; 0 for none (default 200)",
    )
    add("--seed", type=int, default=0, help="of the first answer; the next has seed + 1, ...")


def _add_more(add: Callable[..., Any]) -> None:
    """What is measured besides, and where it goes."""
    add("--suite", metavar="TASK", help="tasks of the lm-evaluation-harness, comma-separated")
    add("--suite-path", metavar="DIR", help="a folder of task files of your own")
    add(
        "--quantization-report",
        metavar="DIR",
        help="write there what each storage does to the weights and logits of the first model",
    )
    add("--best", action="store_true", help="of a run: its best weights instead of its last")
    add("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    add("--out", metavar="DIR", help="write results.json, results.md and the generated answers there")
    add("--json", action="store_true", help="print the results as JSON")


def _evaluate(options: argparse.Namespace) -> int:
    _check(options)
    _check_report(options)
    from lmlab.evaluate import Asked, Suites, chosen_sampler, evaluate
    from lmlab.evaluation.table import show, with_differences
    from lmlab.measured import DataChoice
    from lmlab.variants import Variant

    of_data, of_sampler = _settings(options)
    choices = tuple(
        DataChoice.of(given, settings=of_data, task=options.task, side=options.side) for given in options.data
    )
    further = _further_samplers(options)
    if options.sampler is not None:  # of a run's own sampler nothing is known yet
        chosen_sampler(options.sampler, of_sampler, {}, also=further)
    words = options.compare.split(",") if options.compare else [""]
    variants = [
        Variant.parse(model, each.strip()) if each else Variant(model)
        for model in options.models
        for each in words
    ]
    suites = None
    if options.suite:
        from lmlab.evaluation.harness import load_suites

        names = [name.strip() for name in options.suite.split(",")]
        suites = Suites(load_suites(names, folder=options.suite_path), options.limit)
    if options.quantization_report:
        found = _quantization_report(options)
        if not choices and suites is None:
            if options.json:
                print(json.dumps(found, indent=1, ensure_ascii=False))
            return 0
    asked = Asked(
        data=choices,
        limit=options.limit,
        stride=options.stride,
        batch_size=options.batch_size,
        sampler=options.sampler,
        sampler_settings=of_sampler,
        further_samplers=further,
        answers=options.answers,
        seed=options.seed,
        suites=suites,
        accelerator=options.accelerator,
        use_best=options.best,
    )
    results = evaluate(variants, asked, say=lambda text: print(text, file=sys.stderr))
    rows = with_differences([result.row() for result in results])
    if options.out:
        _write(Path(options.out), results, rows)
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        from lmlab.tracking.transcript import screen

        show(screen(), rows)
        if options.out:
            print(f"written: {options.out}")
    return 0


def _further_samplers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Those in the configs of the runs, should ``--sampler`` be none of conf/sampler; of two with one name the first model's."""
    from lmlab.plugged import samplers_of

    found: dict[str, dict[str, Any]] = {}
    for model in reversed(options.models):
        found |= samplers_of(model, wanted=[options.sampler])
    return found


def _check(options: argparse.Namespace) -> None:
    """What can be wrong before anything is read."""
    from lmlab.chat.choice import check_seed

    check_seed(options.seed, where="--seed")
    if not (options.data or options.suite or options.quantization_report):
        raise UserError(
            "nothing to measure on", where="--data", fix="give --data FILE, --data val, or --suite TASK"
        )
    for name, least in (("limit", 1), ("stride", 1), ("batch_size", 1), ("answers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(
                f"{value} is too small", where=f"--{name.replace('_', '-')}", fix=f"at least {least}"
            )
    if options.out:
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot be made: {error.strerror or error}",
                where=f"--out {options.out}",
                fix="choose another folder",
            ) from error
    if options.suite_path and not options.suite:
        raise UserError(
            "--suite-path without --suite", where="--suite-path", fix="name the tasks: --suite TASK"
        )


def _check_report(options: argparse.Namespace) -> None:
    """The report is of whole texts and of one model's stored weights: what says otherwise would be left unheard."""
    if not options.quantization_report:
        return
    unheard = {
        "--best": options.best,
        "--set data.*": any(text.startswith("data.") for text in options.set),
        "--task": options.task,
        "--side": options.side,
        "--stride": options.stride,
        "a second model": len(options.models) > 1,
    }
    if not options.data and not options.suite:  # there is no table either
        unheard |= {
            "--out": options.out,
            "--sampler": options.sampler,
            "--max-new-tokens": options.max_new_tokens,
            "--set": options.set,
        }
    given = [name for name, value in unheard.items() if value]
    if given:
        raise UserError(
            f"{', '.join(given)}: nothing that the report goes by",
            where="--quantization-report",
            fix="leave it out, or measure in a call of its own",
        )


def _settings(options: argparse.Namespace) -> tuple[list[str], tuple[tuple[str, Any], ...]]:
    """(``data.key=value`` as given, fields of the sampler)."""
    import yaml

    of_data, of_sampler = list[str](), dict[str, Any]()
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals or not key.startswith(("data.", "sampler.")):
            raise UserError(f"cannot set '{text}'", where="--set", fix="data.KEY=VALUE or sampler.KEY=VALUE")
        if key.startswith("data."):
            of_data.append(text)
            continue
        try:
            of_sampler[key.removeprefix("sampler.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"cannot read '{text}'", where="--set", fix="write the value as in YAML"
            ) from error
    if options.max_new_tokens is not None:
        of_sampler["max_new_tokens"] = options.max_new_tokens
    return of_data, tuple(of_sampler.items())


def _write(folder: Path, results: Any, rows: list[dict[str, Any]]) -> None:
    from lmlab.evaluation.table import markdown, row_names
    from lmlab.journal import slug

    (folder / "results.json").write_text(
        json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "results.md").write_text(markdown(rows), encoding="utf-8")
    taken = Counter[str]()
    for name, result in zip(row_names(rows), results, strict=True):
        for data, texts in result.texts.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
            called = slug(f"{name}-{Path(data).stem}")
            taken[called] += 1  # files of different folders may have one name
            number = f"-({taken[called]})" if taken[called] > 1 else ""
            (folder / f"answers-{called}{number}.jsonl").write_text(lines, encoding="utf-8")


def _quantization_report(options: argparse.Namespace) -> dict[str, Any]:
    """What was found on the texts of ``--data``, or on 50 of the embedded data set where there are none."""
    from lmlab.evaluation.quantization import KINDS, quantization_report
    from lmlab.measured import texts_of
    from lmlab.variants import WEIGHTS

    words = [word.strip() for word in (options.compare or "").split(",")]
    kinds = [word for word in words if word and word not in (*WEIGHTS, "none")] or list(KINDS)
    found = quantization_report(
        options.models[0],
        texts=texts_of(
            options.data or ["python_help"], limit=options.limit or (None if options.data else 50)
        ),
        kinds=kinds,
        accelerator=options.accelerator,
        folder=Path(options.quantization_report),
    )
    print(f"written: {options.quantization_report}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
