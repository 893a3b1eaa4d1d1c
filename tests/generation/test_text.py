"""From prompts to texts: stop strings across tokens, streaming that never takes back a character, entropy."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from lmlab.generation.decode import generate
from lmlab.generation.samplers import load_sampler
from lmlab.generation.text import UNREADABLE, GeneratedText, TextGenerator

TINY = Path(__file__).parents[2] / "assets" / "tiny-base"
STORIES = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data")) / "stories260k-hf"
TEXT = "Grüße, 日本 😀😀 — and\n\nthe end.\nUser: more"


class Script(nn.Module):
    """A model that writes given ids, one after the other, behind a prompt of one token; it keeps no cache."""

    def __init__(self, ids: list[int], vocab: int) -> None:
        super().__init__()
        self.ids, self.vocab = ids, vocab

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[..., self.ids[input_ids.shape[1] - 1]] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = TINY if request.param == "byte-level" else STORIES
    if not folder.is_dir():
        pytest.skip(f"no sentencepiece tokenizer at {folder}: set LMLAB_TEST_DATA")
    return hf.AutoTokenizer.from_pretrained(folder)


def run(
    tokenizer: Any, ids: list[int], *, length: int | None = None, mark: str = "", **values: Any
) -> tuple[GeneratedText, list[str]]:
    """The script's text, and the pieces it was told in."""
    eos = tokenizer.eos_token_id
    generator = TextGenerator(
        Script([*ids, eos], len(tokenizer)),
        encode=lambda text: [5],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        eos_token_ids=[eos],
        tokenizer=tokenizer,
        end_mark=mark,
    )
    told: list[str] = []
    sampler = load_sampler({"kind": "greedy", "max_new_tokens": length or len(ids) + 1, **values})
    [text] = generator(["x"], sampler=sampler, seeds=[0], on_text=lambda index, piece: told.append(piece))
    [untold] = generator(["x"], sampler=sampler, seeds=[0])
    assert untold == text, "streaming changes nothing"
    assert "" not in told
    return text, told


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_pieces_joined_are_the_text(tokenizer: Any) -> None:
    text, told = run(tokenizer, ids_of(tokenizer, TEXT))
    assert (text.text, text.stop_reason) == (TEXT, "eos")
    assert "".join(told) == TEXT
    assert len(told) > 10, "it came in pieces"
    assert not [piece for piece in told if UNREADABLE in piece]


def test_no_half_character_is_told_or_left_at_the_end(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, TEXT)
    whole = set()
    for length in range(1, len(ids) + 1):
        text, told = run(tokenizer, ids, length=length)
        assert "".join(told) == text.text
        assert UNREADABLE not in text.text
        assert TEXT.startswith(text.text)
        assert text.new_tokens == length
        whole.add(text.text)
    assert len(whole) < len(ids), "some lengths should end within a character"


def test_bytes_that_never_become_a_character_stay_what_they_are(tokenizer: Any) -> None:
    name = tokenizer.convert_ids_to_tokens
    bad = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == UNREADABLE and name(i) is not None][
        :1
    ]
    ids = [*ids_of(tokenizer, "one"), *bad * 7, *ids_of(tokenizer, "two")]
    text, told = run(tokenizer, ids)
    assert text.text == tokenizer.decode(ids)
    assert UNREADABLE in text.text
    assert "".join(told) == text.text


def test_every_stop_string_cuts_before_it_wherever_tokens_are_cut(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, TEXT)
    checked = 0
    for size in (1, 2, 3, 7):
        for start in range(0, len(TEXT) - size, 3):
            stop = TEXT[start : start + size]
            text, told = run(tokenizer, ids, stop=["never there", stop])
            assert (text.text, text.stop_reason) == (TEXT[: TEXT.find(stop)], "stop"), repr(stop)
            assert "".join(told) == text.text, repr(stop)
            checked += 1
    assert checked > 40


def test_the_first_stop_string_counts_and_one_begun_but_not_finished_is_text(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "one two three")
    text, told = run(tokenizer, ids, stop=["three", "two", "one twx"])
    assert (text.text, "".join(told), text.stop_reason) == ("one ", "one ", "stop")
    text, told = run(tokenizer, ids, stop=["three!"])
    assert (text.text, "".join(told), text.stop_reason) == ("one two three", "one two three", "eos")


def test_the_tokens_of_a_stop_string_count_as_written(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "one two three")
    text, _ = run(tokenizer, ids, stop=["three"])
    assert 0 < text.new_tokens <= len(ids)
    assert text.text == "one two "


def test_a_special_token_stops_by_its_name(tokenizer: Any) -> None:
    special = next(i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id)
    ids = [*ids_of(tokenizer, "one"), special, *ids_of(tokenizer, "two")]
    text, told = run(tokenizer, ids, stop=[tokenizer.convert_ids_to_tokens(special)])
    assert (text.text, "".join(told), text.stop_reason) == ("one", "one", "stop")


def test_an_end_mark_of_several_tokens_is_never_shown_at_the_end(tokenizer: Any) -> None:
    text, told = run(tokenizer, ids_of(tokenizer, "Yes.[/END]"), mark="[/END]")
    assert (text.text, "".join(told), text.stop_reason) == ("Yes.", "Yes.", "eos")
    text, told = run(tokenizer, ids_of(tokenizer, "Yes.[/END] No."), mark="[/END]")
    assert text.text == "".join(told) == "Yes.[/END] No.", "within a text it is text"


@pytest.mark.parametrize(
    "settings", [{"kind": "greedy"}, {"kind": "top_k", "top_k": 3, "temperature": 0.7}], ids=str
)
def test_mean_entropy_is_that_of_the_models_own_distribution(settings: dict[str, Any]) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(TINY)
    model = hf.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompts = ["def read(self):", "The file", "x"]
    end = ids_of(tokenizer, ".")
    generator = TextGenerator(
        model,
        encode=lambda text: ids_of(tokenizer, text),
        decode=tokenizer.decode,
        eos_token_ids=[tokenizer.eos_token_id, *end],
        tokenizer=tokenizer,
    )
    sampler = load_sampler({"max_new_tokens": 12, "repetition_penalty": 1.4, **settings})

    rows = generate(
        model,
        [ids_of(tokenizer, prompt) for prompt in prompts],
        sampler=sampler,
        eos_token_ids=generator.eos_token_ids,
        seeds=[0, 1, 2],
        tokenizer=tokenizer,
        entropy=True,
    )
    for prompt, row in zip(prompts, rows, strict=True):
        before = ids_of(tokenizer, prompt)
        with torch.no_grad():
            logits = (
                model(input_ids=torch.tensor([before + row.token_ids])).logits[0].numpy().astype(np.float64)
            )
        steps = len(row.token_ids) + (row.stop_reason == "eos")  # the end mark was a step as well
        logits = logits[len(before) - 1 :][:steps]
        logits -= logits.max(-1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        # fp32 and another matrix shape against fp64: 1e-4 of some nats.
        assert row.mean_entropy == pytest.approx(float((-p * np.log(p)).sum(-1).mean()), rel=1e-4)
    texts = generator(prompts, sampler=sampler, seeds=[0, 1, 2], entropy=True)
    assert [text.mean_entropy for text in texts] == [row.mean_entropy for row in rows]
    assert {text.mean_entropy for text in generator(prompts, sampler=sampler, seeds=[0, 1, 2])} == {None}
