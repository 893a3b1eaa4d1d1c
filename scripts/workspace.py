"""A W&B workspace for the runs of a project: `python scripts/workspace.py PROJECT [--entity E] [--sweep FILE]`.

With a key it is saved and its address printed; without one, or with `--out`, its specification is written as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lmlab.config.compose import run_script
from lmlab.records import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="workspace.py", description=__doc__)
    parser.add_argument("project", help="as in logger.project")
    parser.add_argument("--entity", help="user or team (default: yours)")
    parser.add_argument(
        "--sweep", type=Path, help="a sweep file: its parameters go into the parallel coordinates"
    )
    parser.add_argument("--out", type=Path, help="write the specification there instead of saving")
    options = parser.parse_args(arguments)
    return run_script(lambda: _make(options))


def _make(options: argparse.Namespace) -> int:
    from lmlab.tracking.wandb import has_key
    from lmlab.tracking.workspace import (
        VARIED,
        build_workspace,
        default_entity,
        save_workspace,
        swept_keys,
        workspace_spec,
    )

    varied = swept_keys(options.sweep) if options.sweep else VARIED
    online = options.out is None and has_key()
    entity = options.entity or (default_entity() if online else "")
    workspace = build_workspace(options.project, entity=entity, varied=varied)
    if online:
        print(f"workspace: {save_workspace(workspace)}")
        return 0
    file = options.out or Path(f"{options.project}-workspace.json")
    try:
        file.write_text(json.dumps(workspace_spec(workspace), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}", where=str(file), fix="choose another --out"
        ) from error
    print(f"specification: {file}")
    if options.out is None:
        print("not saved, as there is no key: set WANDB_API_KEY in .env and start this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
