"""PEFL: weight matrices as products of several, and what is uploaded is the factors' gradients.

Each fully connected layer W ``[out, in]`` becomes a cascade without activations,

    W = A_1 A_2 ... A_c,   x -> A_1 (A_2 (... (A_c x))) + b,

with every inner width ``min(in, out)``; it begins at the very W that the network would have.  What
is uploaded are the gradients of the factors, from which that of W does not follow.
Liu et al., "Privacy-Encoded Federated Learning Against Gradient-Based Data Reconstruction Attacks",
IEEE TIFS 2023.  Only a summary was read (weight matrices decomposed into cascading sub-matrices,
so that data relate non-linearly to what is shared): this is our reading.  Convolutions are left.

With all factors public nothing is promised: for one example the gradient of the input's factor is
``(A_1 ... A_{c-1})' d x'``, of rank one, and its right singular vector is x up to scale.  And an
attack that matches gradients knows the factors, as it knows any network.

With ``private`` each client keeps the input's factor A_c to itself: drawn from its secret stream,
trained, and never uploaded (in its place zeros are).  What is left of x in the upload is A_c x.
What breaks that: A_c can be searched beside the image; several rounds with one A_c were not looked
at.  The server's accuracy is then that of its own A_c, which nobody trains, under the clients'
other factors.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from clients.defenses.model.network import called, remembered, replace
from fedsim import seeds
from fedsim.attack import Paper, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import ClientContext, Defense, Rank
from fedsim.models import build_model
from fedsim.registry import Expression, register

PART = "own"
Factors = Annotated[int, Field(ge=2)]


class Cascade(nn.Module):
    """A fully connected layer as the product of ``factors`` matrices, ``A_c`` first.

    Parameters
    ----------
    layer : nn.Linear
        What the product is at the start; the last factor has its bias.
    factors : int
        c.
    """

    def __init__(self, layer: nn.Linear, factors: int) -> None:
        super().__init__()
        self.factors = nn.ModuleList()
        for weight in factored(layer.weight.detach(), factors):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight)
            self.factors.append(linear)
        linear.bias = layer.bias

    def __iter__(self) -> Iterator[nn.Linear]:
        """Return the layers that the input goes through: the client's own first, if it has one."""
        first, *others = cast(Iterable[nn.Linear], self.factors)
        return iter([getattr(self, PART, first), *others])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        for factor in self:
            inputs = factor(inputs)
        return inputs

    def product(self) -> Tensor:
        """Return W, ``[out, in]``."""
        first, *others = (factor.weight for factor in self)
        return reduce(lambda weight, factor: factor @ weight, others, first)


def factored(weight: Tensor, factors: int) -> list[Tensor]:
    """Return ``A_c, ..., A_1`` whose product is ``weight``: random rotations, undone in one."""
    rows, columns = weight.shape
    inner = min(rows, columns)
    turns = [nn.init.orthogonal_(weight.new_empty(inner, inner)) for _ in range(factors - 1)]
    undone = torch.linalg.multi_dot(turns).T if len(turns) > 1 else turns[0].T
    # Rotations stand where they are square: behind W if it is wide, before it if it is tall.
    if rows <= columns:
        return [undone @ weight, *turns[::-1]]
    return [*turns[::-1], weight @ undone]


@register("model", "pefl-network")
def pefl_network(spec: DataSpec, *, of: str, factors: Factors = 2) -> nn.Module:
    """Put a cascade of matrices in the place of each fully connected layer.

    Parameters
    ----------
    spec : DataSpec
        Shape and number of classes.
    of : str
        Model expression of the network.
    factors : int
        Matrices in a cascade.

    Raises
    ------
    ValueError
        If the network has no fully connected layer.
    """
    model = build_model(of, spec)
    found = [one for one in called(model) if isinstance(one.layer, nn.Linear)]
    if not found:
        raise ValueError(f"{of} has no fully connected layer to decompose")
    for one in found:
        assert isinstance(one.layer, nn.Linear)
        replace(model, one.name, Cascade(one.layer, factors))
    return model


@register("defense", "pefl")
@dataclass(frozen=True, kw_only=True)
class PEFL(Defense):
    """Train, all together, cascades of matrices in the place of fully connected layers.

    Parameters
    ----------
    factors : int
        Matrices in a cascade.
    private : bool
        Whether each client has input factors of its own, which it never uploads.
    """

    paper: ClassVar[Paper] = Paper(
        title="Privacy-Encoded Federated Learning Against Gradient-Based Data Reconstruction "
        "Attacks",
        authors="Hongfu Liu, Bin Li, Changlong Gao, Pei Xie, Chenglin Zhao",
        venue="IEEE Transactions on Information Forensics and Security",
        year=2023,
        published="no figure was read",
        measured="digits, convnet(width=8), one image, 4 images: "
        "public factors 44.2 dB; private 6.7, searched with the image 42.2, "
        "known 30.0 "
        "(python -m pytest -m slow -s tests/clients/test_defenses_pefl.py)",
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "inverting-gradients(iterations=150, tv=1e-3)",
            "defenses": "pefl(private=True)",
            "data.dataset": "digits",
            "model.name": "convnet(width=8)",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        # Undefended it is 29 dB, a guess 11.
        low=2.0,
        high=14.0,
    )
    rank: ClassVar[Rank] = Rank.MODEL
    strengths: ClassVar[tuple[str, ...]] = (
        "pefl",
        "pefl(private=True)",
        "pefl(factors=3, private=True)",
    )
    adversary: ClassVar[str] = (
        "joint-inversion(defense='pefl(private=True)', iterations=1000, restarts=4, tv=1e-4)"
    )

    factors: Factors = 2
    private: bool = False

    def architecture(self, model: str) -> str:
        """Return the network of cascades."""
        return str(Expression("pefl-network", {"of": model, "factors": self.factors}))

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        """Give each cascade the client's own input factor, under a name of its own."""
        for name, cascade in list(model.named_modules()):
            if self.private and isinstance(cascade, Cascade):
                like = cast(nn.Linear, cascade.factors[0]).weight
                with seeds.seeded_globals(ctx.secret(self.name, name)):
                    own = nn.Linear(like.shape[1], like.shape[0], bias=False)
                own.to(like.device, like.dtype)
                remembered(own, f"{self.name}.{name}", ctx)
                cascade.add_module(PART, own)
        return model
