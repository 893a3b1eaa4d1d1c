"""Greedy decoding, watched: `lmlab.generation.decode` as samples use it, and the logits it chose from at each step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmlab.checks.bench import Bench
from lmlab.checks.sizes import largest
from lmlab.checks.table import Part

if TYPE_CHECKING:
    import torch

Seen = list[tuple["torch.Tensor", "torch.Tensor"]]
"""Per step: ids ``[lines, width]``, left-padded, and the logits ``[lines, vocab]`` that followed them."""
Decoded = tuple[list[list[int]], Seen]


class _Noting:
    """A logits processor that changes nothing and keeps what it was given."""

    def __init__(self) -> None:
        self.seen: Seen = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids.cpu(), scores.detach().float().cpu()))
        return scores


class Watched:
    """Decodes prompts greedily, together or alone.

    Args:
        prompts: all of them, as token ids.
        new_tokens: per prompt.
    """

    def __init__(self, bench: Bench, prompts: Sequence[list[int]], *, new_tokens: int) -> None:
        self.bench, self.prompts, self.new_tokens = bench, prompts, new_tokens

    def __call__(self, prompts: Sequence[list[int]], *, ends: Collection[int]) -> Decoded:
        """New tokens of each prompt, and what they were chosen from.

        Args:
            ends: ids that end a row.
        """
        from lmlab.generation.decode import generate

        noting, generator = _Noting(), self.bench.built.generator
        with generator.around(self.new_tokens):
            rows = generate(
                generator.model,
                prompts,
                sampler=self._sampler(noting),
                eos_token_ids=ends,
                seeds=[0] * len(prompts),
            )
        return [row.token_ids for row in rows], noting.seen

    def _sampler(self, noting: _Noting) -> Any:
        """The plain greedy sampler, whatever else the config's own rules out, with a processor that looks on."""
        from lmlab.registry import samplers

        greedy: Any = samplers.class_of("greedy")

        class Greedy(greedy):
            def processors(self, *args: Any, **kwargs: Any) -> Any:
                own = super().processors(*args, **kwargs)
                own.append(noting)
                return own

        return Greedy.model_validate({"kind": "greedy", "max_new_tokens": self.new_tokens})

    def together_against_alone(
        self, alone: Sequence[Decoded], full: Sequence[torch.Tensor]
    ) -> Iterator[Part]:
        """All prompts in one batch, of which one ends early and leaves it, against each alone.

        Args:
            alone: each prompt decoded by itself, without an end.
            full: logits ``[new tokens, vocab]`` of each by one full forward pass.
        """
        import torch

        texts = [found[0] for found, _ in alone]
        end = texts[0][min(2, len(texts[0]) - 1)]
        found, seen = self(self.prompts, ends={end})
        worst, matched = 0.0, 0
        for step, (ids, scores) in enumerate(seen):
            for line, logits in zip(ids.tolist(), scores, strict=True):
                row = self._row_of(line, texts, step)
                if row is None or end in texts[row][:step]:
                    continue
                expected = alone[row][1][step][1][0]
                worst = largest((worst, float((logits - expected).abs().max() / expected.abs().max())))
                matched += 1
        margin = 0.0
        for row, tokens in enumerate(found):
            told = texts[row][: texts[row].index(end)] if end in texts[row] else texts[row]
            wrong = next(
                (i for i, pair in enumerate(zip(tokens, told, strict=False)) if pair[0] != pair[1]), None
            )
            if wrong is None and len(tokens) == len(told):
                continue
            place = wrong if wrong is not None else min(len(tokens), len(told))
            chosen = tokens[place] if place < len(tokens) else end
            gap = full[row][place].max() - full[row][place, chosen]
            margin = largest((margin, float(gap / full[row].abs().max())))
        allowed = self.bench.rounding
        yield Part("logits of prompts together and alone", worst if matched else torch.inf, allowed)
        yield Part(
            "greedy tokens of prompts together and alone", margin, allowed, "another token is the best"
        )

    def _row_of(self, line: list[int], texts: Sequence[list[int]], step: int) -> int | None:
        """The prompt that a line of a batch has come from, as long as its text is that of the prompt alone."""
        for row in sorted(range(len(self.prompts)), key=lambda row: -len(self.prompts[row])):
            ids = [*self.prompts[row], *texts[row][:step]]
            if line[-len(ids) :] == ids:
                return row
        return None
