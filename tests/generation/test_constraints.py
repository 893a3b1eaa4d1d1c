"""What every sampler can rule out: banned strings, forced beginnings, JSON; padding and neighbours change nothing."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lmlab import start
from lmlab.generation import decode
from lmlab.generation.constraints import BannedStrings, check_constraints
from lmlab.generation.decode import Generated, generate
from lmlab.generation.samplers import load_sampler
from lmlab.generation.vocabulary import continuation, token_bytes
from lmlab.records import UserError
from lmlab.tokenizers import train_chars

TINY = Path(__file__).parents[2] / "assets" / "tiny-base"
STORIES = Path(os.environ.get("LMLAB_TEST_DATA", "../shared/data")) / "stories260k-hf"
PROMPTS = ["def write(self, text):", "The", "Return a copy of the list", "class Path\n    A path is", "x = 1"]
WARM: dict[str, Any] = {"kind": "top_p_temperature", "temperature": 1.3, "top_p": 0.95, "max_new_tokens": 24}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "height": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 300}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "height"],
    "additionalProperties": False,
}
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": PERSON["properties"]["age"]},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words": ["e", " th", "self"]},
    "begins_with": {"begins_with": " Yes, of"},
    "json_schema": {"json_schema": SMALL, "max_new_tokens": 30},
    "all": {
        **{"repetition_penalty": 1.3, "json_schema": SMALL, "begins_with": '{"na'},
        **{"bad_words": ["q", "zz"], "max_new_tokens": 30},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return hf.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def stories() -> Any:
    if not STORIES.is_dir():
        pytest.skip(f"no sentencepiece tokenizer at {STORIES}: set LMLAB_TEST_DATA")
    return hf.AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


class FixedLogits(nn.Module):
    """A model that answers the same logits whatever it reads, and keeps no cache."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.get_buffer("fixed").expand(*input_ids.shape, -1))


def sampler_of(**values: Any) -> Any:
    return load_sampler({"kind": "greedy", "max_new_tokens": 24, **values})


