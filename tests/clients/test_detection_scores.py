"""What the detectors measure: closed forms, and the anchors of the known attacks.

Anchors are of constructions made here by hand, on photo tiles, in batches of 64, so that a mistake
in an attack's own file cannot hide one in its detector.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.defenses.detection.d_snr import d_snr, layer_ratios
from clients.defenses.detection.gradient_concentration import effective, in_the_top
from clients.defenses.detection.judged import LARGEST, judged, over_the_rest
from clients.defenses.detection.row_d_snr import moved_by_one, owned, row_scores
from clients.defenses.detection.self_audit import batch_gradient, own_images_back
from clients.defenses.detection.structure import (
    structure,
)
from clients.defenses.detection.transmit_snr import transmit_snr
from clients.per_example import per_example_gradients
from fedsim import seeds
from fedsim.data import DataSet, load_dataset
from fedsim.defense import Batch, Defense, Tensors
from fedsim.models import initial_model
from fedsim.registry import components
from tests.clients.one_update import context
from tests.fedsim.small import plain_gradient

B = 64


def arrays(model: nn.Module) -> Tensors:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def tiles() -> DataSet:
    return load_dataset("photo-tiles")


@pytest.fixture(scope="module")
def batch(tiles: DataSet) -> Batch:
    order = torch.randperm(len(tiles.train), generator=torch.Generator().manual_seed(1))
    return tiles.train.batch(order[:B])


def convnet(tiles: DataSet, seed: int = 7) -> nn.Module:
    return initial_model("convnet", tiles.spec, seed).eval()


def imprinted(tiles: DataSet, batch: Batch, units: int = 256) -> nn.Module:
    """An imprint of ``units`` brightness bins, of equal mass over these images, and a head."""
    pixels = batch[0][0].numel()
    with seeds.seeded_globals(3):
        layer, back = nn.Linear(pixels, units), nn.Linear(units, tiles.spec.num_classes)
    values = batch[0].flatten(1).mean(dim=1)
    cut = torch.quantile(values, torch.linspace(0, 1, units + 1)[:-1])
    with torch.no_grad():
        layer.weight.fill_(1 / pixels)
        layer.bias.copy_(-cut - torch.arange(units) * 1e-7)
        back.weight.copy_(back.weight[:, :1].expand(-1, units) / units)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), back)


def fished_class(tiles: DataSet, label: int) -> nn.Module:
    """Wen et al.: all other classes are silenced by a bias of 1000."""
    model = convnet(tiles)
    head = model.fc
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[label] = 0.5
        head.bias.fill_(1000.0)
        head.bias[label] = 0
    return model


# -- gradients of single examples --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp(hidden=[16])", "lenet", "convnet(width=4)", "resnet20(width=4)"]
)
def test_the_mean_over_examples_is_the_batch_gradient(tiles: DataSet, name: str) -> None:
    images, labels = tiles.train.batch(torch.arange(6))
    model = initial_model(name, tiles.spec, 1).double().eval()
    images = images.double()
    chunks = list(per_example_gradients(model, (images, labels)))
    whole = plain_gradient(model, images, labels)
    for parameter, gradient in whole.items():
        every = torch.cat([chunk[parameter] for chunk in chunks])
        assert every.shape == (6, *gradient.shape)
        assert torch.allclose(every.mean(dim=0), gradient, atol=1e-12)


def test_with_batchnorm_in_train_mode_the_examples_still_add_up(tiles: DataSet) -> None:
    images, labels = tiles.train.batch(torch.arange(6))
    model = initial_model("resnet20(width=4)", tiles.spec, 1).double().train()
    chunks = list(per_example_gradients(model, (images.double(), labels)))
    whole = plain_gradient(model, images.double(), labels)
    for parameter, gradient in whole.items():
        every = torch.cat([chunk[parameter] for chunk in chunks])
        assert torch.allclose(every.mean(dim=0), gradient, atol=1e-10)


class Branching(nn.Module):
    """Does what vmap cannot follow: decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3072, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.flatten(1))
        return logits * 2 if float(logits.sum()) > 1e9 else logits


