"""The shuffled control: nothing of an exact attack is left, and what it asks for is asked for."""

import pytest

from fedsim import registry
from fedsim.errors import ScenarioError
from tests.strategies.passive.honest import Honest, batch, psnr, spec, tiles


def test_candidates_are_handed_in_for_the_next_update():
    client = Honest("mlp(hidden=[32])", spec())
    views, truth = [], []
    for place in range(3):
        images, labels = batch(tiles(), 1, place)
        views.append(client.gradient(images, labels, client=place))
        truth.append(images)
    counts = {view.label: 1 for view in views}
    attack = registry.build("attack", "shuffled(of='linear-inversion')", "attack")
    found = attack.reconstruct(views, client.knowledge("B", examples=counts))
    best = [max(psnr(truth[int(at)], image.unsqueeze(0)).item() for image, at in
            zip(found.examples, found.views, strict=True) if int(at) == place)
            for place in range(3)]  # fmt: skip
    assert max(best) < 25
    back = (found.views - 1) % 3
    right = [psnr(truth[int(at)], image.unsqueeze(0)).item()
             for image, at in zip(found.examples, back, strict=True)]  # fmt: skip
    assert max(right) > 90
    assert "control" in found.receipts[0]


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("shuffled(of='loki')", "a passive attack"),
        ("shuffled(of='lokii')", "did you mean 'loki'"),
        ("shuffled", "needs of"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(expression, said):
    with pytest.raises(ScenarioError, match=said):
        registry.build("attack", expression, "attack")


def test_it_asks_for_what_the_attack_under_test_asks_for():
    inner = "gradattack(statistics='oracle', labels='oracle')"
    attack = registry.build("attack", f'shuffled(of="{inner}")', "attack")
    assert attack.oracles == {"labels", "batchnorm"}
    proxy = registry.build("attack", "shuffled(of=\"gradattack(statistics='proxy')\")", "attack")
    assert {need.value for need in proxy.required} == {"updates", "basics", "surrogate"}
