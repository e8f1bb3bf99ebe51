"""R-GAP: exact for one example, the rank of its equations, and what its head leaves open."""

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import cross_entropy

from fedsim.data import DataSpec
from fedsim.errors import ScenarioError
from fedsim.models import build_model, initial_model
from fedsim.parts import Parts, check
from fedsim.scenario import Scenario
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.r_gap import (
    RGAP,
    binary_roots,
    gradient_rows,
    plausible,
    read_network,
    recursion,
    solve_layer,
    starts,
    weight_rows,
)
from tests.strategies.passive.honest import Honest, batch, cifar10, psnr, spec, tiles

ATTACK = RGAP()
# Of CNN6 at 32 x 32: unknowns with the padding, rows of gradient, weight and padding constraints.
TABLE = [
    (3888, 576, 3468, 816),
    (4332, 3888, 2916, 864),
    (4356, 11664, 2916, 1440),
    (4356, 11664, 2916, 1440),
    (4356, 20736, 1600, 1440),
    (3136, 73728, 3200, 1536),
]


def small(classes: int = 10, side: int = 8) -> DataSpec:
    return DataSpec((3, side, side), classes, (0.5,) * 3, (0.25,) * 3)


def one(seed: int, data: DataSpec, dtype=torch.float64):
    images, labels = batch(tiles(), 1, seed, dtype)
    return functional.adaptive_avg_pool2d(images, data.shape[1]), labels % data.num_classes


def pieces(expression: str, data: DataSpec, seed: int):
    """Return network, weights, gradient and the true input and k of each convolution."""
    model = initial_model(expression, data, seed).double()
    network = read_network(model)
    inputs, outputs = [], []
    for layer in network.convolutions:
        module = model.get_submodule(layer.name)
        module.register_forward_hook(lambda _, x, z: inputs.append(x[0]) or outputs.append(z))
    images, labels = one(seed, data)
    loss = cross_entropy(model(images), labels)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [*parameters.values(), *outputs])
    gradient = dict(zip(parameters, found, strict=False))
    weight = {name: value.detach() for name, value in parameters.items()}
    inputs, outputs = ([t.detach()[0] for t in each] for each in (inputs, outputs))
    ks = [k[0] for k in found[len(parameters) :]]
    return network, weight, gradient, inputs, outputs, ks


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_one_example_comes_back_exactly_with_its_label(classes):
    data = small(classes)
    for seed in range(4):
        client = Honest("cnn6", data, seed=seed, dtype=torch.float64)
        images, labels = one(seed, data)
        found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge())
        assert psnr(images, found.examples).min() > 120
        assert found.labels.tolist() == labels.tolist()
        assert found.scores.item() > 1 - 1e-9


def test_single_precision_costs_digits():
    client = Honest("cnn6", small())
    images, labels = one(0, small(), torch.float32)
    found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge())
    assert 50 < psnr(images, found.examples).item() < 140


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_clipping_and_local_rates_cancel_with_more_than_two_classes(factor):
    client = Honest("cnn6", small(), dtype=torch.float64)
    images, labels = one(1, small())
    view = client.gradient(images, labels)
    upload = {name: factor * g for name, g in view.received.items()}
    view = ServerView(1, view.senders, view.model, view.sent, upload, "gradient")
    assert psnr(images, ATTACK.reconstruct([view], client.knowledge()).examples) > 120
    weights = client.weights(images, labels, lr=0.1)
    assert psnr(images, ATTACK.reconstruct([weights], client.knowledge()).examples) > 80


def test_clipping_costs_nothing_and_noise_of_a_millionth_all():
    reached = {"clipped": [], "noisy": []}
    for seed in range(4):
        client = Honest("cnn6", small(), seed=seed)
        images, labels = one(seed, small(), torch.float32)
        view = client.gradient(images, labels)
        generator = torch.Generator().manual_seed(seed)
        uploads = {
            "clipped": {name: 0.01 * g for name, g in view.received.items()},
            "noisy": {
                name: g + 1e-6 * torch.randn(g.shape, generator=generator)
                for name, g in view.received.items()
            },
        }
        for what, upload in uploads.items():
            other = ServerView(1, view.senders, view.model, view.sent, upload, "gradient")
            found = ATTACK.reconstruct([other], client.knowledge())
            reached[what].append(psnr(images, found.examples).item())
    print({what: [round(value, 1) for value in values] for what, values in reached.items()})
    assert min(reached["clipped"]) > 60
    assert max(reached["noisy"]) < 30


