"""Views that can be attacked as one batch: same model, same weights, same number of examples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedsim.data import DataSpec
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import LabelRule

# Candidates that go through the network at once, and numbers in their gradients, by device.  On
# the CPU more images at once outgrow its caches, and each takes longer.
IMAGES_AT_ONCE = {"cpu": 32, "cuda": 512}
NUMBERS_AT_ONCE = {"cpu": 2**26, "cuda": 2**29}


@dataclass(frozen=True)
class Group:
    """Views that share weights and batch size.

    Attributes
    ----------
    indices : tuple of int
        Their places among all views.
    views : tuple of ServerView
    batch_size : int
    model : nn.Module
        What they were all sent.
    names : tuple of str
        Its parameters that came back, in the order of the updates.
    observed : Tensor
        ``[V, P]``: their updates, flattened, on the device and in the type of the model.
    spec : DataSpec
    labels : Tensor or None
        ``[V, B]`` int64, where a rule gave them.
    """

    indices: tuple[int, ...]
    views: tuple[ServerView, ...]
    batch_size: int
    model: nn.Module
    names: tuple[str, ...]
    observed: Tensor
    spec: DataSpec
    labels: Tensor | None

    @property
    def known_labels(self) -> Tensor:
        """The labels that the rule gave, ``[V, B]`` int64."""
        if self.labels is None:
            raise ValueError("this search needs labels: give the recipe a label rule")
        return self.labels

    @property
    def sizes(self) -> list[int]:
        """How many numbers of an update belong to each parameter."""
        parameters = dict(self.model.named_parameters())
        return [parameters[name].numel() for name in self.names]

    @property
    def at_once(self) -> int:
        """How many problems to run as one batch."""
        return at_once(self.observed.device, self.batch_size, self.observed.shape[1])


def at_once(device: torch.device, batch_size: int, numbers: int) -> int:
    """Return how many problems of so many images and gradient entries to run as one batch."""
    images = IMAGES_AT_ONCE.get(device.type, 32) // batch_size
    return max(1, min(images, NUMBERS_AT_ONCE.get(device.type, 2**26) // numbers))


def grouped(
    views: Sequence[ServerView],
    knowledge: Knowledge,
    batch_size: Callable[[ServerView], int],
    labels: LabelRule | None,
    receipts: list[str],
) -> Iterator[Group]:
    """Yield groups of neighboring views, never more than run at once.

    A view whose update says nothing (zero, or not finite) is left out, and ``receipts`` says so.
    """
    waiting: list[tuple[int, ServerView, int]] = []
    for index, view in enumerate(views):
        size = batch_size(view)
        numbers = sum(tensor.numel() for tensor in view.received.values())
        full = len(waiting) >= at_once(knowledge.device, size, numbers)
        if waiting and (full or size != waiting[0][2] or not alike(view, waiting[0][1])):
            yield from _group(waiting, knowledge, labels, receipts)
            waiting = []
        waiting.append((index, view, size))
    if waiting:
        yield from _group(waiting, knowledge, labels, receipts)


def alike(one: ServerView, other: ServerView) -> bool:
    """Say whether two views are of the same model with the same weights."""
    if one.model != other.model or one.received.keys() != other.received.keys():
        return False
    return one.sent is other.sent or (
        one.sent.keys() == other.sent.keys()
        and all(torch.equal(tensor, other.sent[name]) for name, tensor in one.sent.items())
    )


def joined_groups(groups: Sequence[Group]) -> Group:
    """Return one group of the views of several that share weights and batch size."""
    given = [group.labels for group in groups if group.labels is not None]
    return replace(
        groups[0],
        indices=tuple(index for group in groups for index in group.indices),
        views=tuple(view for group in groups for view in group.views),
        observed=torch.cat([group.observed for group in groups]),
        labels=torch.cat(given) if given else None,
    )


def _group(
    waiting: list[tuple[int, ServerView, int]],
    knowledge: Knowledge,
    rule: LabelRule | None,
    receipts: list[str],
) -> Iterator[Group]:
    """Yield the group of these views, or nothing where none of them says anything."""
    model = knowledge.model(waiting[0][1])
    parameter = next(model.parameters())
    names = [name for name, _ in model.named_parameters() if name in waiting[0][1].received]
    kept, observed, labels = [], [], []
    for index, view, size in waiting:
        update = view.update()
        flat = torch.cat([update[name].flatten().to(parameter) for name in names])
        if not flat.isfinite().all() or not flat.any():
            receipts.append(f"{view.label}: its update is zero or not finite; left out")
            continue
        kept.append((index, view))
        observed.append(flat)
        if rule is not None:
            labels.append(rule.labels(view, model, size, knowledge))
    if not kept:
        return
    indices, views = zip(*kept, strict=True)
    yield Group(
        indices,
        views,
        waiting[0][2],
        model,
        tuple(names),
        torch.stack(observed),
        model.spec,  # type: ignore[arg-type]
        torch.stack(labels).to(parameter.device) if labels else None,
    )