def write(
    model: Any, tokenizer: Any, prompts: list[str], seeds: Any, *, eos: Any = None, **values: Any
) -> list[Generated]:
    return generate(
        model,
        [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
        sampler=load_sampler({**WARM, **values}),
        eos_token_ids=[tokenizer.eos_token_id] if eos is None else eos,
        seeds=list(seeds),
        tokenizer=tokenizer,
    )


# --- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stays"),
    [*((name, False) for name in CONSTRAINTS), ("no_repeat_ngram_size", True), ("all", True)],
    ids=lambda value: value if isinstance(value, str) else "rows-stay-masked" if value else "rows-leave",
)
def test_a_row_does_not_depend_on_its_neighbours(
    name: str, stays: bool, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stays:
        monkeypatch.setattr(decode, "_can_drop", lambda cache: False)
    settings, seeds = CONSTRAINTS[name], range(len(PROMPTS))
    # A further end mark, so that rows leave at different steps; of JSON they do so anyway.
    eos = [tokenizer.eos_token_id]
    if "json_schema" not in settings:
        eos.append(write(model, tokenizer, PROMPTS, seeds, **settings)[0].token_ids[9])
    together = write(model, tokenizer, PROMPTS, seeds, eos=eos, **settings)
    alone = [
        write(model, tokenizer, [prompt], [seed], eos=eos, **settings)[0]
        for seed, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len({len(row.token_ids) for row in together}) > 1, "the rows should end at different steps"
    assert together != write(model, tokenizer, PROMPTS, seeds, eos=eos), "the setting should change something"


def test_static_steps_obey_alike(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words": ["e"]}
    expected = write(model, tokenizer, PROMPTS, range(5), **settings)
    monkeypatch.setattr(decode, "_wants_static", lambda *args: True)
    assert write(model, tokenizer, PROMPTS, range(5), **settings) == expected


@pytest.mark.parametrize("kind", ["repetition_penalty", "no_repeat_ngram_size"])
def test_the_padding_token_is_neither_penalized_nor_counted(kind: str) -> None:
    # Token 3 fills the left of the short row. It is the best there, and must stay so: the row itself does not hold it.
    logits = torch.tensor([0.9, 0.0, 0.0, 1.0])
    settings = {kind: 3.0} if kind == "repetition_penalty" else {kind: 1}
    rows = generate(
        FixedLogits(logits),
        [[2], [2, 3, 1, 1, 1]],
        sampler=sampler_of(max_new_tokens=1, **settings),
        eos_token_ids=(),
        seeds=[0, 0],
        pad_token_id=3,
    )
    assert [row.token_ids for row in rows] == [[3], [0]]


# --- banned strings -------------------------------------------------------------------------------------------------

TEXTS = ["Hello, world!", "naïve café 😀", "  two  blanks\n\tand a tab", "日本語 and (x, y) -> z;", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_the_text(text: str, tokenizer: Any, stories: Any) -> None:
    pieces = token_bytes(tokenizer)
    assert b"".join(pieces[i] for i in tokenizer.encode(text, add_special_tokens=False)) == text.encode()
    pieces = token_bytes(stories)
    ids = stories.encode(text, add_special_tokens=False)
    assert b"".join(pieces[i] for i in ids) == b" " + text.encode(), "sentencepiece puts a blank first"
    assert all(pieces[i] == b"" for i in stories.all_special_ids)


@pytest.mark.parametrize("which", ["byte-level", "sentencepiece"])
def test_a_banned_string_comes_by_no_way_of_cutting_it(which: str, tokenizer: Any, stories: Any) -> None:
    used = tokenizer if which == "byte-level" else stories
    pieces = token_bytes(used)
    banned = ["ing", " a", "é", "on", "t t"]
    # Their parts are most likely, and tokens that hold them more than others, so that they would come at once.
    part = torch.tensor([any(piece and piece in word.encode() for word in banned) for piece in pieces])
    whole = torch.tensor([any(word.encode() in piece for word in banned) for piece in pieces])
    logits = part * 8.0 + (whole & ~part) * 3.0
    logits[used.all_special_ids] = -torch.inf

    def texts(**values: Any) -> list[str]:
        rows = generate(
            FixedLogits(logits),
            [used.encode("x", add_special_tokens=False)] * 60,
            sampler=load_sampler({"kind": "temperature", "temperature": 1.0, "max_new_tokens": 60, **values}),
            eos_token_ids=(),
            seeds=range(60),
            tokenizer=used,
        )
        return [b"".join(pieces[i] for i in row.token_ids).decode(errors="replace") for row in rows]

    free = "".join(texts())
    assert all(word in free for word in banned)
    assert not [word for text in texts(bad_words=banned) for word in banned if word in text]


def test_the_prompts_end_counts_and_special_tokens_go_by_their_name(tokenizer: Any) -> None:
    [end] = tokenizer.all_special_ids[:1]
    name = tokenizer.convert_ids_to_tokens(end)
    prompts = [
        tokenizer.encode("a c", add_special_tokens=False),
        tokenizer.encode("a d", add_special_tokens=False),
    ]
    banned = BannedStrings(["cat", name], tokenizer, prompts)
    scores = torch.zeros(3, len(tokenizer))
    banned.apply([0, 1, None], scores)
    [token] = tokenizer.encode("at", add_special_tokens=False)
    assert scores[:, token].tolist() == [-torch.inf, 0.0, 0.0], "only after a c, and not in a finished row"
    assert scores[:, end].tolist() == [-torch.inf] * 3


def test_a_tokenizer_without_characters_to_read_is_named() -> None:
    with pytest.raises(UserError, match=r"SimpleTokenizer does not say what its tokens stand for"):
        token_bytes(SimpleTokenizer())  # type: ignore[arg-type]


class SimpleTokenizer:
    """None of transformers'."""


# --- forced beginnings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Yes", " Yes, of course", "\n\n- one", "é😀"])
def test_a_continuation_is_exactly_that_text(text: str, tokenizer: Any, stories: Any) -> None:
    for used in (tokenizer, stories):
        before = used.encode("Say it:", add_special_tokens=False)
        after = continuation(used, text)
        assert used.decode([*before, *after]) == used.decode(before) + text
    usual = tokenizer.encode(text, add_special_tokens=False)
    assert continuation(tokenizer, text) == usual, "byte-level BPE cuts it as it always does"


def test_the_text_begins_with_what_is_forced(model: Any, tokenizer: Any) -> None:
    rows = write(model, tokenizer, PROMPTS, range(5), begins_with=" Yes, of course")
    assert all(tokenizer.decode(row.token_ids).startswith(" Yes, of course") for row in rows)
    assert len({tuple(row.token_ids) for row in rows}) == 5


def test_a_beginning_that_cannot_be_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"begins_with has \d+ tokens and max_new_tokens is 2") as error:
        write(model, tokenizer, PROMPTS[:1], [0], begins_with="one two three four", max_new_tokens=2)
    assert error.value.where == "sampler.begins_with"
    chars = train_chars(["abc"], special_tokens=["<eos>"], max_chars=9)
    with pytest.raises(UserError, match=r"the tokenizer writes 'abd'"):
        continuation(chars, "abd")
    with pytest.raises(UserError, match="not the beginning of a text that json_schema allows"):
        write(model, tokenizer, PROMPTS[:1], [0], begins_with="Yes", json_schema=PERSON)


# --- JSON -----------------------------------------------------------------------------------------------------------


def fits_person(text: str) -> bool:
    value = json.loads(text)
    return (
        sorted(value) == ["age", "height", "name", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"red", "green"}
        and (value["height"] is None or (type(value["height"]) is int and 0 <= value["height"] <= 300))
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("which", ["byte-level", "sentencepiece"])
def test_a_complete_text_is_json_by_its_schema(
    which: str, temperature: float, model: Any, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    if which == "sentencepiece":
        tokenizer = request.getfixturevalue("stories")
        model = hf.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    rows = write(
        *(model, tokenizer, ["A person: "] * 12, range(12)),
        **{"temperature": temperature, "top_p": 1.0, "json_schema": PERSON, "max_new_tokens": 150},
    )
    done = [tokenizer.decode(row.token_ids) for row in rows if row.stop_reason == "complete"]
    assert {row.stop_reason for row in rows} <= {"complete", "length"}
    assert len(done) >= 6
    assert [text for text in done if not fits_person(text)] == []


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer"}, None),
        ({"enum": ["red", "green"]}, {'"red"', '"green"'}),
        ({"const": None}, {"null"}),
    ],
)
def test_the_end_comes_only_where_the_grammar_accepts_it(
    schema: Any, texts: set[str] | None, tokenizer: Any
) -> None:
    # A model that would stop at once, always.
    logits = torch.zeros(len(tokenizer) + 7)  # padded beyond the tokenizer, as many models are
    logits[len(tokenizer) :] = 5.0
    logits[tokenizer.eos_token_id] = 9.0
    rows = write(
        FixedLogits(logits), tokenizer, ["x"] * 20, range(20), json_schema=schema, temperature=1.0, top_p=1.0
    )
    assert {row.stop_reason for row in rows} == {"complete"}
    found = {tokenizer.decode(row.token_ids) for row in rows}
    assert found <= texts if texts else all(type(json.loads(text)) is int for text in found)
    assert tokenizer.eos_token_id not in {i for row in rows for i in row.token_ids}


def test_a_text_cut_by_its_length_is_not_called_complete(model: Any, tokenizer: Any) -> None:
    rows = write(model, tokenizer, ["x"], [0], json_schema=PERSON, max_new_tokens=5)
    assert rows[0].stop_reason == "length"


def test_a_schema_is_read_from_its_file_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON), encoding="utf-8")
    assert sampler_of(json_schema=str(file)).json_schema == PERSON
    assert sampler_of(json_schema=PERSON) == sampler_of(json_schema=str(file))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("no/such/file.json", "the path of a .json file with one: .*No such file"),
        ({"type": "objekt"}, "a JSON schema that llguidance knows: Invalid type: objekt"),
        ({"not": {"type": "string"}}, "a JSON schema that llguidance knows: Unimplemented keys"),
        (["type"], "Input should be a valid dictionary"),
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"\(sampler greedy\): .*{said}"):
        sampler_of(json_schema=schema)


