"""The Cocktail Party Attack: what a linear layer adds up, independent components tell apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fedsim import reconstructions
from fedsim.data import DataSet
from fedsim.errors import NotGranted, ScenarioError
from fedsim.parts import Parts, check
from strategies.attacks.analytic.closed_form.blind_separation import (
    Prior,
    separation_loss,
    unmix,
    whiten,
)
from strategies.attacks.analytic.closed_form.cocktail_party import CocktailParty, first_layer
from strategies.attacks.analytic.closed_form.feature_inversion import features
from tests.fedsim.small import Ran, federated, plug_in, scenario
from tests.strategies.passive.honest import Honest, batch, cifar10, floor_psnr, matched_psnr, spec
from tests.strategies.passive.honest import tiles as photo_tiles

SHAPE = (3, 32, 32)


def mixed(examples: int, seed: int = 0, net: str = "mlp(hidden=[64])"):
    """Return a client, its images, and its first layer's gradient, float64."""
    client = Honest(net, spec())
    images, labels = batch(photo_tiles(), examples, seed)
    view = client.gradient(images, labels)
    layer, _ = first_layer(client.model())
    return client, images, view, layer


def correlation(found: Tensor, truth: Tensor) -> float:
    """Return the mean |correlation| over pixels of the best one-to-one match of rows ``[M, D]``."""
    rows = [one.double() - one.double().mean(dim=1, keepdim=True) for one in (found, truth)]
    rows = [nn.functional.normalize(one) for one in rows]
    likeness = (rows[0] @ rows[1].T).abs()
    return float(likeness[linear_sum_assignment(-likeness.numpy())].mean())


def independent_components(gradient: Tensor, count: int) -> Tensor:
    """Return what scikit-learn's FastICA makes of ``[h, D]``: ``[count, D]``."""
    from sklearn.decomposition import FastICA

    scaled = (gradient / gradient.std()).T.double().numpy()
    search = FastICA(count, random_state=0, max_iter=1000, whiten="unit-variance")
    return torch.from_numpy(search.fit_transform(scaled).T)


@pytest.mark.parametrize("examples", [1, 5, 20])
def test_the_gap_in_the_spectrum_counts_the_examples(examples):
    _, _, view, layer = mixed(examples)
    found = whiten(view.update()[f"{layer}.weight"].double(), examples)
    assert len(found.whitener) == examples
    assert found.gap > 1e4


def test_whitened_sources_are_uncorrelated_and_of_variance_one():
    _, _, view, layer = mixed(6)
    gradient = view.update()[f"{layer}.weight"].double()
    white = whiten(gradient, 6).whitener @ gradient
    assert torch.allclose(torch.cov(white), torch.eye(6, dtype=torch.float64), atol=1e-6)


def test_an_image_that_is_there_twice_is_one_source():
    client, images, _, layer = mixed(4)
    labels = torch.tensor([0, 1, 2, 2])
    view = client.gradient(images[[0, 1, 2, 2]], labels)
    assert len(whiten(view.update()[f"{layer}.weight"].double(), 4).whitener) == 3


def test_noise_drowns_the_quietest_source_first():
    _, _, view, layer = mixed(8)
    gradient = view.update()[f"{layer}.weight"].double()
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
    heard = [
        len(whiten(gradient + share * gradient.std() * noise, 8).whitener)
        for share in (0, 0.3, 100)
    ]
    assert heard[0] == 8
    assert 0 < heard[1] < 8
    assert heard[2] == 0


def test_the_bias_gives_sign_and_size_of_a_perfect_unmixing():
    """Rows of the true unmixing, in any order, of any sign and length, give the images."""
    _, images, view, layer = mixed(6)
    weight = view.update()[f"{layer}.weight"].double()
    bias = view.update()[f"{layer}.bias"].double()
    truth = images.flatten(1).double()
    perfect = torch.linalg.pinv(weight @ torch.linalg.pinv(truth))  # A^+
    turned = torch.diag(torch.tensor([-3.0, 1e-4, 2.0, -1.0, 50.0, -0.2]).double()) @ perfect
    assert torch.allclose((turned @ weight) / (turned @ bias)[:, None], truth, atol=1e-3)


