"""lmlab: causal-LM pretraining and supervised fine-tuning, composed by Hydra and run by Lightning."""

__version__ = "0.1.0"
