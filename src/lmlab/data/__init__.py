"""From a source to rows of token ids: sources, formats, encoding, shards, packing, order, preview."""
