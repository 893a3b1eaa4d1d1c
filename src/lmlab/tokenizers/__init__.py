"""Tokenizers: train byte-level BPE (`train`), load and check any other, encode with offsets (`load`).

The package is named like the library `tokenizers`; imports are absolute, so the two never meet. Modules import
only records and registry; transformers and tokenizers are imported inside the functions that use them, so that
reading a config class costs nothing.
"""

from lmlab.tokenizers.load import (
    FileTokenizer,
    FromModelTokenizer,
    adds_bos,
    check_vocabulary,
    encode_document,
    load_tokenizer,
    tokenizer_hash,
)
from lmlab.tokenizers.train import DEFAULT_CHAT_TEMPLATE, BPETokenizer, train_bpe

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "BPETokenizer",
    "FileTokenizer",
    "FromModelTokenizer",
    "adds_bos",
    "check_vocabulary",
    "encode_document",
    "load_tokenizer",
    "tokenizer_hash",
    "train_bpe",
]
