"""lmlab: causal-LM pretraining and supervised fine-tuning, composed by Hydra and run by Lightning."""

import logging

__version__ = "0.1.0"

# Where torchao is installed (for quant=int4), PEFT imports it in every process, and it warns of kernels for other machines;
# bitsandbytes warns of a package that its CPU kernels could also come from. Nobody here can do anything about either.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)
