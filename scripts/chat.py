"""Talk to a run, an adapter or a Hugging Face model, in the terminal or on a page: `python scripts/chat.py RUN --web`."""

from __future__ import annotations

import argparse
import sys

from lmlab.config.compose import run_script


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chat.py", description=__doc__)
    parser.add_argument("model", help="a run's directory, an adapter, a model directory or a hub id")
    parser.add_argument("--system", help="a system message, for models trained on conversations")
    parser.add_argument("--sampler", metavar="NAME", help="a name of conf/sampler (default: the run's own)")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first answer; the next has seed + 1, ...")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a further adapter on the same base",
    )
    parser.add_argument("--use", metavar="NAME", help="begin with that adapter, or with base: without any")
    parser.add_argument("--best", action="store_true", help="of a run: its best weights instead of its last")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--web", action="store_true", help="a page on this machine instead of the terminal")
    parser.add_argument("--port", type=int, default=7860, help="of the page; 0 picks a free one")
    options = parser.parse_args(arguments)
    return run_script(lambda: _chat(options), stopped="\ninterrupted")  # while it loads


def _chat(options: argparse.Namespace) -> int:
    from lmlab.chat.choice import check_seed, chosen_sampler, further_adapters
    from lmlab.plugged import samplers_of

    check_seed(options.seed, where="--seed")
    adapters = further_adapters(options.adapter)
    changes = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    further = samplers_of(options.model, wanted=[options.sampler])
    chosen_sampler(
        {}, options.sampler, changes, also=further
    )  # a wrong one is told before anything is loaded
    if options.web:
        from lmlab.chat.page import free_port, require_gradio

        require_gradio()
        free_port(options.port)
    from lmlab.chat.dialogue import Dialogue
    from lmlab.load import load_for_use

    usable = load_for_use(
        options.model, accelerator=options.accelerator, use_best=options.best, adapters=adapters
    )
    dialogue = Dialogue(usable)
    dialogue.check(adapter=options.use, system=options.system)
    sampler = chosen_sampler(usable.sampler, options.sampler, changes, also=further)
    if options.web:
        from lmlab.chat.page import serve

        return serve(
            dialogue,
            name=options.model,
            port=options.port,
            sampler=sampler,
            seed=options.seed,
            system=options.system,
            adapter=options.use,
        )
    from lmlab.chat.terminal import Terminal

    return Terminal(
        dialogue, sampler=sampler, seed=options.seed, system=options.system, adapter=options.use
    ).run()


if __name__ == "__main__":
    sys.exit(main())