def test_every_constraint_holds_for_the_true_input():
    network, weight, gradient, inputs, outputs, ks = pieces("cnn6", small(), 0)
    for layer, x, z, k in zip(network.convolutions, inputs, outputs, ks, strict=True):
        w, g = weight[f"{layer.name}.weight"], gradient[f"{layer.name}.weight"]
        assert torch.allclose(weight_rows(layer, w) @ x.flatten(), z.flatten(), atol=1e-12)
        rows = gradient_rows(layer, w, k)
        observed = g.permute(0, 2, 3, 1).reshape(-1, len(x))
        assert torch.allclose(rows @ x.flatten(1).T, observed, atol=1e-12)
        solved = solve_layer(layer, w, g, z, k)
        assert solved.rank == solved.unknowns
        assert (solved.inputs - x).abs().max() < 1e-9


@pytest.mark.ladder(8)
def test_the_table_of_unknowns_and_rows():
    """The card's counts; padding that holds values at zero leaves the same rank to be found."""
    model = build_model("cnn6", small(side=32))
    for layer, counts in zip(read_network(model).convolutions, TABLE, strict=True):
        channels, height, width = layer.inputs
        (down, across), weight = layer.padding, model.get_parameter(f"{layer.name}.weight")
        unknowns = channels * (height + 2 * down) * (width + 2 * across)
        outputs = torch.Size(layer.outputs).numel()
        padded = unknowns - channels * height * width
        assert (unknowns, weight.numel(), outputs, padded) == counts


def rank(network, weight, ks, index: int) -> int:
    """The rank with the padding's rows, by the null space of the gradient rows of one channel."""
    layer = network.convolutions[index]
    channels, height, width = layer.inputs
    w = weight[f"{layer.name}.weight"]
    rows = gradient_rows(layer, w, ks[index])
    _, size, directions = torch.linalg.svd(rows, full_matrices=True)
    determined = int((size > 1e-10 * size[0]).sum())
    null = directions[determined:].T  # [H W, n]
    left = weight_rows(layer, w).view(-1, channels, height * width) @ null
    size = torch.linalg.svdvals(left.flatten(1)) if left.numel() else torch.zeros(1)
    free = int((size > 1e-10 * size[0]).sum())
    return channels * determined + free + TABLE[index][3]


@pytest.mark.ladder(8)
@pytest.mark.parametrize("index", [1, 2, 3, 4, 5])
def test_the_table_of_ranks(index):
    network, weight, _, _, _, ks = pieces("cnn6", small(side=32), 0)
    assert rank(network, weight, ks, index) == TABLE[index][0]


def test_the_first_layer_is_determined():
    """By the Gram matrix of all rows: positive, and far from singular."""
    network, weight, _, _, _, ks = pieces("cnn6", small(side=32), 0)
    layer = network.convolutions[0]
    w = weight[f"{layer.name}.weight"]
    rows, shared = weight_rows(layer, w), gradient_rows(layer, w, ks[0])
    shared = shared / shared.norm(dim=1, keepdim=True)
    gram = rows.T @ rows + torch.block_diag(*[shared.T @ shared] * 3)
    assert torch.linalg.cholesky(gram).diagonal().min() > 1e-3
    assert len(gram) + TABLE[0][3] == TABLE[0][0]


def test_cnn6_d_has_rows_enough_and_yet_280_unknowns_too_many():
    network, weight, _, _, _, ks = pieces("cnn6(second=20)", small(side=32), 0)
    layer = network.convolutions[1]
    w = weight[f"{layer.name}.weight"]
    assert w.numel() + 20 * 9 * 9 + 864 == 4644 > 4332
    assert rank(network, weight, ks, 1) == 4052


def test_what_the_equations_do_not_determine_is_told():
    """Four channels are too few for what the second layer reads, at any size."""
    client = Honest("cnn6(second=4)", small(side=16), dtype=torch.float64)
    images, labels = one(0, small(side=16))
    found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge())
    assert "encoder.2 has rank" in found.receipts[0]
    assert psnr(images, found.examples).item() < 40


def test_both_roots_of_the_paper_s_equation():
    for u in (-5.0, -0.3, 0.2, 1.0, 1.5, 6.0):
        product = -u / (1 + torch.tensor(u).double().exp().item())
        roots = binary_roots(product)
        assert min(abs(root - u) for root in roots) < 1e-8
        assert len(roots) == (1 if u < 0 else 2)
    assert binary_roots(-0.3) == []  # below the minimum, -0.2785: of no example


