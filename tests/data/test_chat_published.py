"""All published chat templates x all real conversations: what is trained, against spans found by another method.

The other method knows each template by heart: `WRITTEN` has the literal strings its author puts around an answer, and
a regular expression made of them finds the answers in the rendering. Each template is loaded both ways its users do:
as the file is, and with the indents and line ends taken out that its author strips before use.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmlab.data.encoding import encode_document
from lmlab.data.fields import BadRecordError
from lmlab.data.formats import FormatOptions, formats, template_source
from lmlab.data.prepare import TextEncoder
from lmlab.records import Document, Record
from lmlab.start import text_encoder
from lmlab.tokenizers import add_tokens, load_tokenizer


@dataclass(frozen=True)
class Written:
    """How a template writes an answer.

    Attributes:
        heading: what stands before every answer.
        mark: what ends it; empty where only white space follows.
        after: what comes next where there is no mark.
        gap: white space of the heading that is behind the generation prompt, so the model must write it.
        trims: whether white space around the content is dropped.
    """

    heading: str
    mark: str
    after: str = ""
    gap: str = ""
    trims: bool = True


EOS = "{eos}"
WRITTEN = {
    "alpaca": Written("### Response:\n", EOS),
    "amberchat": Written("###Assistant: ", "", after="###Human: ", gap=" "),
    "chatml": Written("<|im_start|>assistant\n", "<|im_end|>"),
    "chatqa": Written("\n\nAssistant: ", "", after="User: ", gap=" "),
    "falcon-instruct": Written("\n\nAssistant: ", "", after="User: ", gap=" "),
    "gemma-it": Written("<start_of_turn>model\n", "<end_of_turn>"),
    "granite-3.0-instruct": Written("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>", trims=False),
    "llama-2-chat": Written("[/INST] ", " " + EOS, gap=" "),
    "llama-3-instruct": Written("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral-instruct": Written("[/INST] ", EOS, gap=" "),
    "openchat-3.5": Written("GPT4 Correct Assistant: ", "<|end_of_turn|>", gap=" ", trims=False),
    "phi-3": Written("<|assistant|>\n", "<|end|>"),
    "phi-3-small": Written("<|assistant|>\n", "<|end|>"),
    "qwen2.5-instruct": Written("<|im_start|>assistant\n", "<|im_end|>", trims=False),
    "saiga": Written("{bos}bot\n", EOS),
    "solar-instruct": Written("### Assistant:\n", "", after="### User:\n"),
    "vicuna": Written("ASSISTANT: ", EOS, gap=" "),
    "zephyr": Written("<|assistant|>\n", EOS),
}  # fmt: skip
WAYS = ("raw", "stripped")
OWN_INDENTS = ("granite-3.0-instruct", "qwen2.5-instruct")  # written with {%- -%}: loaded as they are, always
REPEATS_BOS = ("llama-2-chat", "saiga")  # before every exchange or turn, by design; never twice in a row


def sources(folder: Path, name: str) -> dict[str, str]:
    raw = (folder / "chat-templates" / f"{name}.jinja").read_text(encoding="utf-8")
    stripped = raw if name in OWN_INDENTS else raw.replace("    ", "").replace("\n", "")
    return dict(zip(WAYS, (raw, stripped), strict=True))


@pytest.fixture(scope="module")
def conversations(real_data: Path) -> list[Record]:
    lines = (real_data / "sft" / "fastchat-dummy.messages.jsonl").read_text(encoding="utf-8").splitlines()
    return [Record(json.loads(line), f"line {number}") for number, line in enumerate(lines, start=1)]


@pytest.fixture(scope="module")
def tokenizers(real_data: Path, bpe: Any) -> dict[str, Any]:
    """Llama-like with BOS and byte fallback, GPT-2's own, and a BPE with some of the marks as tokens."""
    stories = load_tokenizer(real_data / "stories260k-hf")
    add_tokens(
        stories, ["<|im_start|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>"]
    )
    gpt2 = load_tokenizer(real_data / "tokenizers" / "gpt2" / "encoder.json")
    add_tokens(gpt2, ["<|im_start|>", "<|im_end|>", "[/INST]", "<|eot_id|>"])
    return {"stories": stories, "gpt2": gpt2, "bpe": copy.deepcopy(bpe)}  # fmt: skip


def formatted(record: Record, encoder: TextEncoder) -> Document:
    options = FormatOptions(
        template_source("alpaca"), {}, encoder.render_chat, special_tokens=encoder.special_tokens
    )
    return formats.get("messages")(record, options)


def filled(text: str, tokenizer: Any) -> str:
    return text.format(eos=tokenizer.eos_token, bos=tokenizer.bos_token or "")


def found_by_heart(text: str, written: Written, tokenizer: Any, *, raw: bool) -> Iterator[tuple[int, int]]:
    """Where the answers stand in a whole rendering (content and mark, without the gap before)."""
    heading, mark = filled(written.heading, tokenizer), filled(written.mark, tokenizer)
    if raw and heading.startswith("[/INST]"):  # the answer is a loop's turn of its own, line and indent apart
        heading, space = "[/INST]", r"\s+"
    else:
        space = ""
    ends = re.escape(mark) if mark else rf"(?=\s*(?:{re.escape(written.after)}|\Z))"
    for match in re.finditer(f"{re.escape(heading)}{space}(?P<turn>.*?{ends})", text, flags=re.DOTALL):
        yield match.span("turn")


