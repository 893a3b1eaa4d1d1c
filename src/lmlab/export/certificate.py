"""The certificate of an export: that it computes what was trained, and the sha256 of every file that says so.

Models are compared on fixed texts: the adapter over its base as it was trained; the merged model in memory, in fp32; that
with its weights rounded to the type of the export; and the export as transformers alone opens it. Each text is a prompt
and what the adapter writes after it greedily, so that equal choices at all of these positions mean equal greedy texts.

Bound. All compute in fp32. Between the trained and the merged model the order of sums differs and one rounding of each
merged weight. A product over n inputs then differs by about sqrt(n) 2^-24 of its size (Higham & Mary 2019, probabilistic
rounding bounds), and k products one after another by sqrt(k) times that: 8e-5 of the largest logit for n = 16,384 and
k = 128, a 70B model's figures. `BOUND` demands 1e-4; small models come to some 1e-6, a lost adapter or a wrong scale to
1e-2 and more. Between the rounded merge and the export nothing differs at all, so the same bound holds in 16 bits too.
What 16 bits themselves cost (export against trained model) is no fault of an export: it is reported and has no bound,
since one wide enough for any model would also pass a lost layer.

Greedy choices can differ within a bound only where the two best logits are nearer than twice that bound; such a
position is a tie. A difference elsewhere is refused.

The certificate is no signature: it shows damage and careless edits, not a forger who writes a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError

from lmlab.journal import read_json
from lmlab.records import UserError

if TYPE_CHECKING:
    import torch

NAME = "certificate.json"
FORMAT = 1
DTYPES = ("fp32", "bf16", "fp16")
BOUND = 1e-4
"""Largest difference of two logits over the largest absolute logit, whatever type the export is stored in."""
PROMPT_TOKENS, NEW_TOKENS, TEXTS = 48, 16, 8
TOP = 8
"""Best logits of a text's last position that the certificate keeps, so that anybody can compare."""


@dataclass(frozen=True)
class Difference:
    """How far one model's logits are from another's over all positions of all texts.

    Attributes:
        max_absolute: largest difference of two logits.
        max_relative: that over the largest absolute logit of the reference.
        greedy_agreement: share of positions with the same best token.
        ties: positions that disagree where the reference's two best are nearer than twice the bound.
        positions: how many were compared.
    """

    max_absolute: float
    max_relative: float
    greedy_agreement: float
    ties: int
    positions: int

    def within(self, bound: float) -> bool:
        """Whether no logit is off by more than ``bound`` and no greedy choice is another but at a tie."""
        unlike = round((1 - self.greedy_agreement) * self.positions)
        return self.max_relative <= bound and unlike <= self.ties  # a NaN is not <= anything


def difference(
    reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], *, bound: float
) -> Difference:
    """Compare fp32 logits ``[positions, vocab]`` of the same texts, text by text."""
    import torch

    largest = max(float(logits.abs().max()) for logits in reference)
    worst = 0.0
    same = ties = total = 0
    for expected, found in zip(reference, other, strict=True):
        apart = float((expected - found).abs().max())
        worst = apart if apart != apart or apart > worst else worst
        agree = expected.argmax(-1) == found.argmax(-1)
        best = expected.topk(2, dim=-1).values
        near = (best[:, 0] - best[:, 1]) <= 2 * bound * largest
        same += int(agree.sum())
        ties += int((~agree & near).sum())
        total += len(agree)
    relative = worst / largest if largest > 0 else (0.0 if worst == 0 else torch.inf)
    return Difference(worst, relative, same / total, ties, total)


def write_on(model: Any, prompts: Iterable[Sequence[int]], *, count: int = NEW_TOKENS) -> list[list[int]]:
    """Each prompt with ``count`` tokens that the model chooses greedily, ended by nothing."""
    import torch

    texts = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(count):  # without a cache: every position as `logits_of` computes it
                logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            texts.append(ids)
    return texts


