"""Make of a run what others can use: `python scripts/export.py RUN --to DIR`.

An adapter is merged into the base that it was trained on; the result is a Hugging Face directory with tokenizer, model
card and certificate. In a fresh process the export is compared with the run, and refused if it computes anything else.

    python scripts/export.py outputs/sft/my-run --to exports/my-model
    python scripts/export.py outputs/sft/my-run --to exports/my-model --dtype bf16 --best --gguf --ollama --vllm
    python scripts/export.py outputs/sft/my-run --to exports/my-adapter --adapter-only --base-name meta-llama/Llama-3.2-1B
    python scripts/export.py outputs/sft/my-run --to exports/mixed --adapters code=outputs/sft/other:0.5
    python scripts/export.py --verify exports/my-model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lmlab.config.compose import run_script
from lmlab.records import UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    work = _verify if options.verify else _export
    return run_script(lambda: work(options), stopped="stopped; nothing was exported")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's directory, e.g. outputs/sft/NAME")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the export goes")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    parser.add_argument("--best", action="store_true", help="the run's best weights instead of its last")
    parser.add_argument(
        "--dtype", default="fp32", help="how weights are stored: fp32 (default), bf16 or fp16"
    )
    parser.add_argument(
        "--base",
        default="dequantized",
        help="dequantized (default): what the adapter was trained on; original: the difference is reported",
    )
    parser.add_argument(
        "--adapters",
        default="",
        metavar="NAME=DIR:WEIGHT,...",
        help="merge these too, each times its weight; default:WEIGHT weighs the run's own (else 1)",
    )
    parser.add_argument("--adapter-only", action="store_true", help="the adapter without its base, for PEFT")
    parser.add_argument("--base-name", help="what the card and the adapter say of the base, e.g. a hub id")
    parser.add_argument("--license", help="of the weights, as the hub names it: apache-2.0, mit, other, ...")
    parser.add_argument("--license-name", help="with --license other: its name")
    parser.add_argument("--license-link", help="with --license other: where it is to be read")
    parser.add_argument(
        "--language", action="append", default=[], help="of the texts, e.g. en; several times"
    )
    parser.add_argument("--gguf", action="store_true", help="convert by llama.cpp ($LLAMA_CPP or on PATH)")
    parser.add_argument("--ollama", action="store_true", help="run `ollama create` where Ollama is installed")
    parser.add_argument("--vllm", action="store_true", help="print how vLLM serves it")
    parser.add_argument("--wandb-artifact", metavar="NAME", help="log the export to the run's W&B project")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="DIR",
        help="check an export; with RUN also compare it with the run anew",
    )
    return parser


def _export(options: argparse.Namespace) -> int:
    if not options.run or not options.to:
        raise UserError(
            "what is to be exported, and where to", where="RUN --to DIR", fix="give both, or --verify DIR"
        )
    from lmlab.export.job import ExportJob, parse_adapters
    from lmlab.exporting import export

    adapters = parse_adapters(options.adapters)
    job = ExportJob(
        run=options.run,
        best=options.best,
        dtype=options.dtype,
        base=options.base,
        adapters=adapters,
        adapter_only=options.adapter_only,
        base_name=options.base_name,
        accelerator=options.accelerator,
    )
    if options.wandb_artifact:
        from lmlab.exporting import check_artifact

        check_artifact(job)
    licence = {
        "license": options.license,
        "license_name": options.license_name,
        "license_link": options.license_link,
    }
    found = export(
        job,
        options.to,
        overwrite=options.overwrite,
        licence={name: value for name, value in licence.items() if value},
        languages=tuple(options.language),
        want=frozenset(name for name in ("gguf", "ollama") if getattr(options, name)),
        say=lambda text: print(text, file=sys.stderr),
    )
    _show(found.certificate)
    for step in found.steps:
        if step.name.lower() != "vllm" or options.vllm:
            print(step.line().replace("DIR", str(options.to)))
    if options.wandb_artifact:
        from lmlab.exporting import log_to_wandb

        log_to_wandb(job, options.to, options.wandb_artifact, found.certificate, say=print)
    print(options.to)
    failed = [step for step in found.steps if step.state.startswith("failed")]
    return 1 if failed else 0


def _show(certificate: dict[str, object]) -> None:
    from lmlab.export.card import COMPARED

    differences: dict[str, dict[str, float]] = certificate["differences"]  # type: ignore[assignment]
    for name, each in differences.items():
        print(
            f"{COMPARED[name]}: largest difference {each['max_relative']:.1e} of the largest logit, "
            f"greedy choices alike at {each['greedy_agreement']:.2%} of {each['positions']} positions"
        )
    if certificate["verdict"] == "reported":
        print("reported, not certified: the adapter was trained over another base (--base original)")
    else:
        print(f"certified: within {certificate['bound']:.1e}{_rounding(certificate['dtype'])}")


def _rounding(dtype: object) -> str:
    return "" if dtype == "fp32" else f" but for the rounding to {dtype}, which the last difference tells"


def _verify(options: argparse.Namespace) -> int:
    from lmlab.certify import verify, verify_against_run

    if options.run:
        from lmlab.export.job import ExportJob, parse_adapters

        job = ExportJob(
            run=options.run, adapters=parse_adapters(options.adapters), accelerator=options.accelerator
        )
        _show(verify_against_run(job, options.verify))
        return 0
    certificate, worst = verify(options.verify)
    files = f"{len(certificate['files'])} files are those certified"
    if worst is None:
        print(f"{files}; an adapter: its logits need its base, so give RUN too to compare them")
    else:
        print(f"{files}; logits are those certified, {worst:.1e} of the largest off at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
