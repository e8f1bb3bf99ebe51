"""Scale-MIA: linear layers isolate latent codes, and a decoder turns them into images.

Shi, Wang, Xiao, Zhang, Shi, Hou, Lou, "Scale-MIA: A Scalable Model Inversion Attack against
Secure Federated Learning via Latent Space Reconstruction", NDSS 2025.

The server trains an auto-encoder on surrogate data; its encoder is the network's convolutions, its
decoder stays at home.  The latent code of image j is ``l_j`` (``[D]``, never negative), its
brightness ``h_j`` the mean of the code.  The first linear layer gets k equal rows and k cut-offs
at quantiles of the brightness, the second constant weights:

    z_i = <1/D, l> - c_i,   a = ReLU(z),   hidden_m = mean_i a_i + 1/m

so that every active unit of an image gets the same derivative ``g_j``, and with the rows' gradients
``G`` and those of the biases ``gb``

    G_i - G_{i+1} = sum of g_j l_j,   gb_i - gb_{i+1} = sum of g_j   over c_i < h_j <= c_{i+1}

``l`` is their ratio where a bin holds one image (Robbing the Fed's read-out, in latent space), and
the decoder shows it.  Every one of the k bins is read, the last as ``G_k / gb_k``; which of them
hold anything is told by the bias alone.  (The authors' code looks it up in the private images'
own activations.)

*The decoder* is not sent, and this attack remembers nothing: it is fitted on the surrogate data to
the encoder that the saved view says was sent, every time anew and the same from the same seed, so
that views can be read later and elsewhere.  Rounds after the first send what the first one sent.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from fedsim.attack import Cost, Manipulation, ModelToSend, Paper, Reconstruction, ToyCase
from fedsim.data import Split
from fedsim.models import build_model, load_arrays, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation import auto_encoder
from strategies.attacks.analytic.isolation import gain as gains
from strategies.attacks.analytic.isolation.bins import empirical_cutoffs, normal_cutoffs
from strategies.attacks.analytic.isolation.layers import layers_of

# The outermost cut-offs, as quantiles of the fitted normal distribution; the authors' own.
OUTERMOST = 0.001
PROBE = 64
# A bin counts as occupied when its bias moved by more than so many rounding errors of what
# carries it.
ROUNDING = 8.0


@register("attack", "scale-mia")
@dataclass(frozen=True, kw_only=True)
class ScaleMIA(Manipulation):
    """Read latent codes that are alone in their bin, and decode them.

    Threat model G: surrogate data train the auto-encoder and set the bins.  Parameters only, none
    added; works behind secure aggregation, with M the images of the whole sum.  Expect
    ``(1 - 1/k)^(M-1)`` of them, k the width of the first linear layer, as well as the auto-encoder
    shows images it never saw.  Costs two trainings on the surrogate data.

    Parameters
    ----------
    epochs : int
        Of the auto-encoder, and again of the decoder.
    bins : {"empirical", "normal"}
        Cut-offs at the quantiles of the surrogate codes' brightness itself, or of the normal
        distribution fitted to it, from 0.001 to 0.999, as the authors do.
    gain : float or None
        Factor on the first linear layer (its inverse on the second).  None: worked out on surrogate
        data, so that the update survives Flower's SecAgg+ (``gain.py``).

    Fails on surrogate data of another domain, with BatchNorm in the encoder, under noise, and where
    clients take several steps that move the encoder (several mini-batches, many epochs).
    """

    paper: ClassVar[Paper] = Paper(
        title="Scale-MIA: A Scalable Model Inversion Attack against Secure Federated Learning via "
        "Latent Space Reconstruction",
        authors="Shi, Wang, Xiao, Zhang, Shi, Hou, Lou",
        venue="NDSS",
        year=2025,
        published="share of images at 18 dB and their mean PSNR, CIFAR-10, 1024 bins, 64 / 128 / "
        "256 / 512 images (authors' saved batches): 0.875 / 0.891 / 0.785 / 0.688 at 28.5 / 28.7 / "
        "28.2 / 27.0 dB; which bins to read is taken from the private images, and failures are "
        "left out of the mean",
        measured="CIFAR-10, 8 clients behind SecAgg+, share of all images alone in their bin "
        "and at 18 dB: 0.947 / 0.914 / 0.764 / 0.616, of law x decoder 0.936 / 0.879 / 0.776 / "
        "0.605; at 18 dB at all 0.967 / 0.939 / 0.846 / 0.727 at 24.7 / 24.8 / 24.5 / 24.3 dB "
        "(pytest -s -m slow tests/strategies/isolation/test_scale_mia.py -k auto_encoders; no "
        "oracle, 5,000 surrogate images, 12 epochs of training instead of 350)",
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
            "attack": "scale-mia(epochs=20)",
            "data.dataset": "photo-tiles",
            "model.name": "cnn(hidden=[256, 64])",
            "federation.clients": 4,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
            "audit.criterion": "psnr>=18",
        },
        # (1 - 1/256)^7 = 0.97 alone in their bin, of which the decoder shows nine in ten; seeds
        # 0 to 2 and 7 gave 0.81 to 0.91.
        figure="leak.leak_rate",
        low=0.65,
        high=0.98,
    )
    unit: ClassVar[str] = "epochs"

    epochs: Annotated[int, Field(ge=1)] = 30
    bins: Literal["empirical", "normal"] = "empirical"
    gain: Annotated[float, Field(gt=0)] | None = None

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model without an encoder to mirror, or without three linear layers behind it."""
        parted(model)

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Train the auto-encoder, cut the bins and overwrite every layer, in the first round."""
        if knowledge.history:
            first = knowledge.history[0]
            # A saved view has its arrays in another order, and SecAgg+ goes by the order.
            return ModelToSend(expression, {name: first.sent[name] for name in arrays})
        spec, split, device = knowledge.basics.data, knowledge.surrogate, knowledge.device
        model = build_model(expression, spec)
        load_arrays(model, arrays)
        parts = parted(model)
        generator = knowledge.generator("scale-mia", "auto-encoder")
        decoder = auto_encoder.mirrored(parts.encoder, spec.shape, generator)
        model.to(device)
        auto_encoder.train(
            parts.encoder,
            decoder.to(device),
            split,
            epochs=self.epochs,
            generator=generator,
            device=device,
            tell=knowledge.progress,
        )
        codes = auto_encoder.encoded(parts.encoder, split, device).flatten(1)
        cutoffs = self.cutoffs(codes.double().mean(dim=1), parts.first.out_features)
        overwrite(parts, cutoffs, knowledge.generator("scale-mia", "last layer"))
        scale(parts, self.gain or self._calibrated(parts, split, knowledge))
        model.to("cpu", next(iter(arrays.values())).dtype)
        return ModelToSend(expression, travelling(model))

    def cutoffs(self, brightness: Tensor, count: int) -> Tensor:
        """Return ``[count]`` cut-offs for a sample of brightness ``[N]``, float64."""
        if self.bins == "empirical":
            quantiles = torch.linspace(0, 1, count + 1, dtype=torch.float64)
            return empirical_cutoffs(brightness, quantiles)[:-1]
        quantiles = torch.linspace(OUTERMOST, 1 - OUTERMOST, count, dtype=torch.float64)
        return brightness.mean() + brightness.std() * normal_cutoffs(quantiles)

    def _calibrated(self, parts: "Parts", split: Split, knowledge: Knowledge) -> float:
        """Work out the gain on surrogate examples (``gain.py``); one local step is FedSGD's."""
        generator = knowledge.generator("scale-mia", "probe")
        chosen = torch.randperm(len(split), generator=generator)[:PROBE]
        images, labels = (part.to(knowledge.device) for part in split.batch(chosen))
        rate = knowledge.training.lr if knowledge.training.kind == "weights" else 1.0
        return gains.for_gradients(rate * signal_gradient(parts, images, labels))

    # -- what is read ----------------------------------------------------------------------------
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Read every occupied bin of every view, and decode; at most as many as are examples."""
        started = time.perf_counter()
        shape = knowledge.basics.data.shape
        decoders: dict[bytes, nn.Module] = {}
        found, scores, sources, receipts = [], [], [], []
        for index, view in enumerate(views):
            parts = parted(knowledge.model(view))
            sent = b"".join(p.detach().cpu().numpy().tobytes() for p in parts.encoder.parameters())
            if sent not in decoders:
                decoders[sent] = fitted_decoder(parts.encoder, knowledge, self.epochs)
            codes, strength = read_codes(view, parts)
            best = strength.argsort(descending=True, stable=True)[: knowledge.most_examples(view)]
            maps = auto_encoder.maps_of(parts.encoder, shape)
            kept = codes[best].clamp_min(0).float().view(-1, *maps)
            found.append(auto_encoder.decoded(decoders[sent], kept, knowledge.device))
            scores.append(strength[best].float())
            sources.append(torch.full((len(best),), index))
            receipts.append(
                f"read {len(codes)} occupied bins of {parts.first.out_features} "
                f"in view {view.label}"
            )
        return Reconstruction(
            examples=torch.cat(found) if found else torch.empty(0, *shape),
            views=torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64),
            scores=torch.cat(scores) if scores else None,
            cost=Cost(seconds=time.perf_counter() - started),
            receipts=tuple(receipts),
        )


def fitted_decoder(encoder: nn.Sequential, knowledge: Knowledge, epochs: int) -> nn.Module:
    """Fit a decoder on surrogate data to an encoder as it was sent, which stays as it is."""
    shape, device = knowledge.basics.data.shape, knowledge.device
    frozen = encoder.float().requires_grad_(False)
    generator = knowledge.generator("scale-mia", "decoder")
    decoder = auto_encoder.mirrored(frozen.cpu(), shape, generator).to(device)
    auto_encoder.train(
        frozen.to(device),
        decoder,
        knowledge.surrogate,
        epochs=epochs,
        generator=generator,
        device=device,
        tell=knowledge.progress,
    )
    return decoder


@dataclass(frozen=True)
class Parts:
    """A network as the attack sees it; all modules are the network's own."""

    encoder: nn.Sequential
    name: str  # of the first linear layer
    first: nn.Linear
    second: nn.Linear
    third: nn.Linear