def test_an_architecture_that_vmap_cannot_follow_is_taken_one_by_one(batch: Batch) -> None:
    (chunk,) = per_example_gradients(Branching(), (batch[0][:4], batch[1][:4]))
    assert chunk["fc.weight"].shape == (4, 10, 3072)


class Does(nn.Module):
    """Does one thing with the pixels before a linear layer, and counts how often."""

    def __init__(self, deed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.deed, self.calls = nn.Linear(3072, 10), deed, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.fc(self.deed(images.flatten(1)))
        return logits


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return 2 * values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize(
    "deed",
    [
        lambda pixels: pixels * pixels.sum().item(),
        lambda pixels: torch.zeros(len(pixels), 3072).copy_(pixels),
        lambda pixels: pixels + pixels[pixels > 0].sum(),
        lambda pixels: pixels * float(pixels.detach().numpy().sum()),
        Own.apply,
    ],
    ids=["item", "in place", "size by value", "numpy", "own function"],
)
def test_whatever_vmap_cannot_follow_is_taken_one_by_one(deed: Any, batch: Batch) -> None:
    model = Does(deed)
    (chunk,) = per_example_gradients(model, (batch[0][:3], batch[1][:3]))
    assert chunk["fc.weight"].shape == (3, 10, 3072)
    assert model.calls == 2


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        (lambda pixels: pixels[:, 1:], "cannot be multiplied"),
        (lambda pixels: _fail("out of memory"), "out of memory"),
    ],
)
def test_what_goes_wrong_anyway_is_not_tried_again(deed: Any, said: str, batch: Batch) -> None:
    model = Does(deed)
    with pytest.raises(RuntimeError, match=said):
        list(per_example_gradients(model, (batch[0][:3], batch[1][:3])))
    assert model.calls == 1


def _fail(why: str) -> Tensor:
    raise torch.OutOfMemoryError(why)


# -- closed forms ------------------------------------------------------------------------------


def test_equal_lengths_give_one_over_the_others() -> None:
    images, labels = torch.ones(9, 1, 4, 4), torch.zeros(9, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    assert d_snr(model, (images, labels)) == pytest.approx(1 / 8, rel=1e-5)


def test_scaling_all_gradients_down_hides_nothing(batch: Batch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8, bias=False), nn.Linear(8, 10))
    tiny = copy.deepcopy(model)
    with torch.no_grad():
        tiny[2].weight.mul_(1e-9)
        model[2].weight.mul_(1e-3)
    few = batch[0][:8].double(), batch[1][:8]
    ratios = [layer_ratios(one.double(), few) for one in (model, tiny)]
    assert ratios[0]["1.weight"] == pytest.approx(ratios[1]["1.weight"], rel=0.05)


def test_a_batch_without_any_gradient_is_undecidable_and_not_refused(batch: Batch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1000)
        model[1].bias[0] = 1000
    right = (batch[0], torch.zeros_like(batch[1]))
    for name in ("d-snr(refuse_above=1e-9)", "gradient-concentration", "activity(dead=0.0)"):
        verdict = inspected(name, model, right)
        assert verdict.accept
        assert not verdict.checks
        assert "undecidable" in verdict.reason


def test_one_example_alone_is_undecidable(tiles: DataSet) -> None:
    one = tiles.train.batch(torch.arange(1))
    assert inspected("d-snr", convnet(tiles), one).checks == {}


def test_effective_number_of_examples() -> None:
    assert effective(torch.full((B,), 3.0)) == pytest.approx(B)
    silenced = torch.zeros(B)
    silenced[:6] = 1e-20
    assert effective(silenced) == pytest.approx(6)


def test_the_top_of_a_gradient_of_equal_coordinates_holds_its_share() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(999, 2))
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    share = in_the_top(model, (torch.ones(2, 1, 27, 37), torch.zeros(2, dtype=torch.int64)))
    assert share == pytest.approx(2 / 2000)


