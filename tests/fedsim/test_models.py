"""Every registered model, at every shape that the range brings along."""

import inspect
from math import prod

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim import registry
from fedsim.data import DataSpec, load_dataset
from fedsim.errors import ScenarioError
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.models.resnet import BasicBlock

CIFAR100 = DataSpec((3, 32, 32), 100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def complete(kind: str) -> list[str]:
    """Components that need no argument: for data sets those that need no path."""
    return [
        name
        for name, component in registry.components(kind).items()
        if all(
            parameter.default is not inspect.Parameter.empty
            for parameter in registry.settable(component, skip=kind == "model").values()
        )
    ]


MODELS = complete("model")


def shapes() -> list[tuple[int, int, int]]:
    found = {load_dataset(name).spec.shape for name in complete("dataset")}
    return sorted(found | {(3, 64, 64), (1, 28, 28), (3, 25, 25), (1, 32, 32)})


def spec_of(shape: tuple[int, int, int]) -> DataSpec:
    return DataSpec(shape, 10, (0.5,) * shape[0], (0.25,) * shape[0])


@pytest.mark.parametrize("shape", shapes(), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_at_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = initial_model(name, spec_of(shape), seed=3)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 10)
    functional.cross_entropy(logits, torch.tensor([0, 9])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_what_travels_is_the_whole_model(name: str) -> None:
    """Loading it into a differently initialized model makes the two compute the same."""
    first, second = (initial_model(name, CIFAR100, seed).eval() for seed in (1, 2))
    for module in first.modules():  # running statistics as after training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(first(images), second(images))
    load_arrays(second, {key: value.numpy() for key, value in travelling(first).items()})
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("name", MODELS)
def test_only_parameters_and_running_statistics_travel(name: str) -> None:
    model = initial_model(name, CIFAR100, 1)
    buffers = travelling(model).keys() - dict(model.named_parameters()).keys()
    assert all(key.endswith(("running_mean", "running_var")) for key in buffers)


@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (initial_model(name, CIFAR100, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    ones, twos, threes = (travelling(model) for model in (first, again, other))
    assert all(torch.equal(ones[key], twos[key]) for key in ones)
    assert any(not torch.equal(ones[key], threes[key]) for key in ones)


def test_arrays_of_another_model_are_refused() -> None:
    model = initial_model("mlp", CIFAR100, 1)
    arrays = dict(travelling(model))
    first = next(iter(arrays))
    with pytest.raises(ValueError, match="has shape"):
        load_arrays(model, {**arrays, first: np.zeros((2, 2), np.float32)})
    del arrays[first]
    with pytest.raises(ValueError, match="do not fit"):
        load_arrays(model, arrays)


def test_mlp_reads_pixels_with_the_widths_asked_for() -> None:
    model = build_model("mlp(hidden=[64, 32])", CIFAR100)
    widths = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [(64, 3072), (32, 64), (100, 32)]
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    seen = []
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    images = torch.rand(1, 3, 32, 32)
    model(images)
    assert torch.equal(seen[0], images.flatten(1))


@pytest.mark.parametrize(("shape", "features"), [((3, 32, 32), 768), ((1, 28, 28), 588)])
def test_lenet_is_dlgs(shape: tuple[int, int, int], features: int) -> None:
    model = initial_model("lenet", DataSpec(shape, 100, (0.5,) * shape[0], (0.2,) * shape[0]), 1)
    convolutions = (shape[0] * 25 + 1) * 12 + 2 * (12 * 25 + 1) * 12
    assert sum(p.numel() for p in model.parameters()) == convolutions + (features + 1) * 100
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert flat.abs().max() <= 0.5
    assert flat.std().item() == pytest.approx(12**-0.5, rel=0.02)  # of U(-0.5, 0.5)
    strides = [m.stride[0] for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides == [2, 2, 1]


def test_resnet20_has_the_papers_size_and_resnet18_torchvisions() -> None:
    ten = DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.2,) * 3)
    count = {
        name: sum(p.numel() for p in build_model(name, ten).parameters())
        for name in ("resnet20", "resnet18")
    }
    assert count["resnet20"] == 269_722  # 0.27M in Table 6 of He et al. 2016
    # torchvision's 11,689,512 with ten classes for a thousand and a 3 x 3 stem for the 7 x 7.
    assert count["resnet18"] == 11_689_512 - 513 * 990 - 64 * 3 * (49 - 9)


def test_the_plain_sequences_have_their_papers_sizes() -> None:
    thousand = DataSpec((3, 224, 224), 1000, (0.5,) * 3, (0.2,) * 3)
    with torch.device("meta"):
        vgg = build_model("vgg16", thousand)
    assert sum(p.numel() for p in vgg.parameters()) == 138_357_544  # torchvision's vgg16
    lenet5 = build_model("lenet5", DataSpec((1, 28, 28), 10, (0.5,), (0.2,)))
    assert sum(p.numel() for p in lenet5.parameters()) == 61_706
    cnn = build_model("cnn", CIFAR100)
    linear = [m.weight.shape for m in cnn.modules() if isinstance(m, torch.nn.Linear)]
    assert linear == [(1024, 64 * 4 * 4), (512, 1024), (100, 512)]


def test_option_a_shortcut_adds_no_parameters_and_keeps_the_features() -> None:
    block = BasicBlock(4, 8, stride=2, norm=torch.nn.BatchNorm2d)
    torch.nn.init.zeros_(block.conv2.weight)
    features = torch.rand(2, 4, 6, 6)
    out = block.eval()(features)
    assert torch.equal(out[:, 2:6], features[:, :, ::2, ::2])
    assert out[:, [0, 1, 6, 7]].abs().max() == 0


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_group_norm_leaves_no_statistics_to_send(name: str) -> None:
    model = build_model(f"{name}(norm='group')", CIFAR100)
    assert travelling(model).keys() == dict(model.named_parameters()).keys()
    alone = model(torch.rand(1, 3, 32, 32))  # no batch statistics: one example is enough
    assert alone.shape == (1, 100)


def test_a_large_input_gets_the_imagenet_stem() -> None:
    model = build_model("resnet18", DataSpec((3, 96, 96), 10, (0.5,) * 3, (0.2,) * 3))
    assert model.state_dict()["network.conv1.weight"].shape == (64, 3, 7, 7)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "resnet20"])
def test_normalization_happens_inside(name: str) -> None:
    """The same network under other constants sees other images; nothing of it travels."""
    plain = initial_model(name, CIFAR100, 1).eval()
    spec = DataSpec((3, 32, 32), 100, (0.25,) * 3, (0.5,) * 3)
    shifted = initial_model(name, spec, 1).eval()
    images = torch.rand(2, 3, 32, 32)
    standardized = (images - 0.5) / 0.25
    assert torch.allclose(plain(images), shifted(standardized * 0.5 + 0.25), atol=1e-4)


@pytest.mark.parametrize(
    "expression", ["convnet(width=0)", "mlp(hidden=[0])", "lenet(init='zeros')", "resnet(depth=20)"]
)
def test_wrong_parameters_and_names_are_refused(expression: str) -> None:
    with pytest.raises(ScenarioError):
        build_model(expression, CIFAR100)


def test_mlp_without_hidden_layers_is_softmax_regression() -> None:
    model = build_model("mlp(hidden=[])", CIFAR100)
    assert sum(p.numel() for p in model.parameters()) == (prod(CIFAR100.shape) + 1) * 100
