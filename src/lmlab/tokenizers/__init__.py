"""Tokenizers: train byte-level BPE (`train`), load any other (`load`, `convert`), encode with offsets.

The package is named like the library `tokenizers`; imports are absolute, so the two never meet. Modules import
only records and registry; transformers and tokenizers are imported inside the functions that use them, so that
reading a config class costs nothing.
"""

from lmlab.tokenizers.characters import CharsTokenizer, train_chars
from lmlab.tokenizers.load import (
    FileTokenizer,
    FromModelTokenizer,
    add_tokens,
    adds_bos,
    check_vocabulary,
    encode_document,
    load_tokenizer,
    rows_needed,
    tokenizer_hash,
)
from lmlab.tokenizers.train import DEFAULT_CHAT_TEMPLATE, BPETokenizer, TextBudget, train_bpe

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "BPETokenizer",
    "CharsTokenizer",
    "FileTokenizer",
    "FromModelTokenizer",
    "TextBudget",
    "add_tokens",
    "adds_bos",
    "check_vocabulary",
    "encode_document",
    "load_tokenizer",
    "rows_needed",
    "tokenizer_hash",
    "train_bpe",
    "train_chars",
]
