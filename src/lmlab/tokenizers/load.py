"""Load a tokenizer from disk or hub, check it against a model, and encode documents with character offsets.

A local value never leads to the network, and a directory whose tokenizer is a plain tokenizer.json is loaded
exactly as the file says: `AutoTokenizer` would replace it by a model family's own class (and its word pattern)
when a config.json of certain families, Qwen2 among them, lies beside it.

GPT-2's vocabulary and merges and sentencepiece's tokenizer.model are converted (`convert`).

Trade-off: only fast tokenizers encode documents, since labels come from character offsets and the slow ones have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmlab import registry
from lmlab.hub import hub_reachable
from lmlab.records import UserError
from lmlab.remote import Remote, fetch_below, is_url, without_file_scheme
from lmlab.tokenizers.convert import (
    PAIRS,
    from_sentencepiece,
    from_vocab_and_merges,
    pair_in,
    read_settings,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

JSON_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
OTHER_FILES = ("vocab.txt", "tekken.json")
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
ROLES = {
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}
"""What the roles are usually called, for a tokenizer.json that comes without a tokenizer_config.json."""


@registry.tokenizers.register
class FromModelTokenizer(registry.Config):
    """The tokenizer that lies with the model.

    Attributes:
        added_tokens: special tokens that its text uses, see `add_tokens`. The model's embedding grows to hold those
            that are new, and the rows of all of them are trained, under an adapter too.
    """

    kind: Literal["from_model"]
    added_tokens: list[str]


@registry.tokenizers.register
class FileTokenizer(registry.Config):
    """A tokenizer on disk.

    Attributes:
        path: a directory, a tokenizer.json, a sentencepiece tokenizer.model, or a vocab.json with its merges.txt.
        added_tokens: as for `FromModelTokenizer`.
    """

    kind: Literal["file"]
    path: str
    added_tokens: list[str]


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer at ``path``: a directory, one of the files below, a URL of either (``s3://``), or a hub name.

    Files are a tokenizer.json, a sentencepiece .model, or one of vocab.json and merges.txt (encoder.json and
    vocab.bpe) beside the other. A `Path`, and a string that starts with ``.``, ``/`` or ``~``, ends in ``.json`` or
    lies in an existing directory, is local. Without a connection a hub name is served from the local cache.

    Raises:
        UserError: nothing there, no or broken tokenizer files, or the hub does not have it or is out of reach.
    """
    if isinstance(path, str):
        path = fetch_below(Remote(path)) if is_url(path) else without_file_scheme(path)
    if not _is_local(path):
        return _load_from_hub(str(path), revision, trust_remote_code)
    place = Path(path).expanduser()
    if not place.exists():
        fix = "check the path; a hub name looks like 'gpt2' or 'owner/name'"
        raise UserError("no such tokenizer", where=str(place), fix=fix)
    if place.name == "tokenizer.json" and (place.parent / "tokenizer_config.json").is_file():
        place = place.parent
    try:
        return _load_from_disk(place, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything here, a bare Exception among it
        fix = "save it again with save_pretrained, as a fast tokenizer (tokenizer.json)"
        raise UserError(
            f"the tokenizer cannot be read: {_brief(error)}", where=str(place), fix=fix
        ) from error


def _is_local(path: str | Path) -> bool:
    if isinstance(path, Path) or path.startswith((".", "/", "~")) or path.endswith(".json"):
        return True
    place = Path(path)
    return place.exists() or (place.parent != Path() and place.parent.exists())


def _load_from_disk(place: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """An existing directory or file; `UserError` for what is missing or broken, else the libraries' errors."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if place.is_file():
        return _load_file(place)
    if not (place / "tokenizer.json").is_file() and (converted := _convert_folder(place)) is not None:
        return converted
    if not any((place / name).is_file() for name in JSON_FILES + OTHER_FILES):
        fix = (
            "a directory needs "
            + " and ".join(JSON_FILES)
            + ", tokenizer.model, or vocab.json and merges.txt"
        )
        raise UserError("no tokenizer files", where=str(place), fix=fix)
    read = {name: read_settings(place, name) for name in JSON_FILES if (place / name).is_file()}
    settings = read.get("tokenizer_config.json", {})
    if "tokenizer.json" in read and not settings and not (place / "config.json").is_file():
        return _with_roles(PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json")), str(place))
    generic = settings.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in settings
    loader = PreTrainedTokenizerFast if generic and "tokenizer.json" in read else AutoTokenizer
    return loader.from_pretrained(str(place), local_files_only=True, trust_remote_code=trust_remote_code)


def _load_file(file: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    if file.suffix == ".model":
        return from_sentencepiece(file)
    if any(file.name in names for names in PAIRS) and (pair := pair_in(file.parent)) is not None:
        return from_vocab_and_merges(*pair, ROLES)
    read_settings(file.parent, file.name)  # says where broken JSON is broken
    return _with_roles(PreTrainedTokenizerFast(tokenizer_file=str(file)), str(file))


def _convert_folder(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder without tokenizer.json, None if it holds no file that is converted here."""
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return from_sentencepiece(folder / name)
    pair = pair_in(folder)
    return None if pair is None else from_vocab_and_merges(*pair, ROLES)


def _with_roles(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Fill in EOS, BOS, ... by their usual names: tokenizer.json alone does not say which is which."""
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for role, names in ROLES.items():
        name = next((name for name in names if name in specials), None)
        if name is not None and getattr(tokenizer, role) is None:
            setattr(tokenizer, role, name)
            log.warning("%s: no tokenizer_config.json; '%s' is taken as %s", where, name, role)
    return tokenizer


def _load_from_hub(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    offline = not hub_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=offline
        )
    except Exception as error:  # OSError, ValueError, the hub's own
        if offline:
            what, fix = "not cached, and the hub cannot be reached", "give a directory, or connect once"
        else:
            what, fix = _brief(error), "check the name and the revision, and HF_TOKEN if it is gated"
        raise UserError(f"tokenizer '{name}' cannot be loaded: {what}", where="hub", fix=fix) from error
    if offline:
        log.warning("the hub cannot be reached: tokenizer '%s' comes from the local cache", name)
    return tokenizer


def _brief(error: Exception) -> str:
    """The first sentence of a library's error: theirs run over several lines of advice."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].split(". ")[0].rstrip(".:")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own default encoding begins with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        what = f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets"
        raise UserError(what, where="tokenizer", fix="use one with a tokenizer.json")
    return backend


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_bos: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of ``text`` and the characters each stands for, from one call; at most one BOS, at ``(0, 0)``.

    None is added to a text that begins, white space apart, with the BOS token.

    No character falls between two spans: joined they give the text (but for what a normalizer drops at its end).
    Spans may overlap: tokens that share a character (bytes of it, a ``▁`` put before the text) all span it.

    Raises:
        UserError: a slow tokenizer (it has no offsets), not valid Unicode, BOS wanted and none known.
    """
    _backend(tokenizer)
    try:
        # verbose=False: no warning about model_max_length; cutting to length is the caller's, and counted.
        encoding: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(f"not valid Unicode: {text[:40]!r}", where="text", fix="mend or drop it") from error
    ids: list[int] = encoding.input_ids
    offsets: list[tuple[int, int]] = []
    reached = 0
    for start, end in encoding.offset_mapping:
        # Some byte-level tokenizers (trim_offsets) leave a token's spaces out of its span, down to an empty span
        # for a token of spaces; what lies between two spans therefore belongs to the later one.
        offsets.append((min(start, reached), end))
        reached = max(reached, end)
    if add_bos:
        bos = tokenizer.bos_token_id
        if not isinstance(bos, int):
            raise UserError("the tokenizer has no BOS token", where="tokenizer", fix="encode without one")
        # A chat template often brings its own, some after a newline or a space.
        if not (text.lstrip().startswith(str(tokenizer.bos_token)) and bos in ids):
            return [bos, *ids], [(0, 0), *offsets]
    return ids, offsets


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase, *, with_chat: bool = True) -> str:
    """sha256 of all that decides ids and texts: the backend's JSON, roles, flags and the chat template.

    Args:
        with_chat: leave the chat template out for text that never passes through one.

    Raises:
        UserError: a slow tokenizer, which has no such JSON.
    """
    content = json.loads(_backend(tokenizer).to_str())
    # Padding and truncation are the state of the last call, not of the tokenizer.
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    flags = [
        getattr(tokenizer, name, None) for name in ("split_special_tokens", "clean_up_tokenization_spaces")
    ]
    template = tokenizer.chat_template if with_chat else None
    canonical = json.dumps([content, roles, flags, template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embedding rows that hold every id; more than ``len(tokenizer)`` for a vocabulary with gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Make every one of ``tokens`` a special token and return their ids, in that order.

    New ones get the ids after the largest. One that is there already keeps its id.

    Raises:
        UserError: an empty or repeated token, or one with outer spaces.
    """
    from transformers.tokenization_utils_base import AddedToken

    where = "tokenizer.added_tokens"
    if len(set(tokens)) < len(tokens):
        raise UserError(f"repeated token in {list(tokens)}", where=where, fix="name each once")
    for token in tokens:
        if not token or token != token.strip():
            raise UserError(f"bad token {token!r}", where=where, fix="not empty, no outer spaces")
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        log.info("the tokenizer has %s already; nothing new is added for it", ", ".join(there))
    marks = [AddedToken(token, normalized=False, special=True) for token in tokens]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = tokenizer.get_vocab()
    return [ids[token] for token in tokens]


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str, *, added: Collection[str] = ()
) -> None:
    """Make sure that every id has an embedding row; a tokenizer smaller than the model is fine.

    Args:
        added: tokens for which the embedding will be enlarged.

    Raises:
        UserError: other tokens have ids at or above ``vocab_size``; the message names the largest.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    beyond = [(i, token) for i, token in beyond if token not in added]
    if beyond:
        largest = ", ".join(f"{token!r}={i}" for i, token in beyond[:-4:-1])
        what = f"{len(beyond)} token(s) beyond the model's {vocab_size} embedding rows, the largest {largest}"
        fix = "use the tokenizer of the model (tokenizer=from_model), or name them in tokenizer.added_tokens"
        raise UserError(what, where=where, fix=fix)