def logits_of(model: Any, texts: Iterable[Sequence[int]]) -> list[torch.Tensor]:
    """fp32 logits ``[positions, vocab]`` on the CPU, one text at a time (nothing is padded)."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
            for ids in texts
        ]


def reference_of(texts: Sequence[Sequence[int]], logits: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """What the certificate keeps of the export's own logits: greedy ids of every position, the last one's best."""
    found = []
    for ids, own in zip(texts, logits, strict=True):
        best = own[-1].topk(min(TOP, own.shape[-1]))
        found.append(
            {
                "input_ids": list(ids),
                "greedy_ids": own.argmax(-1).tolist(),
                "top_ids": best.indices.tolist(),
                "top_logits": best.values.tolist(),
                "largest_absolute_logit": float(own.abs().max()),
            }
        )
    return found


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of an export but the certificate; hidden files are none of it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME and not any(part.startswith(".") for part in name.split("/")):
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            found[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return found


def verdict(differences: dict[str, Difference], *, bound: float, certified: Iterable[str]) -> None:
    """Refuse an export of which a comparison named in ``certified`` is off.

    Raises:
        UserError: with the figures.
    """
    for name in certified:
        found = differences[name]
        if not found.within(bound):
            raise UserError(
                f"not certified: {name.replace('_', ' ')} differs by {found.max_relative:.2e} of the largest logit, "
                f"greedy choices agree at {found.greedy_agreement:.2%}",
                where=f"bound {bound:.2e}",
                fix="nothing was exported; this is a bug of lmlab, or the run was changed meanwhile",
            )


def as_json(differences: dict[str, Difference]) -> dict[str, Any]:
    """Plain values."""
    return {name: asdict(found) for name, found in differences.items()}


class _Hashed(BaseModel):
    bytes: NonNegativeInt
    sha256: str


class _Reference(BaseModel):
    input_ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    top_ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    top_logits: Annotated[list[FiniteFloat], Field(min_length=1)]
    largest_absolute_logit: FiniteFloat


class _Readable(BaseModel):
    """What later steps read of a certificate; an empty reference would compare nothing, and find nothing wrong."""

    kind: Literal["adapter", "model"]
    weights: Literal["best", "last"]
    dtype: Literal["fp32", "bf16", "fp16"]
    base: Literal["dequantized", "original"] | None
    files: Annotated[dict[str, _Hashed], Field(min_length=1)]
    reference: Annotated[list[_Reference], Field(min_length=1)]


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of an export.

    Raises:
        UserError: not an export of lmlab, one of another format, or a certificate that is damaged.
    """
    found = read_json(folder / NAME)
    if not isinstance(found.get("files"), dict) or found.get("format") != FORMAT:
        what = "no such directory" if not folder.is_dir() else f"no {NAME} of lmlab's there"
        raise UserError(what, where=str(folder), fix="name a directory that scripts/export.py made")
    try:
        _Readable.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{NAME} is damaged: {place}: {first['msg']}",
            where=str(folder),
            fix="export it again, or take it from where it was published",
        ) from error
    return found


def check_files(folder: Path) -> dict[str, Any]:
    """Compare every file with the certificate; the certificate.

    Raises:
        UserError: naming the first file that is missing, different or not of the export.
    """
    certificate = read_certificate(folder)
    expected, found = certificate["files"], file_hashes(folder)
    fix = "do not use it; export again, or take it from where it was published"
    for name in sorted(expected):
        if name not in found:
            raise UserError(f"the export is not whole: {name} is missing", where=str(folder), fix=fix)
        if found[name] != expected[name]:
            raise UserError(f"{name} is not what was certified", where=str(folder), fix=fix)
    if foreign := sorted(set(found) - set(expected)):
        raise UserError(f"{foreign[0]} is not part of what was certified", where=str(folder), fix=fix)
    return certificate


def check_reference(folder: Path, certificate: dict[str, Any]) -> float:
    """Open a merged export with transformers alone and compare its logits with those in the certificate.

    Returns:
        The largest difference, over the largest absolute logit.

    Raises:
        UserError: it cannot be opened, or computes something else.
    """
    texts = [entry["input_ids"] for entry in certificate["reference"]]
    model = open_plain(folder)
    rows = model.get_input_embeddings().num_embeddings
    if max(max(entry["input_ids"] + entry["top_ids"]) for entry in certificate["reference"]) >= rows:
        raise UserError(
            f"{NAME} names tokens that the model does not have ({rows})",
            where=str(folder),
            fix="export it again, or take it from where it was published",
        )
    own = logits_of(model, texts)
    worst = 0.0
    for entry, logits in zip(certificate["reference"], own, strict=True):
        for token, value in zip(entry["top_ids"], entry["top_logits"], strict=True):
            apart = abs(float(logits[-1, token]) - value) / max(entry["largest_absolute_logit"], 1e-30)
            worst = max(worst, apart if apart == apart else float("inf"))
    if worst > BOUND:
        raise UserError(
            f"its logits are not those certified, off by {worst:.2e} of the largest",
            where=str(folder),
            fix="compare versions of torch and transformers with those in certificate.json",
        )
    return worst


def open_plain(folder: Path) -> Any:
    """A merged export as anybody opens it: by transformers, no code of its own; computing in fp32.

    Raises:
        UserError: it brings code of its own, transformers cannot open it, or draws weights that are not there.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if "auto_map" in read_json(folder / "config.json"):
        raise UserError(
            "config.json names code to run (auto_map), which no export of lmlab does",
            where=str(folder),
            fix="do not use it; nothing of it was run",
        )
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"cannot be opened: {detail}", where=str(folder), fix="export it again") from error
    model, report = loaded
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise UserError(f"weights are missing, {first} the first", where=str(folder), fix="export it again")
    return model.eval()