def test_the_wrong_root_is_the_image_too_large_and_the_wrong_label_garbage():
    data = small(classes=2)
    for seed in range(8):
        network, weight, gradient, inputs, _, _ = pieces("cnn6", data, seed)
        found = {
            twins[0].label: twins
            for twins in starts(weight["head.weight"], gradient["head.weight"])
        }
        label = int(one(seed, data)[1])
        images = [list(recursion(network, weight, gradient, t))[-1].inputs for t in found[label]]
        assert (images[0] - inputs[0]).abs().max() < 1e-6
        wrong = list(recursion(network, weight, gradient, found[1 - label][0]))[-1].inputs
        assert (wrong - inputs[0]).abs().max() > 0.1
        if len(images) == 2:
            factor = float(images[1].norm() / images[0].norm())
            assert factor > 2
            assert torch.allclose(images[1], factor * images[0], rtol=1e-6, atol=1e-6 * factor)
            assert plausible(images) is images[0]


def test_more_than_one_example_is_left_out():
    client = Honest("cnn6", small())
    images, labels = batch(tiles(), 2, 0)
    images = functional.adaptive_avg_pool2d(images, 8)
    found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge(examples=2))
    assert len(found.examples) == 0
    assert "of 2 examples" in found.receipts[0]


def test_no_gradient_gives_no_candidate_and_says_so():
    client = Honest("cnn6", small())
    view = client.gradient(*one(0, small(), torch.float32))
    for factor in (0.0, float("nan")):
        upload = {name: factor * g for name, g in view.received.items()}
        empty = ServerView(1, view.senders, view.model, view.sent, upload, "gradient")
        found = ATTACK.reconstruct([empty], client.knowledge())
        assert len(found.examples) == 0
        assert "not that of one example" in found.receipts[0]


@pytest.mark.parametrize("expression", ["lenet", "convnet", "cnn", "mlp", "resnet20"])
def test_other_networks_are_refused(expression):
    with pytest.raises(ValueError, match="use the model cnn6"):
        ATTACK.check(build_model(expression, spec()), "gradient")


def test_two_classes_without_the_gradient_s_size_are_refused():
    ATTACK.check(build_model("cnn6", small(classes=3)), "weights")
    with pytest.raises(ValueError, match="with two classes"):
        ATTACK.check(build_model("cnn6", small(classes=2)), "weights")


@pytest.mark.parametrize(
    "change",
    [
        {"federation.local": "fedsgd(batch_size=2, lr=0.1)"},
        {"federation.local": "fedavg(epochs=2, batch_size=1, lr=0.1)"},
        {"channel": "trusted-sum"},
    ],
)
def test_batches_epochs_and_sums_are_refused_before_training(change):
    small_federation = {
        "attack": "r-gap",
        "data.dataset": "digits",
        "model.name": "cnn6",
        "federation.local": "fedsgd(batch_size=1, lr=0.1)",
    }
    check(Parts(Scenario.from_flat(small_federation)))
    with pytest.raises(ScenarioError, match="one step on one example"):
        check(Parts(Scenario.from_flat({**small_federation, **change})))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_figures_on_cifar_10(dtype):
    """CNN6 untrained, the first three images of the file."""
    client = Honest("cnn6", small(side=32), dtype=dtype)
    reached = []
    for index in range(3):
        images, labels = cifar10().batch(torch.tensor([index]), dtype)
        found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge())
        reached.append(psnr(images, found.examples).item())
        assert found.labels.tolist() == labels.tolist()
    print(f"{dtype}: {', '.join(f'{value:.1f}' for value in reached)} dB")
    assert min(reached) > (30 if dtype == torch.float32 else 100)


@pytest.mark.slow
def test_cnn6_d_on_cifar_10():
    client = Honest("cnn6(second=20)", small(side=32), dtype=torch.float64)
    images, labels = cifar10().batch(torch.tensor([0]), torch.float64)
    found = ATTACK.reconstruct([client.gradient(images, labels)], client.knowledge())
    print(f"CNN6-d: {psnr(images, found.examples).item():.1f} dB; {found.receipts[0]}")
    assert "encoder.2 has rank 4052 of 4332" in found.receipts[0]
