"""Generation: how the next token is chosen (`lmlab.generation.samplers`) and the loop that writes (`.decode`).

A sampler is a small frozen config that hands out transformers' own logits processors; the loop is plain torch over
any causal LM. Trade-off: no beam search and no assisted decoding here, transformers' ``generate`` has them. Nothing
is imported in this file, so that reading a run's config (which needs the samplers only) does not import torch.
"""
