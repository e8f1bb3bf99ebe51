"""Robbing the Fed: one wide layer before the model keeps single images of any batch apart.

Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the Fed: Directly Obtaining Private Data in
Federated Learning with Modified Models", ICLR 2022.

The server puts an imprint block before the model: ``z_i = <v, x> - c_i`` for ``n`` cut-offs
``c_1 < ... < c_n`` of one scalar ``h(x) = <v, x>``, ReLU, and a way back under which every active
unit gets the same derivative ``g_j`` of image j's loss.  Unit i fires for all images with
``h > c_i``, so that neighbors differ by the images of one bin:

    G_i - G_{i+1} = sum of g_j x_j,  gb_i - gb_{i+1} = sum of g_j  over c_i < h(x_j) <= c_{i+1}

and where a bin holds one image, ``x = (G_i - G_{i+1}) / (gb_i - gb_{i+1})`` exactly, whatever the
loss, the model behind, the scale of the update, and the number of clients in a sum.  The last bin
is ``G_n / gb_n``: all ``n`` bins are read.  With cut-offs at the quantiles of ``h``, the expected
share of images that are alone among M is ``(1 - 1/n)^(M-1)``.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim import registry
from fedsim.attack import Cost, Manipulation, ModelToSend, Paper, Reconstruction, ToyCase
from fedsim.data import DataSpec
from fedsim.models import build_model, load_arrays, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation import gain as gains
from strategies.attacks.analytic.isolation.bins import (
    brightness,
    empirical_cutoffs,
    normal_cutoffs,
    random_functional,
    scalar_of,
)
from strategies.attacks.analytic.isolation.imprint import MODEL, Imprint, ReadOut, Variant

# Examples on which the attacker tries its own model to set the gain.
PROBE = 64
# A bin counts as occupied when its bias moved by more than so many rounding errors of what
# carries it: the largest cumulative gradient, or the uploaded weight itself.
ROUNDING = 8.0


@register("attack", "robbing-the-fed")
@dataclass(frozen=True, kw_only=True)
class RobbingTheFed(Manipulation):
    """Read images that are alone in their bin off the imprint layer's update.

    Threat model G; F with ``functional="random", bins="normal"``, which needs no data.  Works
    unchanged behind secure aggregation, with M the images of the whole sum.  Costs
    ``n (D + 1)`` parameters (``read_out="addition"``) or ``2 n D + n + D``.

    Parameters
    ----------
    units : int
        ``n``, the bins; for ``variant="one-shot"`` the *virtual* bins, of which one is read.
    functional : {"brightness", "random"}
        ``h``: the mean pixel, or a normal row on the standardized image.
    bins : {"surrogate", "normal"}
        Cut-offs from surrogate data, or standard normal quantiles (random functional only).
    variant : {"dense", "sparse", "one-shot"}
        ``dense``: ReLU, for FedSGD.  ``sparse``: Hardtanh and rows divided by the width of their
        own bin, so that a unit hears only its bin and nothing is subtracted: for FedAvg, and
        where clients clip and add noise, or prune, because no row carries the whole batch.
        ``one-shot``: two units around the quantile ``target``, for very large sums.
    read_out : {"addition", "linear"}
        Way back to the input: added to the image (the model keeps working), or instead of it.
    target : float or None
        Quantile of ``h`` at the middle of the one-shot bin; 0.5 when None.
    gain : float or None
        Factor on rows and biases (its inverse on the way back).  None: worked out on surrogate
        data, or on noise without them, so that the update survives float32 local steps and
        Flower's SecAgg+ (``gain.py``).
    clip : bool
        Bring pixels to ``[0, 1]``; False is for attacks that go on with what clients trained on,
        which a defense may have taken out of there.
    copies : int
        How many examples a client trains on for each that it counts; more than 1 is for who knows
        that a defense adds some.  As many are read.

    Fails where the scalar's distribution is misjudged or tied, with augmentation or standardization
    at the client, under noise of the size of one image's gradient, and in part under weight decay
    (FedAvg: every bin moves).  The authors' discrete cosine functional is not here.
    """

    paper: ClassVar[Paper] = Paper(
        title="Robbing the Fed: Directly Obtaining Private Data in Federated Learning with "
        "Modified Models",
        authors="Fowl, Geiping, Czaja, Goldblum, Goldstein",
        venue="ICLR",
        year=2022,
        published="mean PSNR 70.9 dB over 64 ImageNet images, 128 bins, ResNet-18 (authors' "
        "teaser); 60/64, 60/64 and 61/64 images exact with 1000 bins on CIFAR-10, CIFAR-100 and "
        "ImageNet (a later survey); one-shot: PSNR 47.1 for the caught image among 128 users x "
        "256 images, 32768 virtual bins (authors' notebook)",
        measured="CIFAR-10, batches of 64, float32, cut-offs from other images: share of images "
        "above 30 dB 0.783 with 256 bins, 0.947 with 1000; sparse after 8 local steps 0.866 with "
        "256 (pytest -s tests/strategies/isolation/test_published_figures.py, FEDSIM_TEST_DATA).  "
        "Photo tiles: fedsim run scenarios/robbing_the_fed.toml (4 x 64 images, 256 bins): 179 of "
        "256 exact, 204 at 20 dB; robbing_the_fed_secagg.toml (8 x 8, one quantized sum): 54 of 64 "
        "at 20 dB, median 50 dB; robbing_the_fed_fedavg.toml (sparse, 512 bins, 141 images a "
        "client, 9 float32 steps): 1864 of 2261 exact, with variant='dense' 7.  No surrogate data "
        "(random functional, normal quantiles), CIFAR-10, as above: 0.758 with 256 bins, 0.922 "
        "with 1000",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {
            Capability.UPDATES,
            Capability.BASICS,
            Capability.DETAILS,
            Capability.SURROGATE,
            Capability.MANIPULATION,
        }
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "G",
            "attack": "robbing-the-fed(units=16)",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 8,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        # 64 (1 - 1/16)^7 = 41 of 64 images alone in their bin; seeds 0 to 7 gave 33 to 46.
        figure="leak.exact",
        low=28.0,
        high=52.0,
    )

    units: Annotated[int, Field(ge=2)] = 256
    functional: Literal["brightness", "random"] = "brightness"
    bins: Literal["surrogate", "normal"] = "surrogate"
    variant: Variant = "dense"
    read_out: ReadOut = "addition"
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    gain: Annotated[float, Field(gt=0)] | None = None
    clip: bool = True
    copies: Annotated[int, Field(ge=1, le=64)] = 1

    def __post_init__(self) -> None:
        if self.bins == "normal":
            if self.functional != "random":
                raise ValueError(
                    "bins='normal' are those of functional='random'; the spread of the brightness "
                    "is not public: use bins='surrogate'"
                )
            # Threat F: nothing here asks for surrogate data.  A frozen dataclass has no other way.
            object.__setattr__(self, "needs", type(self).needs - {Capability.SURROGATE})
        if self.variant != "one-shot" and self.target is not None:
            raise ValueError("target= is the one-shot bin's; leave it out, or variant='one-shot'")
        half = 0.5 / self.units
        if self.target is not None and not half < self.target < 1 - half:
            raise ValueError(f"with {self.units} virtual bins target= lies in ({half}, {1 - half})")

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse ``one-shot`` on uploaded weights."""
        if kind == "weights" and self.variant == "one-shot":
            raise ValueError(
                "the two one-shot units drift apart in local training; with fedavg use "
                "variant='sparse'"
            )

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Put the imprint block before the honest model."""
        spec = knowledge.basics.data
        row, cutoffs = self._functional_and_cutoffs(knowledge)
        rows = imprint_rows(row, cutoffs, sparse=self.variant == "sparse")
        gain = self.gain
        if gain is None:
            at_one = self._expression(expression, len(rows[0]), 1.0)
            gain = self._calibrated(assembled(at_one, arrays, rows, spec), cutoffs, knowledge)
        to_send = self._expression(expression, len(rows[0]), gain)
        model = assembled(to_send, arrays, rows, spec)
        return ModelToSend(to_send, travelling(model), prefix="body.")

    def _expression(self, body: str, rows: int, gain: float) -> str:
        arguments = {
            "body": body,
            "units": rows,
            "variant": self.variant,
            "read_out": self.read_out,
            "gain": gain,
        }
        return str(registry.Expression(MODEL, arguments))

    def _functional_and_cutoffs(self, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
        """Return ``v`` (``[D]``) and the cut-offs of ``<v, x>`` (``[n + 1]``), float64."""
        spec = knowledge.basics.data
        if self.variant == "one-shot":
            middle, half = self.target or 0.5, 0.5 / self.units
            quantiles = torch.tensor([middle - half, middle + half, 1.0], dtype=torch.float64)
        else:
            quantiles = torch.linspace(0, 1, self.units + 1, dtype=torch.float64)
        row, offset = brightness(spec), 0.0
        if self.functional == "random":
            row, offset = random_functional(spec, knowledge.generator("imprint", "row"))
        if self.bins == "normal":
            return row, normal_cutoffs(quantiles) - offset
        return row, empirical_cutoffs(scalar_of(knowledge.surrogate, row), quantiles)

    def _calibrated(self, model: Imprint, cutoffs: Tensor, knowledge: Knowledge) -> float:
        """Work out the gain on examples that are not the clients' (``gain.py``)."""
        images, labels = self._probe(knowledge)
        device, dtype = knowledge.device, model.imprint.weight.dtype
        model.train(knowledge.batchnorm != "frozen").to(device)
        images, labels = images.to(device, dtype), labels.to(device)
        signal = gains.signal_gradient(model, images, labels)
        if knowledge.training.kind == "gradient":
            return gains.for_gradients(signal)
        sparse = self.variant == "sparse"
        return gains.for_weights(signal, images, cutoffs.diff(), knowledge.training, sparse=sparse)

    def _probe(self, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
        """Return surrogate examples, or noise with the public mean and spread in threat F."""
        generator = knowledge.generator("imprint", "probe")
        if self.bins == "surrogate":
            surrogate = knowledge.surrogate
            chosen = torch.randperm(len(surrogate), generator=generator)[:PROBE]
            return surrogate.batch(chosen)
        spec = knowledge.basics.data
        noise = torch.randn(PROBE, *spec.shape, generator=generator)
        mean = torch.tensor(spec.mean).view(-1, 1, 1)
        std = torch.tensor(spec.std).view(-1, 1, 1)
        labels = torch.randint(spec.num_classes, (PROBE,), generator=generator)
        return (mean + std * noise).clamp(0, 1), labels

    # -- what is read ----------------------------------------------------------------------------
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Read every occupied bin of every view; at most as many as there are examples, copied."""
        started = time.perf_counter()
        knowledge.require(Capability.UPDATES)
        shape = knowledge.basics.data.shape
        found, scores, sources, receipts = [], [], [], []
        for index, view in enumerate(views):
            images, strength, bins = read_imprint(view)
            most = knowledge.most_examples(view)
            most = None if most is None else most * self.copies
            best = strength.argsort(descending=True, stable=True)[:most]
            read = images[best].clamp(0, 1) if self.clip else images[best]
            found.append(read.view(-1, *shape).float())
            scores.append(strength[best].float())
            sources.append(torch.full((len(best),), index))
            receipts.append(f"read {len(images)} occupied bins of {bins} in view {view.label}")
        return Reconstruction(
            examples=torch.cat(found) if found else torch.empty(0, *shape),
            views=torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64),
            scores=torch.cat(scores) if scores else None,
            cost=Cost(seconds=time.perf_counter() - started),
            receipts=tuple(receipts),
        )


def imprint_rows(row: Tensor, cutoffs: Tensor, *, sparse: bool) -> tuple[Tensor, Tensor]:
    """Return weight ``[n, D]`` and bias ``[n]`` at gain 1, float64.

    Dense: ``W_i = v, b_i = -c_i``.  Sparse: both over ``w_i = c_{i+1} - c_i``, the width of unit
    i's own bin, so that ``0 < z_i < 1`` exactly inside it.
    """
    lower, width = cutoffs[:-1], cutoffs.diff()
    if not sparse:
        return row.expand(len(lower), -1), -lower
    return row / width.unsqueeze(1), -lower / width


def assembled(
    expression: str, arrays: dict[str, Tensor], rows: tuple[Tensor, Tensor], spec: DataSpec
) -> Imprint:
    """Return the module that clients will build, in the honest model's precision.

    ``rows`` are weight and bias at gain 1; the gain is the expression's.
    """
    model = build_model(expression, spec).to(next(iter(arrays.values())).dtype)
    assert isinstance(model, Imprint)
    own = {"imprint.weight": model.gain * rows[0], "imprint.bias": model.gain * rows[1]}
    if model.back is not None:
        share = 1 / (model.gain * len(rows[1]))
        own["back.weight"] = torch.full_like(model.back.weight, share)
        own["back.bias"] = torch.zeros_like(model.back.bias)
    load_arrays(model, own | {f"body.{name}": value for name, value in arrays.items()})
    return model


def read_imprint(view: ServerView) -> tuple[Tensor, Tensor, int]:
    """Read the bins of one view.

    Returns
    -------
    images : Tensor
        ``[k, D]`` float64, unclamped, one for each occupied bin.
    strength : Tensor
        ``[k]``: by how much the bin's bias moved.
    bins : int
        How many bins the view could show.

    Raises
    ------
    ValueError
        If these clients were not sent an imprint block.
    """
    sent = registry.parse(view.model, "view.model")[0]
    if sent.name != MODEL:
        raise ValueError(f"view {view.label} is of {sent.name!r}, which has no imprint to read")
    variant, update = sent.arguments["variant"], view.update()
    weight, bias = update["imprint.weight"], update["imprint.bias"]
    moved = bias.double()
    if cumulative := variant != "sparse":
        moved = torch.cat([moved[:-1] - moved[1:], moved[-1:]])
    if variant == "one-shot":
        moved = moved[:1]  # the row above is everybody brighter, not a bin
    # Never "!= 0": an empty bin's two sums may differ in the last digits.
    heard = moved.isfinite() & (moved.abs() > _rounding(view, bias, cumulative)[: len(moved)])
    occupied = heard.nonzero().flatten()
    rows = weight[occupied].double()
    if cumulative:
        above = torch.cat([weight, torch.zeros_like(weight[:1])])[occupied + 1]
        rows = rows - above.double()
    images = rows / moved[occupied].unsqueeze(1)
    whole = images.isfinite().all(dim=1)
    return images[whole], moved[occupied][whole].abs(), len(moved)


def _rounding(view: ServerView, bias: Tensor, cumulative: bool) -> Tensor:
    """Return how far rounding alone can move each bin's bias, ``[n]``."""
    carrier = view.sent["imprint.bias"].abs()
    if view.kind == "gradient":
        carrier = bias.abs().nan_to_num(0, 0, 0).max()
    elif cumulative:
        carrier = torch.maximum(carrier, carrier.roll(-1))
    return ROUNDING * torch.finfo(bias.dtype).eps * carrier.double().expand(len(bias))