def test_the_loss_is_the_papers_written_out():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    rows = nn.functional.normalize(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    prior = Prior(0.7, 1.3, 5.0, smoothness=2.0, sparsity=0.4, one_sided=0.9)
    sources = rows @ white
    expected = 0.0
    for i in range(3):
        centered = sources[i] - sources[i].mean()
        expected -= 0.7 * float(centered.cosh().log().mean()) ** 2 / 3
        expected += (
            0.9
            * min(float(sources[i].clamp(min=0).norm()), float(sources[i].clamp(max=0).norm()))
            / 3
        )
        for k in {0, 1, 2} - {i}:
            expected += 1.3 * (float((5 * (rows[i] @ rows[k]).abs()).exp()) - 1) / 3
    expected += 0.4 * float(sources.abs().mean()) + 2.0 * 11
    loss = separation_loss(rows, white, prior, lambda flat: flat.new_tensor(11.0))
    assert float(loss) == pytest.approx(expected)


def test_nonnegative_sparse_features_are_told_apart_by_having_one_sign():
    client, images, view, layer = mixed(6, net="convnet(width=16)")
    truth = features(client.model(), layer, images).detach().double()
    weight = view.update()[f"{layer}.weight"].double()
    found = whiten(weight, 6)
    prior = CocktailParty().prior(pixels=False)
    rows = unmix((found.whitener @ weight).float(), prior, iterations=1000, lr=0.01)
    ours = correlation(rows.double() @ found.whitener @ weight, truth)
    assert ours > 0.9
    assert ours > correlation(independent_components(weight, 6), truth) + 0.1


def test_images_come_back_through_the_convolutions():
    client, images, view, _ = mixed(3, net="convnet(width=16, hidden=[32])")
    attack = CocktailParty(iterations=1000, inversion_iterations=300)
    found = attack.reconstruct([view], client.knowledge("B", 3))
    assert found.cost.gradient_evaluations == 3 * 300
    reached = matched_psnr(images, found.examples)
    assert reached.mean() > floor_psnr(images, photo_tiles()).mean() + 5


def test_more_examples_than_units_are_refused_with_a_remedy(tmp_path):
    nine = {"attack": "cocktail-party", "federation.local": "fedsgd(batch_size=9, lr=0.1)"}
    with pytest.raises(ScenarioError, match=r"mlp\(hidden=\[9\]\)"):
        check(Parts(scenario(tmp_path, nine)))
    check(Parts(scenario(tmp_path, {**nine, "model.name": "mlp(hidden=[9])"})))
    with pytest.raises(ScenarioError, match=r"mlp\(hidden=\[36\]\)"):
        check(Parts(scenario(tmp_path, {**nine, "channel": "trusted-sum"})))


def test_an_update_of_more_examples_than_units_is_left_out():
    client, _, view, _ = mixed(9, net="mlp(hidden=[8])")
    found = CocktailParty().reconstruct([view], client.knowledge("B", 9))
    assert len(found.examples) == 0
    assert "cannot tell 9 examples apart" in found.receipts[0]


def test_a_model_without_such_a_layer_is_refused_before_anybody_trains():
    for layers in (nn.Conv2d(3, 10, 32), nn.Linear(3 * 32 * 32, 10, bias=False)):
        model = nn.Sequential(layers) if isinstance(layers, nn.Conv2d) else None
        model = model or nn.Sequential(nn.Flatten(), layers)
        model.spec = spec()
        with pytest.raises(ValueError, match="fully connected layer with a bias"):
            CocktailParty().check(model, "gradient")


def test_an_eavesdropper_who_does_not_know_how_many_is_refused():
    client, _, view, _ = mixed(2)
    with pytest.raises(NotGranted, match="least model that does is B"):
        CocktailParty().reconstruct([view], client.knowledge("A", 2))


def test_an_update_that_is_not_finite_gives_nothing():
    client, _, view, layer = mixed(2)
    view.received[f"{layer}.weight"][0, 0] = torch.nan
    found = CocktailParty(iterations=1).reconstruct([view], client.knowledge("B", 2))
    assert found.examples.shape == (0, *SHAPE)


# -- through a federation ------------------------------------------------------------------------


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> str:
    pool = cifar10()
    parts = pool.subset(torch.arange(4000)), pool.subset(torch.arange(4000, 5000))
    plug_in(monkeypatch, "dataset", "cifar-10", lambda: DataSet(*parts, tuple("0123456789")))
    return "cifar-10"


def party(folder: Path, dataset: str, clients: int, size: int, **changes: Any) -> Ran:
    return federated(
        folder,
        {
            "threat-model": "B",
            "attack": "cocktail-party",
            "data.dataset": dataset,
            "model.name": "mlp(hidden=[256])",
            "federation.clients": clients,
            "federation.local": f"fedsgd(batch_size={size}, lr=0.1)",
            **changes,
        },
    )


def against_components(ran: Ran) -> tuple[float, float, Tensor]:
    """Return mean |corr| over views of the attack and of FastICA, and every image's PSNR."""
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    ours, theirs, reached = [], [], []
    for index, view in enumerate(ran.views):
        records = [ran.vault.record(client, view.round) for client in view.senders]
        truth = torch.cat([record.examples.float() for record in records if record])
        candidates = found.examples[found.views == index]
        ours.append(correlation(candidates.flatten(1), truth.flatten(1)))
        components = independent_components(view.update()["1.weight"], len(truth))
        theirs.append(correlation(components, truth.flatten(1)))
        reached.append(matched_psnr(truth, candidates))
    return sum(ours) / len(ours), sum(theirs) / len(theirs), torch.cat(reached)


def told(name: str, ran: Ran) -> tuple[float, float, Tensor]:
    ours, theirs, reached = against_components(ran)
    print(
        f"{name}: mean |corr| {ours:.3f}, FastICA {theirs:.3f}; PSNR mean {reached.mean():.1f} dB, "
        f"{int((reached >= 20).sum())} of {len(reached)} at 20 dB"
    )
    return ours, theirs, reached


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 32])
def test_it_beats_fastica_by_a_tenth_on_cifar10(size, cifar, tmp_path):
    ours, theirs, _ = told(f"M = {size}", party(tmp_path, cifar, 4, size))
    assert ours > theirs + 0.1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:FastICA did not converge")
