"""Whether an export computes what was trained: both loaded anew in a fresh process, and compared.

`python -m lmlab.certify` is that process; its order comes as JSON on stdin, and the last line of stdout is the answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmlab.export.certificate import (
    BOUND,
    FORMAT,
    NEW_TOKENS,
    PROMPT_TOKENS,
    TEXTS,
    Difference,
    as_json,
    check_files,
    check_reference,
    difference,
    logits_of,
    open_plain,
    reference_of,
    verdict,
    write_on,
)
from lmlab.export.job import ExportJob
from lmlab.journal import RunDir, read_json, versions_of
from lmlab.records import RunFailedError, UserError

BUILT_IN = (
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a little girl who",
    "def mean(values):\n    return",
    "Question: What is the capital of France?\nAnswer:",
    "1, 2, 3, 5, 8, 13,",
)
"""Texts for the certificate of a run whose validation prompts are gone."""


def load_as_trained(job: ExportJob, *, base: str | None = None) -> Any:
    """`lmlab.load.UsableModel` of the run with all adapters of the job in force by their weights, computing in fp32."""
    from lmlab.load import FIRST, load_for_use
    from lmlab.models.quantize import Unquantized

    further = {name: path for name, (path, _) in job.adapters.items() if name != FIRST}
    original = (base or job.base) == "original"
    usable = load_for_use(
        job.run,
        accelerator=job.accelerator,
        use_best=job.best,
        adapters=further or None,
        quant=Unquantized(kind="none") if original else None,
    )
    compute_in_fp32(usable.model)
    if job.adapters:
        _mix(usable.model, {FIRST: 1.0, **{name: weight for name, (_, weight) in job.adapters.items()}})
    return usable


def _mix(model: Any, weights: Mapping[str, float]) -> None:
    """Put several adapters in force at once, each at ``weight`` times its own scale."""
    from peft.tuners.lora import LoraLayer

    try:
        model.base_model.set_adapter(list(weights))
    except ValueError as error:  # PEFT, of whole modules or token rows that two adapters bring
        raise UserError(
            f"these adapters cannot be in force together: {error}",
            where="--adapters",
            fix="export them one by one",
        ) from error
    for layer in model.modules():
        for name, weight in weights.items():
            whole = _has_no_weight(layer, name)
            if whole and weight != 1:
                raise UserError(
                    f"adapter '{name}' {whole}, which has no weighted sum",
                    where="--adapters",
                    fix="give it the weight 1",
                )
            if isinstance(layer, LoraLayer):
                layer.set_scale(name, weight)


def _has_no_weight(layer: Any, name: str) -> str | None:
    """What of an adapter's part in ``layer`` is not scaled by its weight, None if all of it is."""
    from peft.utils.other import ModulesToSaveWrapper

    if name in getattr(layer, "lora_variant", {}):
        return "is DoRA"
    if isinstance(layer, ModulesToSaveWrapper) and name in layer.modules_to_save:
        return "brings whole modules (modules_to_save)"
    if name in getattr(layer, "trainable_tokens_delta", {}):
        return "brings trained token rows"
    return None


def compute_in_fp32(model: Any) -> None:
    """Have a loaded model compute in fp32 whatever its base is stored in: no stored value changes.

    On machines with fast 16-bit products lmlab keeps embeddings and norms in bf16 too; as fp32 they are the same
    numbers, and products of them say what the weights are and not how a machine rounds.
    """
    import torch

    from lmlab.models.quantize import StoredEmbedding

    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            if isinstance(module, StoredEmbedding):
                type(module).compute_dtype = torch.float32
            else:
                module.compute_dtype = torch.float32
        if type(module).__name__ == "StoredLinear" or isinstance(module, StoredEmbedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()


# --- the fresh process -----------------------------------------------------------------------------------------------


def certify_apart(job: ExportJob, made: Path) -> dict[str, Any]:
    """`certify` in a process of its own, so that nothing in memory can stand in for what is on disk.

    Raises:
        UserError: what that process found.
        RunFailedError: it ended without a word, as when memory ran out.
    """
    order = {"job": asdict(job), "export": str(made)}
    done = subprocess.run(
        [sys.executable, "-m", "lmlab.certify"],
        input=json.dumps(order),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_packages())},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0:
        return json.loads(last)
    if done.returncode == UserError.exit_code and last.startswith("{"):
        raise UserError(**json.loads(last))
    detail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise RunFailedError(f"the comparison did not come to an end: {detail[:300]}")


def _packages() -> list[str]:
    """Where Python looks for packages, without the folder of the script that it was started with."""
    script = Path(sys.argv[0]).resolve().parent
    return [place for place in sys.path if place and Path(place).resolve() != script]


