"""The front door of lmlab: `python train.py [group=option] [key=value]`; `python train.py --help` lists them."""

import sys
from typing import Any

from lmlab.config.compose import run_app


def start(composed: Any, overrides: list[str]) -> int:
    """Import the heavy parts only when a run really starts, so that --help and --cfg answer at once."""
    from lmlab.start import start as start_run

    return start_run(composed, overrides)


if __name__ == "__main__":
    sys.exit(run_app(start))