@pytest.mark.parametrize(("clients", "size"), [(2, 4), (8, 4)])
def test_a_secure_sum_is_one_more_cocktail_party(clients, size, cifar, tmp_path):
    ran = party(tmp_path, cifar, clients, size, channel=f"secagg(max_weight={size})")
    ours, theirs, _ = told(f"secagg, {clients} x {size}", ran)
    assert len(ran.views) == 1
    assert ours > theirs + 0.1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:FastICA did not converge")
def test_negentropy_hardly_matters(cifar, tmp_path):
    shares = [
        told(f"negentropy={weight}", party(tmp_path / str(weight), cifar, 4, 8, attack=text))[0]
        for weight in (0, 1)
        for text in [f"cocktail-party(negentropy={weight})"]
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_features_and_then_images_come_back_on_cifar10(cifar, tmp_path):
    ran = party(tmp_path, cifar, 2, 8, **{"model.name": "cnn"})
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    reached, floor = [], []
    for index, view in enumerate(ran.views):
        record = ran.vault.record(view.senders[0], view.round)
        truth = record.examples.float()
        reached.append(matched_psnr(truth, found.examples[found.views == index]))
        floor.append(floor_psnr(truth, cifar10()))
    mean, guess = torch.cat(reached).mean(), torch.cat(floor).mean()
    print(f"cnn, M = 8: PSNR mean {mean:.1f} dB, the mean image {guess:.1f} dB")
    assert mean > guess + 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:FastICA did not converge")
def test_local_training_leaves_the_first_layer_a_mixture(cifar, monkeypatch, tmp_path):
    """Eight images, four steps: their shares in the mixture change, the images do not."""
    pool = cifar10()
    parts = pool.subset(torch.arange(32)), pool.subset(torch.arange(4000, 5000))
    plug_in(monkeypatch, "dataset", "few", lambda: DataSet(*parts, tuple("0123456789")))
    changes = {"federation.local": "fedavg(epochs=2, batch_size=4, lr=0.1)"}
    ours, theirs, _ = told("FedAvg, 4 steps", party(tmp_path, "few", 4, 8, **changes))
    assert ours > theirs + 0.1
