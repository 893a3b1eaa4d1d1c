"""README.md of an export: a model card in the hub's format, from what the run wrote down."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADLINES = {
    "val/loss": "validation loss (nats per token)",
    "val/perplexity": "validation perplexity",
    "val/bits_per_byte": "validation bits per byte",
    "val/exact_match": "validation exact match",
    "val/rouge1": "validation ROUGE-1",
    "val/rougeL": "validation ROUGE-L",
}

COMPARED = {
    "merged_from_trained": "the model as trained, and merged in memory",
    "export_from_merged": "merged in memory, and this export opened anew",
    "export_from_trained": "the model as trained, and this export opened anew",
}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```python
{{ code }}
```

{{ prompting }}

## Training

| | |
| --- | --- |
{% for name, value in facts %}| {{ name }} | {{ value }} |
{% endfor %}
{% if overrides %}Started as `{{ overrides }}` with lmlab{% if commit %} at commit `{{ commit }}`{% endif %}.
{% endif %}
## Results

{% if metrics %}{{ measured }}

| metric | value |
| --- | ---: |
{% for name, value in metrics %}| {{ name }} | {{ value }} |
{% endfor %}
These are figures of the run itself, on its own validation split: no benchmark was run, and nothing was tested for safety,
bias or truthfulness.
{% else %}The run logged no validation metrics.
{% endif %}
## Certificate

{{ certified }}

`certificate.json` holds the figures, reference logits and the sha256 of every file. With lmlab at hand
`python scripts/export.py --verify DIR` checks them; without, `sha256sum` does.
{% if serving %}
## Other programs

{{ serving }}
{% endif %}
## Licence and intended use

{{ licence }}
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        title: the export's name.
        kind: ``merged``, ``full`` or ``adapter``.
        base: the base's public name, None for a model trained from scratch.
        base_on_hub: whether that name is one of the hub's.
        config: the run's config as plain values.
        info: run.json.
        summary: summary.json.
        data_report: data_report.json.
        weights_info: lmlab.json.
        certificate: certificate.json as far as it is made.
        best: whether these are the best weights and not the last.
        licence: of the weights (``license``, ``license_name``, ``license_link`` of the hub's metadata).
        serving: Markdown on GGUF, Ollama and vLLM.
    """

    title: str
    kind: str
    base: str | None
    base_on_hub: bool
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    summary: Mapping[str, Any]
    data_report: Mapping[str, Any]
    weights_info: Mapping[str, Any]
    certificate: Mapping[str, Any]
    best: bool = False
    licence: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    serving: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML metadata."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="peft" if facts.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=facts.base if facts.base_on_hub else None,
        datasets=_hub_datasets(facts),
        language=list(facts.languages) or None,
        tags=["lmlab", *([facts.config["adapter"]["kind"]] if facts.kind != "full" else [])],
        eval_results=_results(facts),
        model_name=facts.title,
        **facts.licence,  # type: ignore[arg-type]
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=facts.title,
        summary=_summary(facts),
        code=_code(facts),
        prompting=_prompting(facts),
        facts=_training(facts),
        overrides=_command(facts),
        commit=(facts.info.get("git_commit") or "")[:12],
        measured=_measured(facts),
        metrics=[(label, _number(value)) for label, value in _metrics(facts)],
        certified=_certified(facts),
        serving=facts.serving,
        licence=_licence(facts),
    )
    return str(card).rstrip() + "\n"


def _hub_datasets(facts: CardFacts) -> list[str] | None:
    name = _hub_data(facts.config["data"])
    return [name] if name else None


def _hub_data(data: Mapping[str, Any]) -> str | None:
    """The data set's id on the hub, None for what lies on this machine."""
    name = str(data.get("name") or "")
    return name if data.get("kind") == "hub" and name and not name.startswith(("/", ".", "~")) else None


def data_name(config: Mapping[str, Any]) -> str:
    """What the run was trained on, without a path."""
    data = config["data"]
    if hub := _hub_data(data):
        return f"`{hub}`, {data.get('split')} split"
    given = data.get("path") or data.get("name")
    parts = given if isinstance(given, list) else [given]
    names = [str(part).rstrip("/").rsplit("/", 1)[-1] for part in parts if part]
    kind = str(data["kind"])
    embedded = {
        "python_help": "python_help (documentation and docstrings of the Python that ran)",
        "skills": "skills (generated questions with one right answer)",
    }
    return f"{kind}: {', '.join(names)}" if names else embedded.get(kind, kind)


