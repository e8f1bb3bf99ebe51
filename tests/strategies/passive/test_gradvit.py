"""GradViT: an image prior of one's own, switched on half way, and what it refuses."""

import pytest
import torch

from fedsim.models import initial_model
from fedsim.models.statistics import batchnorm_layers, layer_statistics
from strategies.attacks.optimization.basic.gradvit import GradViT, Natural, trained
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.engine import matching
from strategies.attacks.optimization.groups import grouped
from strategies.attacks.optimization.priors import PatchBorders
from tests.strategies.passive.honest import Honest, batch, spec, tiles
from tests.strategies.passive.normed import Captured, cifar_captures

NETWORK = "vit(first='standard', patch=16, width=12, depth=1)"
AUXILIARY = "convnet(stride=2, width=4, norm='batch')"


def auxiliary(images: torch.Tensor) -> torch.nn.Module:
    """Return a network whose running statistics are those of a batch."""
    network = initial_model(AUXILIARY, spec(), 0).double().eval()
    for name, layer in batchnorm_layers(network).items():  # each changes what the next one sees
        mean, variance = layer_statistics(network, images)[name]
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return network


def test_the_image_prior_is_nothing_at_its_own_statistics_and_its_slope_is_right():
    images = torch.stack([batch(tiles(), 3, seed, torch.float64)[0] for seed in (0, 1)])
    prior = Natural(0.3, auxiliary(images[0]))
    penalty, pull = prior(images)
    assert penalty[0] < 1e-9
    assert penalty[1] > 1e-2
    along = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).double() - 0.5
    step = 1e-6
    ahead, behind = prior(images + step * along)[0], prior(images - step * along)[0]
    slope = (pull * along).flatten(1).sum(dim=1)
    assert torch.allclose(slope[1], ((ahead - behind) / (2 * step))[1], rtol=1e-4)


def test_shuffled_patches_raise_the_patch_prior_and_move_the_statistics_only_moderately():
    """Why GradViT needs both: BatchNorm's statistics see little but what lies inside patches."""
    images, others = (batch(tiles(), 3, seed, torch.float64)[0].unsqueeze(0) for seed in (0, 10))
    pieces = images.unfold(3, 8, 8).unfold(4, 8, 8).flatten(3, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = pieces[:, :, :, order].unflatten(3, (4, 4)).transpose(4, 5).reshape(images.shape)
    statistics, borders = Natural(1.0, auxiliary(images[0])), PatchBorders(1.0, 8)
    assert borders(shuffled)[0] > 2 * borders(images)[0]
    assert 0 < statistics(shuffled)[0] < statistics(others)[0] / 5


def test_a_network_trained_in_single_precision_sees_images_of_double():
    images = batch(tiles(), 3, 0, torch.float64)[0].unsqueeze(0)
    expected = Natural(0.3, auxiliary(images[0] + 0.1))(images)
    found = Natural(0.3, auxiliary(images[0] + 0.1).float())(images)
    assert found[1].dtype == torch.float64
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-3, atol=1e-6)


def test_the_image_prior_begins_half_way_and_the_truth_has_no_distance():
    captured = Captured.of(Honest(NETWORK, spec(), dtype=torch.float64), tiles(), 2, 1)
    attack = GradViT(tv=0, patch=0, norm=0, labels="oracle")
    knowledge = captured.knowledge(("labels",))
    other = batch(tiles(), 8, 5, torch.float64)[0]
    recipe = attack.recipe(knowledge, Natural(1.0, auxiliary(other)))
    (group,) = grouped(captured.views, knowledge, recipe.batch_size, recipe.labels, [])
    problem, pixels = matching(group, recipe), matching(group, recipe).parametrization
    truth = ((captured.batches[0][0] - pixels.mean) / pixels.std).flatten().unsqueeze(0)
    early, late = (problem.evaluate(truth, progress) for progress in (0.4, 0.6))
    assert early.distance < 1e-12
    assert early.cost < 1e-12
    assert late.distance < 1e-12
    assert late.cost > 0.1
    assert recipe.settled == 0.5


def test_the_auxiliary_network_learns_from_surrogate_images_and_its_accuracy_is_told():
    captured = Captured.of(Honest(NETWORK, spec()), tiles(), 1, 1, surrogate=300)
    attack = GradViT(iterations=4, epochs=2, auxiliary=AUXILIARY, labels="idlg")
    knowledge = captured.knowledge(threat_model="D")
    found = attack.reconstruct(captured.views, knowledge)
    network, accuracy = trained(AUXILIARY, 2, knowledge, [])
    assert f"right on {accuracy:.0%}" in found.receipts[0]
    layers = batchnorm_layers(network).values()
    assert all(layer.running_mean.abs().max() > 1e-3 for layer in layers)
    assert {c.value for c in knowledge.used} == {"updates", "basics", "surrogate"}
    without = GradViT(iterations=4, image=0, labels="idlg")
    bare = captured.knowledge(threat_model="B")
    assert "image prior" not in without.reconstruct(captured.views, bare).receipts[0]


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="vit"):
        GradViT().check(initial_model("convnet", spec(), 0), "gradient")
    transformer = initial_model(NETWORK, spec(), 0)
    GradViT().check(transformer, "gradient")
    with pytest.raises(ValueError, match="resnet20"):
        GradViT(auxiliary="convnet").check(transformer, "gradient")


# -- figures ---------------------------------------------------------------------------------------

BARE = {"image": 0.0, "patch": 0.0, "tv": 0.0, "norm": 0.0}
STEPS = {
    "gradient only": BARE,
    "+ TV, norm": {"image": 0.0, "patch": 0.0},
    "+ patch prior": {"image": 0.0},
    "+ image prior": {},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ablation_on_cifar10():
    network = "vit(first='standard', patch=16, depth=1, pool='mean')"
    captured = cifar_captures(network, 1, 3, 50)
    floor = captured.floor().mean()
    plain = InvertingGradients(iterations=600, tv=1e-2, labels="oracle")
    found = plain.reconstruct(captured.views, captured.knowledge(("labels",)))
    inverted = captured.psnr(found).mean()
    print(f"\nfloor {floor:.1f} dB, inverting-gradients {inverted:.1f}")
    reached = []
    for step, parts in STEPS.items():
        attack = GradViT(iterations=600, labels="oracle", **parts)
        found = attack.reconstruct(captured.views, captured.knowledge(("labels",)))
        reached.append(captured.psnr(found).mean())
        print(f"{step}: {reached[-1]:.1f} dB; {found.receipts[0]}")
    bare, smooth, patched, natural = reached
    assert bare < floor < smooth - 2
    assert smooth < patched  # the patch prior adds,
    assert smooth - 0.5 < natural < patched  # the image prior takes away
    assert patched < inverted + 0.5
