"""R-GAP: recover each layer's input from the last layer back to the image, by least squares.

Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.  For one
example, a network without biases and an activation that can be inverted, three things are known of
a convolution ``z = W x`` once what lies behind it is: its output z, ``k = dL/dz``, and the observed
``g = dL/dW``.  All are linear in x:

- weight constraints    ``W x = z``          one row for each output value,
- gradient constraints  ``K(k) x = g``       one row for each weight,
- padding               ``x = 0``            one row for each padded value.

The least-squares x is the layer before's activation: undone, it gives that layer's z, and W and the
activation's slope give its k.  Where the rows have less than full column rank an image comes back
with what is missing set to zero, and so the paper reads off an architecture what it leaks.

The start: the linear head's gradient is ``delta h^T``, rank one, which gives
``delta = dL/dlogits`` and h up to one scale.  The paper's network has a single logit and logistic
loss, and the scale comes from ``-u / (1 + e^u) = <w, g>``; below zero that has two roots, *twins*
of equal gradient.  Here clients train by cross-entropy over K logits:

- K = 2 is the paper's case, for ``u = (w_y - w_other) h``.  Both roots are the same image times two
  factors: the larger that still lies within ``[0, 1]`` is kept.  Nor does the head say which of
  the two labels it was: both are tried, and the better cosine kept.  The authors' code is given
  the label, and takes one for which there is a single root.
- K > 2 has no twins: ``softmax_c = delta_c`` for all c but y, so that ``log delta_c`` against the
  logits of the h of norm one is a line, whose slope is the norm of h.  The observed gradient's own
  size is then not needed: local rates and clipping cancel.

Decided here: padded values are left out of the unknowns instead of held at zero by rows, which is
the same; gradient rows are the same for every input channel and are compressed to at most as many
as there are pixels by an orthogonal factor, which leaves the least squares as they are; both kinds
of rows are scaled to norm one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, prod

import torch
from scipy.special import lambertw
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from fedsim.attack import Attack, Cost, Paper, Reconstruction, Setting, ToyCase
from fedsim.data import DataSpec
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView

#: Below this share of the largest a triangular factor's diagonal is taken to be zero.
SINGULAR = 1e-10
#: How far out of [0, 1] a pixel of the right twin may lie.
SLACK = 0.02
BINARY = 2


@register("attack", "r-gap")
@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """Solve for one layer's input after the other, in float64.

    Threat model B: it knows that an update is of one example, and leaves out views of more.  Cost:
    one least-squares problem a layer, 4,000 unknowns on CNN6 at 32 x 32, and one gradient for the
    score: the cosine of the candidate's gradient and the observed.

    It needs a network of convolutions without bias, LeakyReLU and one linear layer (``cnn6``), and
    one step.  Errors grow by each layer's condition number, so that noise, float32 and depth cost
    more than elsewhere; pooling, ReLU and biases are refused.
    """

    paper = Paper(
        title="R-GAP: Recursive Gradient Attack on Privacy",
        authors="Junyi Zhu, Matthew Blaschko",
        venue="ICLR",
        year=2021,
        published="CNN6, CIFAR-10, one image: pictures; a re-run in Geiping's breaching reports "
        "49.0 dB; CNN6-d visibly worse",
        measured="cnn6 untrained, CIFAR-10, one image, the first three: float32 94 to 110 dB, "
        "float64 140 to 143 dB, labels right, 27 to 64 s an image; cnn6(second=20), which is "
        "CNN6-d, 8.2 dB, rank 4052 of 4332 in layer 2 (FEDSIM_TEST_DATA=... python -m pytest -m "
        "slow -s tests/strategies/passive/test_r_gap.py).  Cross-entropy over ten logits, not "
        "logistic loss on one",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS})
    unit = "layers"
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "r-gap",
            "data.dataset": "digits",
            "model.name": "cnn6",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        # Seeds 1, 2, 3, 7 and 11 gave 88.0, 85.8, 83.6, 89.7 and 92.9.
        figure="leak.psnr.mean",
        low=70.0,
        high=120.0,  # float32
    )

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse other layers than can be inverted, and two classes without the gradient's size."""
        network = read_network(model)
        if kind == "weights" and model.get_parameter(f"{network.head}.weight").shape[0] == BINARY:
            raise ValueError(
                "with two classes r-gap reads the image's size off the gradient's own, which "
                "weights after local training do not tell; use federation.local = 'fedsgd(...)'"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse updates that are not of one example and one step."""
        together = setting.cohort if setting.channel.aggregates else 1
        examples = sum(setting.uploads[:together])
        epochs = setting.training.epochs if setting.training.kind == "weights" else 1
        if examples > 1 or epochs > 1:
            raise ValueError(
                f"r-gap inverts one step on one example, and an update is of {examples} examples "
                f"and {epochs} passes over them; use federation.local = 'fedsgd(batch_size=1)' and "
                "the channel 'plain', or an attack for batches (inverting-gradients)"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return ``[M, C, H, W]`` in ``[0, 1]``, float64, at most one candidate for each view."""
        shape = knowledge.basics.data.shape
        examples, indices, labels, scores, receipts = [], [], [], [], []
        for index, view in enumerate(views):
            if (count := knowledge.num_examples(view)) != 1:
                receipts.append(f"{view.label}: left out, it is of {count} examples")
                continue
            found = _invert(view, knowledge, index, len(views))
            if found is None:
                receipts.append(f"{view.label}: the head's gradient is not that of one example")
                continue
            examples.append(found.image.view(shape))
            indices.append(index)
            labels.append(found.label)
            scores.append(found.score)
            receipts.append(f"{view.label}: {found.verdict}")
        return Reconstruction(
            examples=torch.stack(examples).cpu() if examples else torch.empty(0, *shape),
            views=torch.tensor(indices, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float64),
            cost=Cost(gradient_evaluations=len(examples)),
            receipts=tuple(receipts),
        )


# -- the network ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Convolution:
    """A convolution without bias and the LeakyReLU behind it (slope 1: none).

    ``inputs`` is the shape ``[C, H, W]`` that it reads, without padding, ``outputs`` what it gives.
    """

    name: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    slope: float
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """Convolutions in the order of the forward pass, and the name of the linear head."""

    convolutions: tuple[Convolution, ...]
    head: str


def read_network(model: nn.Module) -> Network:
    """Return the layers of a plain sequence.

    Raises
    ------
    ValueError
        If it is none, or has a layer that cannot be inverted.
    """
    spec: DataSpec = model.spec  # type: ignore[assignment]
    layers = _sequence(model, "")
    convolutions: list[Convolution] = []
    while layers and isinstance(conv := layers[0][1], nn.Conv2d):
        name, _ = layers.pop(0)
        slope = 1.0
        if layers and isinstance(activation := layers[0][1], nn.LeakyReLU):
            slope = activation.negative_slope
            layers.pop(0)
        shape = convolutions[-1].outputs if convolutions else spec.shape
        convolutions.append(_convolution(name, conv, slope, shape))
    kinds = [type(layer) for _, layer in layers]
    ends = [name for _, layer in layers for name, _ in layer.named_parameters()]
    if not convolutions or kinds != [nn.Flatten, nn.Linear] or ends != ["weight"]:
        rest = ", ".join(kind.__name__ for kind in kinds)
        raise _refusal(f"behind {len(convolutions)} such convolutions there is: {rest}")
    return Network(tuple(convolutions), layers[1][0])


def _convolution(
    name: str, conv: nn.Conv2d, slope: float, shape: tuple[int, int, int]
) -> Convolution:
    plain = conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
    down, across = conv.padding if isinstance(conv.padding, tuple) else (-1, -1)
    if not plain or conv.padding_mode != "zeros" or down < 0 or slope <= 0:
        raise _refusal(f"{name!r} has a bias, groups, another padding or a flat activation")
    outputs = (
        conv.out_channels,
        (shape[1] + 2 * down - conv.kernel_size[0]) // conv.stride[0] + 1,
        (shape[2] + 2 * across - conv.kernel_size[1]) // conv.stride[1] + 1,
    )
    stride = (conv.stride[0], conv.stride[1])
    return Convolution(name, stride, (down, across), slope, shape, outputs)


def _refusal(what: str) -> ValueError:
    return ValueError(
        "r-gap goes back through a sequence of convolutions without bias, with LeakyReLU, and one "
        f"linear layer without bias; {what}; use the model cnn6"
    )


def _sequence(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return names and layers of nested ``nn.Sequential``, in the order of the forward pass."""
    if not isinstance(module, nn.Sequential):
        return [(name, module)]
    inner = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    return [found for key, child in inner for found in _sequence(child, key)]


# -- the start: what the head's gradient says ----------------------------------------------------
@dataclass(frozen=True)
class Start:
    """The head's input h ``[d]`` and ``delta = dL/dlogits`` ``[K]`` of one example.

    ``scale`` times the observed update is the gradient that they belong to.
    """

    label: int
    features: Tensor
    delta: Tensor
    scale: float


def starts(weight: Tensor, gradient: Tensor) -> list[list[Start]]:
    """Return the starts that agree with the head's weight and gradient, ``[K, d]``, float64.

    A list of twins, the smaller features first, for each label that is possible: one for K > 2,
    both for K = 2, whose deltas are each other's negative; none where no example can have had this
    gradient.
    """
    left, size, right = torch.linalg.svd(gradient, full_matrices=False)
    classes = len(weight)
    if size[0] <= 0:
        return []
    # |p_y - 1| is the sum of all other p.
    labels = range(BINARY) if classes == BINARY else [int(left[:, 0].abs().argmax())]
    found = []
    for label in labels:
        sign = -left[label, 0].sign()
        a, b = sign * left[:, 0], sign * right[0]
        logits = weight @ b  # of the features of norm one
        others = torch.arange(classes, device=a.device) != label
        if bool((a[others] <= 0).any()):
            continue
        if classes == BINARY:
            gap = float(logits[label] - logits[1 - label])
            norms = [u / gap for u in binary_roots(float((weight * gradient).sum()))]
        else:
            norms = [_slope(logits[others], a[others])]
        norms = sorted(norm for norm in norms if 0 < norm < float("inf"))
        found.append([_start(label, norm * b, norm * logits, size[0]) for norm in norms])
    return [twins for twins in found if twins]


def _start(label: int, features: Tensor, logits: Tensor, size: Tensor) -> Start:
    delta = logits.softmax(dim=0)
    delta[label] -= 1.0
    return Start(label, features, delta, float(delta.norm() * features.norm() / size))


def binary_roots(product: float) -> list[float]:
    """Return the u with ``-u / (1 + e^u) = product``: one, two, or none.

    With ``q = u + product`` it reads ``-q e^-q = product e^-product``: Lambert's W.
    """
    argument = product * exp(-product)
    branches = (0, -1) if product < 0 else (0,)
    roots = [complex(-lambertw(argument, branch)) - product for branch in branches]
    return [root.real for root in roots if abs(root.imag) < 1e-12]


def _slope(logits: Tensor, delta: Tensor) -> float:
    """Return the slope of ``log delta`` against the logits, large deltas weighing more."""
    share = delta.square() / delta.square().sum()
    x = logits - (share * logits).sum()
    return float((share * x * delta.log()).sum() / (share * x.square()).sum())


# -- one layer -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Solved:
    """A layer's input ``[C, H, W]``, and the rank of its equations with the padding's."""

    inputs: Tensor
    rank: int
    unknowns: int


def weight_rows(layer: Convolution, weight: Tensor) -> Tensor:
    """Return W ``[outputs, C H W]``: the convolution as a matrix on its unpadded input."""
    basis = torch.eye(prod(layer.inputs), dtype=weight.dtype, device=weight.device)
    images = basis.view(-1, *layer.inputs)
    outputs = functional.conv2d(images, weight, stride=layer.stride, padding=layer.padding)
    return outputs.flatten(1).T


def gradient_rows(layer: Convolution, weight: Tensor, k: Tensor) -> Tensor:
    """Return A ``[O kh kw, H W]`` with ``dL/dW[o, c, i, j] = A[(o, i, j)] x_c``, for any c.

    ``k`` is ``dL/dz`` ``[O, H', W']``.
    """
    _, height, width = layer.inputs
    basis = torch.eye(height * width, dtype=k.dtype, device=k.device).view(-1, 1, height, width)
    window = tuple(weight.shape[2:])
    patches = functional.unfold(basis, window, padding=layer.padding, stride=layer.stride)
    return torch.einsum("op,nwp->own", k.flatten(1), patches).flatten(0, 1)


def solve_layer(
    layer: Convolution, weight: Tensor, gradient: Tensor, z: Tensor, k: Tensor
) -> Solved:
    """Return the least-squares input; ``weight`` and ``gradient`` are ``[O, C, kh, kw]``."""
    channels, height, width = layer.inputs
    rows, wanted = _unit(weight_rows(layer, weight), z.reshape(-1, 1))
    observed = gradient.permute(0, 2, 3, 1).reshape(-1, channels)  # [O kh kw, C]
    shared, observed = _compressed(*_unit(gradient_rows(layer, weight, k), observed))
    each = torch.block_diag(*[shared] * channels)  # type: ignore[no-untyped-call]
    matrix = torch.cat([each, rows])
    values = torch.cat([observed.T.reshape(-1, 1), wanted])
    triangle, values = _compressed(matrix, values)
    padded = (height + 2 * layer.padding[0]) * (width + 2 * layer.padding[1])
    unknowns = channels * padded
    diagonal = triangle.diagonal().abs()
    if len(triangle) == triangle.shape[1] and diagonal.min() > SINGULAR * diagonal.max():
        found = torch.linalg.solve_triangular(triangle, values, upper=True)
        return Solved(found.view(layer.inputs), unknowns, unknowns)
    # LAPACK's driver for lost rank is the CPU's; of all solutions it gives the smallest.
    least = torch.linalg.lstsq(triangle.cpu(), values.cpu(), rcond=SINGULAR, driver="gelsd")
    lost = triangle.shape[1] - int(least.rank)
    return Solved(least.solution.to(z).view(layer.inputs), unknowns - lost, unknowns)


def _unit(matrix: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each equation of ``matrix x = values`` to a row of norm one."""
    size = matrix.norm(dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    return matrix / size, values / size


def _compressed(matrix: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and ``Q^T values`` of ``matrix = Q R``: the same least squares in fewer rows."""
    if len(matrix) <= matrix.shape[1]:
        return matrix, values
    _, factor = torch.linalg.qr(torch.cat([matrix, values], dim=1), mode="r")
    columns = matrix.shape[1]
    return factor[:columns, :columns], factor[:columns, columns:]


# -- the recursion -------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Found:
    image: Tensor
    label: int
    score: float
    verdict: str


def _invert(view: ServerView, knowledge: Knowledge, index: int, total: int) -> _Found | None:
    """Return the candidate of one view, or None where its head's gradient is of no example."""
    model = knowledge.model(view).double()
    network = read_network(model)
    weight = {name: value.detach() for name, value in model.named_parameters()}
    update = {name: t.to(knowledge.device, torch.float64) for name, t in view.update().items()}
    head = f"{network.head}.weight"
    if not all(name in update and update[name].isfinite().all() for name in weight):
        return None
    depth = len(network.convolutions)
    found: list[_Found] = []
    for twins in starts(weight[head], update[head]):
        layers: list[Solved] = []
        for layer in recursion(network, weight, update, twins[0]):
            layers.append(layer)
            knowledge.progress(index * depth + len(layers), total * depth, "")
        sizes = [float(twin.features.norm() / twins[0].features.norm()) for twin in twins]
        image = plausible([size * layers[-1].inputs for size in sizes]).clamp(0, 1)
        score = _cosine(model, image, twins[0].label, update)
        found.append(_Found(image, twins[0].label, score, _verdict(network, layers, len(twins))))
    return max(found, key=lambda one: one.score, default=None)


def recursion(
    network: Network, weight: dict[str, Tensor], update: dict[str, Tensor], start: Start
) -> Iterator[Solved]:
    """Yield each convolution's input, the last one's first (Algorithm 1)."""
    features, k = start.features, start.delta @ weight[f"{network.head}.weight"]
    for layer in reversed(network.convolutions):
        w = weight[f"{layer.name}.weight"]
        features, k = features.view(layer.outputs), k.view(layer.outputs)
        slope = torch.where(features > 0, 1.0, layer.slope)
        z, k = features / slope, k * slope
        solved = solve_layer(layer, w, start.scale * update[f"{layer.name}.weight"], z, k)
        yield solved
        features = solved.inputs
        k = conv2d_input(  # type: ignore[no-untyped-call]
            (1, *layer.inputs), w, k.unsqueeze(0), layer.stride, layer.padding
        )


def plausible(twins: Sequence[Tensor]) -> Tensor:
    """Return the last (largest) image all within ``[0, 1]``, or the first if none is."""
    within = [t for t in twins if t.min() >= -SLACK and t.max() <= 1 + SLACK]
    return within[-1] if within else twins[0]


def _cosine(model: nn.Module, image: Tensor, label: int, update: dict[str, Tensor]) -> float:
    """Return the cosine of the gradient that a candidate has and the observed one."""
    logits = model(image.unsqueeze(0))
    loss = functional.cross_entropy(logits, torch.tensor([label], device=logits.device))
    parameters = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss, list(parameters.values()))
    own = torch.cat([g.flatten() for g in gradient])
    observed = torch.cat([update[name].flatten() for name in parameters])
    return float(functional.cosine_similarity(own, observed, dim=0))


def _verdict(network: Network, layers: Sequence[Solved], twins: int) -> str:
    """Say which layers' equations were too few, and whether there was a twin."""
    short = [
        f"{layer.name} has rank {solved.rank} of {solved.unknowns}"
        for layer, solved in zip(reversed(network.convolutions), layers, strict=True)
        if solved.rank < solved.unknowns
    ]
    ranks = "; ".join(short) or f"all {len(layers)} layers have full rank"
    return ranks + ("; of two twins the one that fills [0, 1]" if twins > 1 else "")
