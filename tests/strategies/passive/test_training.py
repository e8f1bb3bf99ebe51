"""Attacks that train something: asked for the best so far, they go on with what there is."""

import pytest

from fedsim.data import load_dataset, split_test
from strategies.attacks.optimization.augmented.gi_pip import GIPIP
from strategies.attacks.optimization.augmented.hcgla import HCGLA
from strategies.attacks.optimization.augmented.mjolnir import Mjolnir
from strategies.attacks.optimization.augmented.rog import ROG
from strategies.attacks.optimization.augmented.stand_in_inversion import StandInInversion
from strategies.attacks.optimization.basic.gradvit import GradViT
from strategies.attacks.optimization.training import training_steps
from tests.strategies.passive.honest import Honest, batch

LENET, LONG = "lenet", 1_000_000
ATTACKS = {
    "gi-pip": (GIPIP(iterations=60, epochs=LONG), LENET),
    "gradvit": (
        GradViT(iterations=60, epochs=LONG, auxiliary="resnet20(width=4)", labels="idlg"),
        "vit(first='standard', patch=4, width=6, depth=1)",
    ),
    "hcgla": (HCGLA(iterations=60, steps=LONG), LENET),
    "mjolnir": (
        Mjolnir(noise=0.01, steps=LONG, then="inverting-gradients(iterations=60)"),
        "convnet(width=8)",
    ),
    "rog": (ROG(iterations=2, pairs=4, steps=LONG), LENET),
    "stand-in-inversion": (
        StandInInversion(defense="digestnn", then="linear-inversion", pairs=4, steps=LONG),
        "mlp(hidden=[8])",
    ),
}


@pytest.mark.parametrize(("attack", "network"), ATTACKS.values(), ids=ATTACKS)
def test_stopped_by_hand_while_it_trains_it_goes_on_with_what_is_trained(attack, network):
    data = load_dataset("digits")
    surrogate = split_test(data.test, 7)[0]
    client = Honest(network, data.spec)
    view = client.gradient(*batch(data.train, 1, 0))
    knowledge = client.knowledge("D", 1, surrogate=surrogate)
    told = []

    def progress(done, total, text):
        if text.startswith("training the"):
            told.append(done)
            if done == 2:
                knowledge.stop()

    knowledge.progress = progress
    found = attack.reconstruct([view], knowledge)
    assert told == [0, 1, 2]
    assert found.examples.shape == (1, *data.spec.shape)
    assert found.examples.isfinite().all()
    assert any("stopped by hand: the" in line and "had 3 of" in line for line in found.receipts)


def test_a_training_nobody_stops_is_whole_and_one_that_is_stopped_has_a_step():
    data = load_dataset("digits")
    knowledge, receipts = Honest(LENET, data.spec).knowledge("D"), list[str]()
    assert list(training_steps(3, "denoiser", knowledge, receipts)) == [0, 1, 2]
    assert receipts == []
    knowledge.stop()
    assert list(training_steps(3, "denoiser", knowledge, receipts)) == [0]
    assert receipts == ["stopped by hand: the denoiser had 1 of 3 training steps"]
    assert list(training_steps(1, "denoiser", knowledge, receipts)) == [0]
    assert len(receipts) == 1
