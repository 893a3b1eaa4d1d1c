"""Tokenizers trained, measured and compared on one page: `compare`, on the texts of `texts`, by the keys of `options`."""
