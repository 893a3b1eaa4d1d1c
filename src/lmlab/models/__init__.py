"""Models and what is done to them: build, packed attention, quantize, adapt, head and loss, memory, hardware."""

import logging
import warnings

# What the libraries say at import, or at every adapter, about choices that are made here. bitsandbytes: an optional kernel
# is absent (it is not used). torchao, which transformers imports where it happens to be installed: kernels for other machines
# cannot be loaded. PEFT: transformers renamed a property that it reads.
for _name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")
