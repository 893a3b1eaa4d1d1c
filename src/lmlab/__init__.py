"""lmlab: causal-LM pretraining and supervised fine-tuning, composed by Hydra and run by Lightning."""

import logging
import warnings

__version__ = "0.1.0"

# What the libraries say at import, or at every adapter, about choices that are made here. bitsandbytes: an optional kernel
# is absent (it is not used). torchao, which transformers imports where it happens to be installed: kernels for other machines
# cannot be loaded. PEFT: transformers renamed a property that it reads. Here, as any of them may be the first that is imported.
for _name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")
