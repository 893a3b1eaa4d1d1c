"""Where Hydra looks for plugins; the sweeper itself is lmlab.sweeps.sweeper."""

from lmlab.sweeps.sweeper import LmlabSweeper, register

register()

__all__ = ["LmlabSweeper"]