def _metrics(facts: CardFacts) -> list[tuple[str, float]]:
    """(label, value) of the validation at the weights' own step, where that is known."""
    if facts.best:
        loss = facts.summary.get("best/val_loss")
        return [(HEADLINES["val/loss"], float(loss))] if isinstance(loss, (int, float)) else []
    found = []
    for name, value in facts.summary.items():
        short = name.removeprefix("final/")
        if name.startswith("final/val/") and isinstance(value, (int, float)):
            found.append(
                (HEADLINES.get(short, short.replace("val/", "validation ").replace("_", " ")), value)
            )
    return [(label, float(value)) for label, value in found]


def _measured(facts: CardFacts) -> str:
    step = facts.summary.get("best/step") if facts.best else facts.summary.get("steps")
    which = "the best weights by validation loss" if facts.best else "the last weights"
    records = (facts.data_report.get("val") or {}).get("records")
    of = f" of {records:,} records" if isinstance(records, int) else ""
    return f"Measured in the run on {which} (step {step}), on a validation split{of} that was not trained on."


def _results(facts: CardFacts) -> list[Any] | None:
    from huggingface_hub import EvalResult

    kind = str(facts.config["data"]["kind"])
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=f"{kind}, validation split of the run",
            metric_type=label.removeprefix("validation ").split(" (")[0].replace(" ", "_"),
            metric_name=label,
            metric_value=value,
        )
        for label, value in _metrics(facts)
    ]
    return found or None


def _summary(facts: CardFacts) -> str:
    task = {"sft": "fine-tuned on instructions", "pretrain": "trained as a plain language model"}
    done = task.get(str(facts.config["task"]), str(facts.config["task"]))
    quant = facts.weights_info.get("quant", {}).get("kind", "none")
    over = f" over a base stored as {quant}" if quant != "none" else ""
    kind = str(facts.config["adapter"]["kind"])
    base = f"`{facts.base}`" if facts.base else "a model made from scratch"
    if facts.kind == "adapter":
        return f"A {kind} adapter for {base}, {done}{over}. It is of no use without that base."
    if facts.kind == "full":
        how = (
            f"{base}, all weights {done}"
            if facts.base
            else f"A language model with random first weights, {done}"
        )
        return f"{how} on {data_name(facts.config)}."
    into = facts.certificate.get("base")
    merged = {
        "dequantized": "merged into the base as it was dequantized in training",
        "original": "merged into the unquantized base, which is not quite what the adapter was trained on",
    }.get(str(into), "merged into its base")
    return f"{base}, {done} with {kind}{over} on {data_name(facts.config)}; the adapter is {merged}."