def test_a_file_that_holds_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"the path of a .json file with one: Expecting property name"):
        sampler_of(json_schema=str(file))


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"llguidance is missing: pip install 'lmlab\[json\]'"):
        sampler_of(json_schema={"type": "object"})
    assert sampler_of().json_schema is None


def test_json_repeats_its_marks() -> None:
    with pytest.raises(UserError, match="no_repeat_ngram_size=0 with json_schema"):
        sampler_of(json_schema={"type": "object"}, no_repeat_ngram_size=2)


# --- contradictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"begins_with": "Return a copy of it", "max_new_tokens": 1},
            r"begins_with has .* \(samplers\.x\.begins",
        ),
        ({"begins_with": "Yes", "json_schema": SMALL}, "not the beginning of a text that json_schema allows"),
    ],
)
def test_what_a_tokenizer_cannot_serve_is_told_without_a_model(
    tokenizer: Any, settings: dict[str, Any], says: str
) -> None:
    check_constraints(sampler_of(begins_with="R"), tokenizer, where="samplers.x")
    with pytest.raises(UserError) as caught:
        check_constraints(sampler_of(**settings), tokenizer, where="samplers.x")
    assert re.search(says, str(caught.value))


def test_the_preflight_refuses_samplers_that_the_tokenizer_cannot_serve() -> None:
    greedy = sampler_of(begins_with="Return a copy of it", max_new_tokens=1)
    config: Any = SimpleNamespace(
        sampler=sampler_of(), samplers={"x": greedy}, samples=SimpleNamespace(grid=["x"])
    )
    with pytest.raises(UserError, match="begins_with has"):
        start._check_samplers(config, TINY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_left_the_text_ends_and_says_so(tokenizer: Any, temperature: float) -> None:
    [text] = write(
        *(FixedLogits(torch.zeros(len(tokenizer))), tokenizer, ["x"], [0]),
        json_schema={"const": True},
        bad_words=["t"],
        temperature=temperature,
    )
    assert text.stop_reason == "blocked"
    assert text.token_ids == []


@pytest.mark.parametrize(
    "setting", [{"bad_words": ["a"]}, {"begins_with": "a"}, {"json_schema": {"const": 1}}]
)
def test_texts_need_a_tokenizer(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tokenizer="):
        generate(
            *(FixedLogits(torch.zeros(9)), [[1]]),
            **{"sampler": sampler_of(**setting), "eos_token_ids": (), "seeds": [0]},
        )


def test_stop_strings_need_someone_who_reads_text() -> None:
    with pytest.raises(ValueError, match="TextGenerator"):
        generate(
            FixedLogits(torch.zeros(9)), [[1]], sampler=sampler_of(stop=["."]), eos_token_ids=(), seeds=[0]
        )