def parted(model: nn.Module) -> Parts:
    """Take a network apart.

    Raises
    ------
    ValueError
        If it is anything but convolutions with ReLU, and three linear layers with ReLU between.
    """
    layers = layers_of(model)
    linear = {name: one for name, one in layers.items() if isinstance(one, nn.Linear)}
    behind = [type(one) for one in list(layers.values())[-5:]]
    if len(linear) != 3 or behind != [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]:
        raise ValueError("the network must end in three linear layers with ReLU between; use cnn")
    if any(one.bias is None for one in linear.values()):
        raise ValueError("the linear layers must have biases; use cnn")
    encoder = auto_encoder.encoder_of(list(layers.values())[:-5])
    first, second, third = linear.values()
    return Parts(encoder, next(iter(linear)), first, second, third)


def overwrite(parts: Parts, cutoffs: Tensor, generator: torch.Generator) -> None:
    """Write the linear layers, at gain 1; the last one random, because equal rows would cancel."""
    with torch.no_grad():
        parts.first.weight.fill_(1 / parts.first.in_features)
        parts.first.bias.copy_(-cutoffs)
        parts.second.weight.fill_(1 / parts.second.in_features)
        parts.second.bias.fill_(1 / parts.second.out_features)
        for parameter in parts.third.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))