def test_shares_of_rows() -> None:
    norms = torch.tensor([[1.0, 5.0, 0.0, 1e-9], [1.0, 1.0, 7.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    # the last row is dead beside the others; of three live ones two have an owner, one is alone
    assert owned(norms) == pytest.approx(2 / 3)
    assert moved_by_one(norms) == pytest.approx(1 / 3)


def test_a_pass_through_kernel_is_as_large_as_a_ratio_can_be() -> None:
    kernels = drawn(0, 8, 3, 3, 3)
    assert transmit_snr(kernels) < 0.5
    kernels[2] = 0
    kernels[2, 1, 1, 1] = -7.0
    assert transmit_snr(kernels) == pytest.approx(LARGEST)
    assert transmit_snr(torch.zeros(4, 3, 3, 3)) == 0


def test_no_figure_is_no_verdict() -> None:
    verdict = judged({"a": float("nan"), "b": 2.0}, {"a": 0.5, "b": None})
    assert verdict.accept
    assert verdict.checks == {"b": 2.0}
    assert not judged({"b": 2.0}, {"b": 1.0}).accept
    assert judged({"b": 1.0}, {"b": 1.0}).accept
    assert "2.0" not in judged({"b": 2.0}, {"b": 1.0}).reason
    assert over_the_rest(1.0, 1.0) == LARGEST


# -- anchors -----------------------------------------------------------------------------------


def test_an_honest_model_is_benign(tiles: DataSet, batch: Batch) -> None:
    model = convnet(tiles)
    assert 1 / (B - 1) < d_snr(model, batch) < 0.1
    verdict = inspected("gradient-concentration(refuse_above=0.75)", model, batch)
    assert verdict.accept
    assert verdict.checks["gradient-concentration"] < 0.4


def test_class_fishing_leaves_one_class(tiles: DataSet, batch: Batch) -> None:
    counts = torch.bincount(batch[1], minlength=10)
    label = int((counts - 6).abs().argmin())
    model = fished_class(tiles, label)
    assert d_snr(model, batch) > 0.2
    verdict = inspected("gradient-concentration(refuse_above=0.75)", model, batch)
    assert not verdict.accept
    assert verdict.checks["gradient-concentration"] >= 1 - int(counts[label]) / B - 1e-6
    heads = inspected("structure(zero_rows=0.3, huge_bias=0.3)", model, batch)
    assert heads.reason == "structure/zero-rows, structure/huge-bias above the limit"


def test_an_isolated_image_outweighs_the_rest_by_far(tiles: DataSet, batch: Batch) -> None:
    """Feature fishing among images of one class, cut half way to the last (Wen et al.)."""
    model = convnet(tiles)
    head = model.fc
    assert isinstance(head, nn.Linear)
    features: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, given, out: features.append(given[0]))
    model(batch[0])
    handle.remove()
    ordered = features[0].detach().sort(dim=0).values
    feature = int((ordered[1] - ordered[0]).argmax())
    lowest = ordered[:, feature]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[0, feature] = 300 / float(lowest[1] - lowest[0])
        head.bias[0] = -float(lowest[:2].mean()) * head.weight[0, feature]
    one_class = (batch[0], torch.zeros_like(batch[1]))
    assert d_snr(model, one_class) > 5


def test_an_imprint_is_invisible_by_layers_and_plain_by_rows_and_rank(
    tiles: DataSet, batch: Batch
) -> None:
    model = imprinted(tiles, batch)
    assert d_snr(model, batch) < 0.1
    rows, _, differences = row_scores(model, arrays(model), batch)
    assert rows < 0.1
    assert differences > 0.5
    found = structure(arrays(model), draws())
    assert found["duplicate-rows"] == 1
    assert found["low-rank"] > 0.99
    assert found["equal-columns"] == 1
    assert found["huge-bias"] > 0.3


def test_permuting_an_imprints_rows_hides_nothing(tiles: DataSet, batch: Batch) -> None:
    model = imprinted(tiles, batch)
    before = row_scores(model, arrays(model), batch)[2]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias):  # type: ignore[index]
            tensor.copy_(tensor[order].clone())
    assert row_scores(model, arrays(model), batch)[2] == pytest.approx(before, abs=0.01)


def test_a_suppressed_model_is_dead(tiles: DataSet, batch: Batch) -> None:
    """Pasquini et al. 2022: nothing moves but the last bias."""
    model = convnet(tiles)
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.bias.fill_(-1000)
    verdict = inspected("activity(dead=0.9)", model, batch)
    assert verdict.checks["activity/dead"] == 1
    assert not verdict.accept
    assert inspected("activity(dead=0.9)", convnet(tiles), batch).accept


# -- self-audit --------------------------------------------------------------------------------


def test_the_audit_finds_what_an_imprint_gives_away(tiles: DataSet, batch: Batch) -> None:
    model = imprinted(tiles, batch).double()
    images = batch[0].double()
    psnr = own_images_back(arrays(model), batch_gradient(model, (images, batch[1])), images)
    assert psnr is not None
    assert float((psnr > 60).double().mean()) > 0.5
    verdict = audited("self-audit(images=0.2)", model, (images, batch[1]))
    assert not verdict.accept
    assert inspected("self-audit(images=0.2)", model, (images, batch[1])).accept


def test_one_image_through_a_perceptron_is_refused_and_noise_would_save_it(tiles: DataSet) -> None:
    one = tiles.train.batch(torch.arange(1))
    model = initial_model("mlp", tiles.spec, 1)
    assert not audited("self-audit(refuse_above=20.0)", model, one).accept
    gradient = batch_gradient(model, one)
    noised = {n: g + drawn(9, *g.shape) for n, g in gradient.items()}  # DP-SGD's sigma 1 at clip 1
    psnr = own_images_back(arrays(model), noised, one[0])
    assert psnr is not None
    assert float(psnr.max()) < 20


def test_a_model_that_reads_no_image_is_undecidable(tiles: DataSet, batch: Batch) -> None:
    model = initial_model("lenet", tiles.spec, 1)
    verdict = audited("self-audit(refuse_above=20.0)", model, batch)
    assert verdict.accept
    assert not verdict.checks
    assert verdict.reason.startswith("undecidable: self-audit")


def test_fedavgs_update_is_read_as_a_gradient_is(tiles: DataSet) -> None:
    """One step of SGD: after - before is -lr times the gradient, whose ratios are the same."""
    one = tiles.train.batch(torch.arange(1))
    model = initial_model("mlp", tiles.spec, 1)
    moved = {n: -0.05 * g.double() for n, g in batch_gradient(model, one).items()}
    psnr = own_images_back(arrays(model), moved, one[0])
    assert psnr is not None
    assert float(psnr.max()) > 100


# -- every detector ----------------------------------------------------------------------------


def inspected(expression: str, model: nn.Module, batch: Batch):  # type: ignore[no-untyped-def]
    from fedsim.registry import build

    defense: Defense = build("defense", expression, "defenses")
    return defense.inspect(copy.deepcopy(model), arrays(model), batch, context())


def audited(expression: str, model: nn.Module, batch: Batch):  # type: ignore[no-untyped-def]
    from fedsim.registry import build

    defense: Defense = build("defense", expression, "defenses")
    return defense.inspect_update(arrays(model), batch_gradient(model, batch), batch, context())


DETECTORS = [
    name
    for name, kind in components("defense").items()
    if kind.inspect is not Defense.inspect  # type: ignore[attr-defined]
]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_reports_and_refuses_nothing_unless_asked(
    name: str, tiles: DataSet, batch: Batch
) -> None:
    verdict = inspected(name, imprinted(tiles, batch), batch)
    assert verdict.accept
    assert all(check.split("/")[0] == name for check in verdict.checks)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_survives_a_model_that_holds_nan(
    name: str, tiles: DataSet, batch: Batch
) -> None:
    model = imprinted(tiles, batch, units=16)
    with torch.no_grad():
        model[1].weight[0] = torch.nan  # type: ignore[index]
    verdict = inspected(name, model, batch)
    assert verdict.accept
    assert all(math.isfinite(score) for score in verdict.checks.values())
    # What reads gradients has none that is a number; what reads arrays says what it can.
    if name in ("d-snr", "row-d-snr", "gradient-concentration"):
        assert not verdict.checks
        assert verdict.reason.startswith("undecidable")
    if name == "self-audit":
        assert "self-audit" not in verdict.checks
    if name == "structure":
        assert verdict.checks["structure/not-finite"] > 0


def test_all_eight_are_registered() -> None:
    assert set(DETECTORS) >= {
        "activity",
        "consistency",
        "d-snr",
        "gradient-concentration",
        "row-d-snr",
        "self-audit",
        "structure",
        "transmit-snr",
    }
