"""Tokenizers that do not come as a tokenizer.json: GPT-2's vocabulary and merges, and sentencepiece's .model.

Both end as a fast tokenizer of transformers, with character offsets. A sentencepiece model is read through
transformers' own converter and message classes, so the sentencepiece library is not needed. What that converter would
drop without a word (a unigram model, a text normalization, no byte fallback) is refused.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmlab.records import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Vocabulary and merges: transformers' names, and OpenAI's own."""
GPT2_EOS = "<|endoftext|>"
BPE = 2  # sentencepiece's TrainerSpec.ModelType
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def pair_in(folder: Path) -> tuple[Path, Path] | None:
    """The vocabulary and merges in ``folder``, None if it has neither.

    Raises:
        UserError: one without the other.
    """
    for names in PAIRS:
        vocabulary, merges = folder / names[0], folder / names[1]
        there = [file for file in (vocabulary, merges) if file.is_file()]
        if len(there) == 2:
            return vocabulary, merges
        if there:
            missing = names[1] if there[0] == vocabulary else names[0]
            raise UserError(
                f"{there[0].name} without {missing}", where=str(folder), fix=f"put {missing} there"
            )
    return None


def from_vocab_and_merges(
    vocabulary: Path, merges: Path, roles: dict[str, tuple[str, ...]]
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with GPT-2's word pattern, or that of the family its folder's configs name.

    Args:
        roles: usual names of EOS, BOS, ...; for a vocabulary without GPT-2's own ``<|endoftext|>``.

    Raises:
        UserError: merges that do not fit the vocabulary, or another thing than these two files.
    """
    from tokenizers import models
    from transformers import GPT2Tokenizer

    family = _family(vocabulary.parent) if vocabulary.name == PAIRS[0][0] else None
    if family is not None:
        return family.from_pretrained(str(vocabulary.parent), local_files_only=True)
    try:
        vocab: Any
        pairs: Any  # the stubs of transformers leave out what its BPE takes
        vocab, pairs = models.BPE.read_file(str(vocabulary), str(merges))
        models.BPE(vocab, pairs)
    except Exception as error:  # the library raises a bare Exception
        detail = (" ".join(str(error).split()) or type(error).__name__)[:160]
        where = f"{vocabulary}, {merges.name}"
        raise UserError(
            f"not a vocabulary and its merges: {detail}", where=where, fix="restore both from one source"
        ) from error
    if GPT2_EOS in vocab:
        return GPT2Tokenizer(vocab=vocab, merges=pairs)
    found: Any = {
        role: next((name for name in names if name in vocab), None) for role, names in roles.items()
    }
    return GPT2Tokenizer(vocab=vocab, merges=pairs, **found)


def _family(folder: Path) -> Any | None:
    """The tokenizer class that the folder's configs name, if it is one of a vocabulary and merges (Qwen 2's, say)."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    settings, config = read_settings(folder), read_settings(folder, "config.json")
    name = settings.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(config.get("model_type", ""))
    found: Any = tokenizer_class_from_name(name) if isinstance(name, str) else None
    return found if "merges_file" in getattr(found, "vocab_files_names", {}) else None


def read_settings(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """A JSON object of ``folder``, {} if it is not there.

    Raises:
        UserError: broken JSON, or no object.
    """
    file = folder / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
        raise UserError(f"broken JSON: {error}", where=str(file), fix="restore or save it again") from error
    return content


def from_sentencepiece(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a sentencepiece BPE model; a tokenizer_config.json beside it has its say.

    Without one BOS is put first if the model has one, as the families that use such files (Llama, Mistral, Gemma) do.
    A text gets sentencepiece's dummy space before it (and a second one where it begins with a space), which decoding
    takes away again.

    Raises:
        UserError: not a sentencepiece model, or one that cannot be converted without changing its ids.
    """
    from transformers import PreTrainedTokenizerFast

    settings = read_settings(file.parent)
    spec = _read_model(file)
    prefix = settings.get("add_prefix_space")
    prefix = bool(spec.normalizer_spec.add_dummy_prefix) if prefix is None else bool(prefix)
    legacy = settings.get("legacy") is not False
    backend = _convert(file, add_prefix_space=prefix, legacy=legacy)
    trained = spec.trainer_spec
    ids = {"unk": trained.unk_id, "bos": trained.bos_id, "eos": trained.eos_id, "pad": trained.pad_id}
    pieces = {role: spec.pieces[i].piece for role, i in ids.items() if 0 <= i < len(spec.pieces)}
    roles = {f"{role}_token": piece for role, piece in pieces.items()}
    if "bos" in pieces and settings.get("add_bos_token") is not False:
        setattr(backend, "post_processor", _bos_first(pieces["bos"], trained.bos_id))  # noqa: B010  # stubs lack it
    defaults = {**roles, "clean_up_tokenization_spaces": False}
    generic = {"tokenizer_class": "PreTrainedTokenizerFast"}
    dropped = ("auto_map", "tokenizer_file", "tokenizer_class", "add_bos_token", "add_eos_token")
    kept = {key: value for key, value in settings.items() if key not in dropped and value is not None}
    with (
        tempfile.TemporaryDirectory() as made
    ):  # transformers reads the settings (added tokens, template) itself
        folder = Path(made)
        for name in BESIDE:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
        backend.save(str(folder / "tokenizer.json"))
        content = json.dumps({**defaults, **kept, **generic})
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    tokenizer.name_or_path = str(file.parent)
    return tokenizer


def _bos_first(bos: str, bos_id: int) -> Any:
    from tokenizers import processors

    single, pair = f"{bos} $A", f"{bos} $A {bos}:1 $B:1"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, bos_id)])


def _read_model(file: Path) -> Any:
    """The parsed ModelProto."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    messages: Any = import_protobuf()
    model = messages.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
        if not model.pieces:
            raise DecodeError("no pieces in it")
    except DecodeError as error:
        raise UserError(
            f"not a sentencepiece model: {error}",
            where=str(file),
            fix="give the whole file, or a tokenizer.json",
        ) from error
    unfit = [
        "it is not BPE" if model.trainer_spec.model_type != BPE else "",
        "it has no byte fallback" if not model.trainer_spec.byte_fallback else "",
        "it normalizes its text" if model.normalizer_spec.precompiled_charsmap else "",
        "it removes spaces" if model.normalizer_spec.remove_extra_whitespaces else "",
    ]
    if any(unfit):
        reasons = ", ".join(reason for reason in unfit if reason)
        fix = "convert it where the sentencepiece library is installed and give the tokenizer.json"
        raise UserError(
            f"this sentencepiece model cannot be read as it is: {reasons}", where=str(file), fix=fix
        )
    return model


def _convert(file: Path, *, add_prefix_space: bool, legacy: bool) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

    class Converter(LlamaConverter):
        """transformers' own, whose extraction of the merges asks for the sentencepiece library only to open the file."""

        def tokenizer(self, proto: Any) -> Tokenizer:
            scores = {piece.piece: piece.score for piece in proto.pieces}
            vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
            merges = generate_merges(vocab, scores)
            unknown = proto.pieces[proto.trainer_spec.unk_id].piece
            model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
            made = Tokenizer(model)
            marks = [(piece.piece, piece.type) for piece in proto.pieces if piece.type in (3, 4)]
            # Control pieces (3) are special, pieces defined by the user (4) only kept whole.
            made.add_tokens([AddedToken(mark, normalized=False, special=kind == 3) for mark, kind in marks])
            return made

    about = SimpleNamespace(vocab_file=str(file), add_prefix_space=add_prefix_space, legacy=legacy)
    return Converter(about).converted()
