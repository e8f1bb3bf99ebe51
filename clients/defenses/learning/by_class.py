"""Batches of few classes, for defenses that want labels to repeat."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedsim.defense import ClientContext, Refusal


def repeated_classes(
    batches: Iterable[Tensor], repeats: int | None, name: str, ctx: ClientContext
) -> Iterator[Tensor]:
    """Replace each batch of B by one of ``B // repeats`` classes, each ``repeats`` times, shuffled.

    Parameters
    ----------
    batches : iterable of Tensor
        Only their sizes count.
    repeats : int or None
        None for a single class in each batch.  A client with too few classes of that many examples
        uploads smaller batches, never ones with fewer repeats.
    name : str
        Whose stream of secret numbers it is.
    ctx : ClientContext
        With the client's own labels.

    Raises
    ------
    Refusal
        If no class has ``repeats`` examples (two, where it is None).
    """
    assert ctx.labels is not None
    least = repeats or 2
    counts = ctx.labels.bincount()
    eligible = (counts >= least).nonzero()[:, 0]
    if len(eligible) == 0:
        raise Refusal(f"no class has the {least} examples that {name} wants of it")
    for number, batch in enumerate(batches):
        generator = ctx.secret(name, "classes", ctx.round, number)
        wanted = 1 if repeats is None else min(max(1, len(batch) // repeats), len(eligible))
        drawn = torch.multinomial(counts[eligible].double(), wanted, generator=generator)
        chosen = torch.cat(
            [
                _some((ctx.labels == label).nonzero()[:, 0], repeats or len(batch), generator)
                for label in eligible[drawn]
            ]
        )
        yield _some(chosen, len(chosen), generator)


def _some(indices: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)[:most]]
