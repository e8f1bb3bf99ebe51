"""Gradients of single surrogate examples under the very weights that clients were sent.

What is learned from gradients is learned for one set of weights: views are gathered by the model
and the weights behind them.  The gradient of a batch is the mean over its examples (no BatchNorm
in train mode), so that the gradients of single examples make batches of any size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedsim.data import Split
from fedsim.penalized import penalized_loss
from fedsim.threat import Knowledge
from fedsim.view import ServerView

# Numbers in the gradients that are computed at once, and examples.
NUMBERS_AT_ONCE, EXAMPLES_AT_ONCE = 2**24, 256


@dataclass
class SameModel:
    """Views that were sent the same weights.

    Attributes
    ----------
    first : ServerView
        One of them.
    names : list of str
        The parameters whose gradients came back, in the model's order.
    indices : list of int
        The views' places among all.
    labels : list of str
    updates : list of Tensor
        Of each, flattened, ``[P]``.
    """

    first: ServerView
    names: list[str]
    indices: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)

    def holds(self, view: ServerView) -> bool:
        """Say whether a view is of the same model with the same weights."""
        first = self.first
        if view.model != first.model or view.received.keys() != first.received.keys():
            return False
        return view.sent.keys() == first.sent.keys() and all(
            torch.equal(tensor, first.sent[name]) for name, tensor in view.sent.items()
        )

    def split(self, keys: Sequence[int]) -> list["SameModel"]:
        """Return the views of each key apart; ``keys`` has one for each view of all."""
        parts = {key: SameModel(self.first, self.names) for key in (keys[i] for i in self.indices)}
        for index, label, update in zip(self.indices, self.labels, self.updates, strict=True):
            part = parts[keys[index]]
            part.indices.append(index)
            part.labels.append(label)
            part.updates.append(update)
        return list(parts.values())


def by_model(
    views: Sequence[ServerView], knowledge: Knowledge, receipts: list[str]
) -> list[SameModel]:
    """Gather views by what was sent; ``receipts`` names those whose update says nothing."""
    found: list[SameModel] = []
    for index, view in enumerate(views):
        same = next((one for one in found if one.holds(view)), None)
        if same is None:
            model = knowledge.model(view)
            names = [name for name, _ in model.named_parameters() if name in view.received]
            same = SameModel(view, names)
            found.append(same)
        update = view.update()
        flat = torch.cat([update[name].detach().flatten().float().cpu() for name in same.names])
        if not flat.isfinite().all() or not flat.any():
            receipts.append(f"{view.label}: its update is zero or not finite; left out")
            continue
        same.indices.append(index)
        same.labels.append(view.label)
        same.updates.append(flat)
    return [same for same in found if same.updates]


def refuse_batch_statistics(model: nn.Module, batchnorm: str) -> None:
    """Refuse BatchNorm in train mode: a batch's gradient is then no mean over its examples.

    Raises
    ------
    ValueError
        Saying what would fit.
    """
    norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    if norms and batchnorm != "frozen":
        raise ValueError(
            "it learns from gradients of single examples, which BatchNorm in train mode does not "
            "have; use model.batchnorm = 'frozen', or a model without BatchNorm (convnet)"
        )


def example_gradients(
    model: nn.Module, names: Sequence[str], split: Split
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images ``[n, C, H, W]`` and the gradients of the clients' loss ``[n, P]``, float32.

    Parameters
    ----------
    model : nn.Module
        In the mode in which clients train; not changed.
    names : sequence of str
        The parameters to differentiate, in this order.
    split : Split
    """
    own = next(model.parameters())
    everything = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {name: everything[name] for name in names}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        one = image.unsqueeze(0), label.unsqueeze(0)
        return penalized_loss(model, one, {**everything, **parameters})

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    width = sum(parameter.numel() for parameter in wanted.values())
    together = max(1, min(EXAMPLES_AT_ONCE, NUMBERS_AT_ONCE // width))
    for part in torch.split(torch.arange(len(split)), together):
        images, labels = split.batch(part, own.dtype)
        found = each(wanted, images.to(own.device), labels.to(own.device))
        yield images.float(), torch.cat([found[name].flatten(1) for name in names], dim=1).float()