def scale(parts: Parts, gain: float) -> None:
    """Put the gain on the first linear layer, and its inverse on the second."""
    with torch.no_grad():
        parts.first.weight.mul_(gain)
        parts.first.bias.mul_(gain)
        parts.second.weight.div_(gain)


def signal_gradient(parts: Parts, images: Tensor, labels: Tensor) -> float:
    """Return ``mean_j |g_j|`` at gain 1: by how much one unit's signal moves an example's loss."""
    with torch.no_grad():
        signal = relu(parts.first(parts.encoder(images).flatten(1)))
    signal.requires_grad_()
    logits = parts.third(relu(parts.second(signal)))
    (moved,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), signal)
    return max(float(moved[:, 0].abs().mean()), 1e-12)


def read_codes(view: ServerView, parts: Parts) -> tuple[Tensor, Tensor]:
    """Read the bins of one view.

    Returns
    -------
    codes : Tensor
        ``[m, D]`` float64, one for each occupied bin.
    strength : Tensor
        ``[m]``: by how much the bin's bias moved.

    Raises
    ------
    ValueError
        If these clients were sent other parameters.
    """
    if not torch.equal(
        parts.first.weight, parts.first.weight[:1, :1].expand_as(parts.first.weight)
    ):
        raise ValueError(f"view {view.label} is of a model without bins to read")
    update = view.update()
    weight = update[f"{parts.name}.weight"].double()
    bias = update[f"{parts.name}.bias"]
    moved = _above(bias.double())
    carrier = bias.abs().max()
    if view.kind == "weights":
        carrier = torch.maximum(carrier, view.sent[f"{parts.name}.bias"].abs().max())
    # Never "!= 0": an empty bin's two sums may differ in the last digits.
    floor = ROUNDING * torch.finfo(bias.dtype).eps * float(carrier)
    occupied = (moved.abs() > floor).nonzero().flatten()
    codes = _above(weight)[occupied] / moved[occupied].unsqueeze(1)
    return codes, moved[occupied].abs()


def _above(rows: Tensor) -> Tensor:
    """Return each row less the one above it; above the last is nothing."""
    return rows - torch.cat([rows[1:], torch.zeros_like(rows[:1])])