def certify(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Compare the run as trained, merged, and the export on disk; the certificate without hashes of files.

    Raises:
        UserError: a difference above the bound.
    """
    import torch

    trained = load_as_trained(job, base="dequantized")
    texts = write_on(trained.model, _prompts(job, trained))
    own, found, certified = _compare(job, folder, trained.model, texts)
    verdict(found, bound=BOUND, certified=certified)
    return {
        "format": FORMAT,
        "verdict": "certified" if job.base == "dequantized" else "reported",
        "run": RunDir(job.run).path.name,
        "weights": "best" if job.best else "last",
        "kind": "adapter" if job.adapter_only else "model",
        "base": job.base if trained.adapter_names else None,
        "base_stored_as": trained.quant.model_dump(mode="json"),
        "adapters": {"default": 1.0, **{name: weight for name, (_, weight) in job.adapters.items()}},
        "dtype": job.dtype,
        "bound": BOUND,
        "bounded": certified,
        "texts": len(texts),
        "differences": as_json(found),
        "reference": reference_of(texts, own),
        "made_with": {
            "python": sys.version.split()[0],
            **versions_of("lmlab", "torch", "transformers", "peft", "bitsandbytes"),
            "device": trained.hardware.device.type,
            "threads": torch.get_num_threads(),
        },
    }


def _compare(
    job: ExportJob, folder: Path, trained: Any, texts: list[list[int]]
) -> tuple[list[Any], dict[str, Difference], list[str]]:
    """(The export's logits, all comparisons, those that the bound is for).

    In 16 bits the export has to be the rounded merge; how far that is from what was trained is the format's doing.
    """
    from lmlab.models.merge import merged

    adapter = logits_of(trained, texts)
    if job.adapter_only:
        own = logits_of(_with_peft_alone(job, folder), texts)
        return own, {"export_from_trained": difference(adapter, own, bound=BOUND)}, ["export_from_trained"]
    original = load_as_trained(job).model if job.base == "original" else None
    plain = merged(trained if original is None else original)
    del original
    in_memory = logits_of(plain, texts)
    rounded = in_memory
    if job.dtype != "fp32":
        round_weights(plain, job.dtype)
        rounded = logits_of(plain, texts)
    del plain
    own = logits_of(open_plain(folder), texts)
    found = {
        "merged_from_trained": difference(adapter, in_memory, bound=BOUND),
        "export_from_merged": difference(rounded, own, bound=BOUND),
        "export_from_trained": difference(adapter, own, bound=BOUND),
    }
    certified = ["export_from_merged"]
    if job.base == "dequantized":
        certified.insert(0, "merged_from_trained")
        if job.dtype == "fp32":
            certified.append("export_from_trained")
    return own, found, certified


def round_weights(model: Any, dtype: str) -> None:
    """Each fp32 weight to the nearest that ``dtype`` holds, in place and still in fp32: what an export stores."""
    import torch

    stored = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))


def _prompts(job: ExportJob, usable: Any) -> list[list[int]]:
    """The run's validation prompts spread over the split, or built-in ones; cut to what fits the model's context."""
    from lmlab.generation.decode import context_length

    prepared = Path(str(read_json(RunDir(job.run).info).get("prepared")))
    asked = [each["prompt"] for each in read_json(prepared / "meta.json").get("val_prompts") or []]
    asked = asked or [usable.prompting(text) for text in BUILT_IN]
    count = min(TEXTS, len(asked))
    chosen = [asked[i * len(asked) // count] for i in range(count)]
    limit = context_length(usable.model)
    room = PROMPT_TOKENS if limit is None else max(1, min(PROMPT_TOKENS, limit - NEW_TOKENS))
    return [ids[-room:] for ids in map(usable.generator.encode, chosen) if ids]


def _with_peft_alone(job: ExportJob, folder: Path) -> Any:
    """The adapter of ``folder`` put by PEFT on the base as lmlab stores it."""
    from peft import PeftModel

    usable = load_as_trained(job)
    base = usable.model.unload()
    return PeftModel.from_pretrained(base, str(folder)).eval()


def verify(folder: Path) -> tuple[dict[str, Any], float | None]:
    """Check an export against its certificate: every file, then (of a merged one) its logits.

    Returns:
        The certificate and the largest relative difference of a logit; None for an adapter, whose base is elsewhere.

    Raises:
        UserError: naming the file that is not what it was, or the difference.
    """
    certificate = check_files(folder)
    if certificate["kind"] == "adapter":
        return certificate, None
    return certificate, check_reference(folder, certificate)


def verify_against_run(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Also compare with the run anew, in a fresh process.

    Raises:
        UserError: as `verify`, or the run now computes something else than the export.
    """
    certificate, _ = verify(folder)
    adapters = {name: (path, weight) for name, (path, weight) in job.adapters.items()}
    again = ExportJob(
        run=job.run,
        best=certificate["weights"] == "best",
        dtype=certificate["dtype"],
        base=certificate["base"] or "dequantized",
        adapters=adapters,
        adapter_only=certificate["kind"] == "adapter",
        accelerator=job.accelerator,
    )
    again.check()
    return certify_apart(again, folder)


def main() -> int:
    """Read the order, compare, print the certificate or the refusal."""
    order = json.load(sys.stdin)
    values = order["job"]
    values["adapters"] = {name: tuple(each) for name, each in values["adapters"].items()}
    try:
        print("\n" + json.dumps(certify(ExportJob(**values), Path(order["export"]))))
    except UserError as error:
        print("\n" + json.dumps({"what": error.what, "where": error.where, "fix": error.fix}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