def _code(facts: CardFacts) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if facts.kind == "adapter":
        lines = ["from peft import PeftModel", *lines]
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base}", dtype="float32")  # the base, by its place',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")  # DIR: this directory',
            "base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))",
            'model = PeftModel.from_pretrained(base, "DIR")',
        ]
    else:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("DIR")  # DIR: this directory',
            'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")',
        ]
    if facts.weights_info.get("chat"):
        lines += [
            'turns = [{"role": "user", "content": "Your question"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer("Your text", return_tensors="pt")']
    lines += [
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _prompting(facts: CardFacts) -> str:
    template = facts.weights_info.get("template")
    if facts.weights_info.get("format") == "messages":
        return "Trained on conversations in the form of the chat template that the tokenizer brings."
    if not template or facts.config["task"] == "pretrain":
        return "It continues text as it is; there is no prompt template."
    note = (
        " The tokenizer's chat template writes the last user message in this form."
        if facts.weights_info.get("chat")
        else ""
    )
    return f"Trained with this prompt (Jinja); the response follows it, then the end-of-text token.{note}\n\n```jinja\n{template.rstrip()}\n```"


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    config, summary = facts.config, facts.summary
    adapter, trainer, optim = config["adapter"], config["trainer"], config["optim"]
    rows: list[tuple[str, Any]] = [
        ("base", facts.base or "none: random first weights"),
        ("data", data_name(config)),
        ("data hash", f"`{facts.info.get('data_hash')}`"),
        ("tokenizer hash", f"`{facts.info.get('tokenizer_hash')}`"),
    ]
    records, tokens = (facts.data_report.get("train") or {}).get("records"), summary.get("final/train/tokens")
    if isinstance(records, int):
        rows.append(("training records", f"{records:,}"))
    if isinstance(tokens, (int, float)):
        rows.append(("tokens seen", f"{int(tokens):,}"))
    rows.append(("steps", f"{summary.get('steps')}, the weights are of step {_step(facts)}"))
    if adapter["kind"] != "none":
        quant = facts.weights_info.get("quant") or {"kind": "none"}
        double = " with double quantization" if quant.get("double_quant") else ""
        rows.append(
            ("adapter", f"{adapter['kind']}, rank {adapter.get('rank')}, alpha {adapter.get('alpha')}")
        )
        rows.append(("adapted layers", json.dumps(adapter.get("target_modules")).strip('"')))
        rows.append(("base stored as", f"{quant['kind']}{double}"))
    size = trainer["batch_size"] * trainer["accumulate_grad_batches"]
    rows += [
        (
            "parameters",
            f"{summary.get('model/params_total', 0):,}, {summary.get('model/params_trainable', 0):,} trained",
        ),
        (
            "optimizer",
            f"{optim['name']}, learning rate {optim['lr']}, {optim['schedule']}, batch {size} per device",
        ),
        ("seed", facts.info.get("seed")),
    ]
    versions = facts.info.get("versions") or {}
    rows.append(
        (
            "versions",
            ", ".join(f"{n} {versions[n]}" for n in ("torch", "transformers", "peft") if n in versions),
        )
    )
    return [(name, str(value).replace("|", "\\|")) for name, value in rows]


def _step(facts: CardFacts) -> Any:
    return facts.summary.get("best/step") if facts.best else facts.summary.get("steps")


def _command(facts: CardFacts) -> str:
    """The command line, without words that name a place on this machine."""
    script, *words = [str(word) for word in facts.info.get("argv") or []] or [""]
    script = os.path.basename(script) if os.path.isabs(script) else script
    return " ".join(["python", script, *(word for word in words if not _names_place(word))]) if script else ""


def _names_place(word: str) -> bool:
    """Whether a part of ``key=value`` or ``key=[value,value]`` is an absolute path, or one that is there."""
    parts = [part.strip() for part in re.split(r"[=,\[\]{}()'\"]|:(?!//)", word)]
    return any(
        part.startswith(("/", "~", "..")) or ("/" in part and os.path.lexists(part)) for part in parts if part
    )


def _certified(facts: CardFacts) -> str:
    certificate = facts.certificate
    found = certificate.get("differences") or {}
    lines = []
    if certificate.get("verdict") == "reported":
        lines.append(
            "**Not certified.** The adapter was trained over the quantized base, and this is the unquantized one with the "
            "adapter in it: it answers differently, as the first row says."
        )
    else:
        lines.append(
            f"Certified: on {certificate['texts']} texts the models below compute the same logits, within "
            f"{certificate['bound']:.0e} of the largest one ({certificate['dtype']} weights, fp32 arithmetic)."
        )
        if certificate["dtype"] != "fp32":
            lines[-1] += (
                f" The merged model's weights are rounded to {certificate['dtype']} in the second row. The last row "
                "has no bound: it says what that rounding costs."
            )
    lines += [
        "",
        "| compared | largest difference, relative | greedy choices alike |",
        "| --- | ---: | ---: |",
    ]
    for name, each in found.items():
        lines.append(
            f"| {COMPARED.get(name, name)} | {each['max_relative']:.1e} | {each['greedy_agreement']:.2%} of {each['positions']} |"
        )
    return "\n".join(lines)


def _licence(facts: CardFacts) -> str:
    given = facts.licence.get("license_name") or facts.licence.get("license")
    base = f" The base `{facts.base}` has a licence of its own, which goes on to hold." if facts.base else ""
    said = (
        f"These weights are published under **{given}**."
        if given
        else "**No licence was given for these weights**, so nobody but their maker may use them yet (`--license`)."
    )
    use = " A research artefact: try it on your own task before you rely on it."
    return said + base + use


def _number(value: float) -> str:
    return f"{value:.4g}"