def expected_content(content: str, name: str) -> str:
    if name == "falcon-instruct":
        content = content.replace("\r\n", "\n").replace("\n\n", "\n")
    return content.strip() if WRITTEN[name].trims else content


def check(record: Record, document: Document, name: str, way: str, tokenizer: Any) -> None:
    """The trained characters are exactly the assistant turns and their end marks."""
    written = WRITTEN[name]
    turns = record.fields["messages"]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    text = "".join(segment.text for segment in document.segments)
    assert whole.startswith(text)
    assert not whole[len(text) :].strip(), "only white space is left out: these end with an answer"
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    by_heart = list(found_by_heart(whole, written, tokenizer, raw=way == "raw"))
    position, trained = 0, []
    for segment in document.segments:
        if segment.trained:
            trained.append((position, position + len(segment.text)))
        position += len(segment.text)
    assert len(trained) == len(by_heart) == len(said)
    for (start, end), (begin, stop), content in zip(trained, by_heart, said, strict=True):
        gap = whole[start:begin]
        assert end == stop
        assert whole[begin:stop] == expected_content(content, name) + filled(written.mark, tokenizer)
        assert (not gap.strip()) if way == "raw" else gap == written.gap
    assert document.prompt == whole[: trained[-1][0]]


def check_tokens(document: Document, name: str, encoder: TextEncoder, tokenizer: Any) -> None:
    encoded = encode_document(document, encoder.encode, encoder.eos_token_id)
    ids, bos, eos = encoded.ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert encoded.trained.any()
    assert encoded.trained[-1]
    # What transformers gives for the same text, to the last id of the last mark: no BOS added, none lost.
    text = "".join(segment.text for segment in document.segments)
    reference = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[: len(reference)].tolist() == reference
    # Where one token is both (GPT-2), an answer's EOS and the next question's BOS stand side by side, as written.
    pairs = np.asarray(ids[:-1] == bos) & np.asarray(ids[1:] == bos)
    assert not (pairs[:1] if bos == eos else pairs).any(), "doubled BOS"
    if bos is not None and bos != eos and name not in REPEATS_BOS:
        assert (ids == bos).sum() <= 1
    if name != "saiga" and bos != eos and (ids == bos).any():
        assert not tokenizer.decode(ids[: (ids == bos).argmax()]).strip()  # nothing but white space before it
    mark = filled(WRITTEN[name].mark, tokenizer).strip()
    if mark in encoder.special_tokens:  # it ends generation, so nothing follows it
        assert ids[-1] == tokenizer.convert_tokens_to_ids(mark)
        assert len(ids) == len(reference)
    else:
        assert ids[-1] == eos
        assert len(ids) == len(reference) + 1


def over(records: list[Record], name: str, way: str, source: str, tokenizer: Any) -> Counter[str]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    encoder = text_encoder(tokenizer)
    seen: Counter[str] = Counter()
    for record in records:
        try:
            document = formatted(record, encoder)
        except BadRecordError as error:
            seen[error.reason] += 1
            continue
        check(record, document, name, way, tokenizer)
        check_tokens(document, name, encoder, tokenizer)
        seen["ok"] += 1
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_against_known_strings_some_conversations(
    name: str, way: str, real_data: Path, conversations: list[Record], tokenizers: dict[str, Any]
) -> None:
    records = conversations[::50]
    assert over(records, name, way, sources(real_data, name)[way], tokenizers["stories"]) == {"ok": 10}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["stories", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_against_known_strings_all_conversations(
    name: str,
    way: str,
    tokenizer: str,
    real_data: Path,
    conversations: list[Record],
    tokenizers: dict[str, Any],
) -> None:
    source = sources(real_data, name)[way]
    assert over(conversations, name, way, source, tokenizers[tokenizer]) == {"ok": 500}


def test_every_published_template_is_in_the_table(real_data: Path) -> None:
    assert {file.stem for file in (real_data / "chat-templates").glob("*.jinja")} == set(WRITTEN)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_template_that_refuses_roles_out_of_turn(
    name: str, real_data: Path, tokenizers: dict[str, Any]
) -> None:
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    tokenizer = copy.deepcopy(tokenizers["stories"])
    tokenizer.chat_template = sources(real_data, name)["raw"]
    record = Record({"messages": [user, user, answer]}, "here:1")
    if name in OWN_INDENTS:  # these take any order
        assert formatted(record, text_encoder(tokenizer)).segments
        return
    with pytest.raises(BadRecordError, match="must alternate") as caught:
        formatted(record, text_encoder(tokenizer))
    assert caught.value.reason == "chat template refuses it"


def test_the_sharegpt_file_reads_as_its_messages(
    real_data: Path, conversations: list[Record], encoder: TextEncoder
) -> None:
    shared = json.loads((real_data / "sft" / "fastchat-dummy_conversation.json").read_text(encoding="utf-8"))
    assert len(shared) == len(conversations) == 500
    for one, record in zip(shared, conversations, strict=True):
        assert formatted(Record(one, "here:1"), encoder) == formatted(record, encoder)
