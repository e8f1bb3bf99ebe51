"""A reconstruction survives its file, and a wrong one is refused before it is written."""

import io

import pytest
import torch
from PIL import Image

from fedsim import reconstructions
from fedsim.attack import Cost, Reconstruction
from fedsim.errors import ScenarioError

FACTS = reconstructions.Facts(
    expression="linear-inversion(layer='head')",
    name="linear-inversion",
    paper="Phong et al. 2017",
    used=("updates", "basics"),
    oracles=(),
    view_labels=("round-1-client-0", "round-1-aggregate-of-2"),
    senders=((0,), (0, 1)),
    rounds=(1, 1),
)


def some(count=5, **more):
    fields = {"examples": torch.rand(count, 3, 8, 8), "views": torch.arange(count) % 2, **more}
    return Reconstruction(**fields)


def test_a_reconstruction_comes_back_as_it_was(tmp_path):
    put = some(
        labels=torch.arange(5),
        scores=torch.rand(5),
        cost=Cost(1.5, 300),
        receipts=("read 5 rows of head.weight",),
    )
    path = reconstructions.save(tmp_path, put, FACTS)
    got, facts = reconstructions.load(path)
    for name in ("examples", "views", "labels", "scores"):
        assert torch.equal(getattr(got, name), getattr(put, name))
    assert (got.cost, got.receipts, facts) == (put.cost, put.receipts, FACTS)


def test_no_labels_and_no_scores_come_back_as_none(tmp_path):
    got, _ = reconstructions.load(reconstructions.save(tmp_path, some(), FACTS))
    assert got.labels is None
    assert got.scores is None


def test_an_attack_that_found_nothing_is_saved_without_a_picture(tmp_path):
    path = reconstructions.save(tmp_path, some(0), FACTS)
    assert len(reconstructions.load(path)[0].examples) == 0
    assert not path.with_suffix(".png").exists()


def test_the_sheet_shows_the_surest_candidate_first(tmp_path):
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    put = Reconstruction(images, torch.zeros(2, dtype=torch.int64), scores=torch.tensor([0.0, 1.0]))
    path = reconstructions.save(tmp_path, put, FACTS)
    picture = Image.open(path.with_suffix(".png"))
    assert picture.getpixel((0, 0)) == 255
    assert picture.getpixel((picture.width - 1, 0)) == 0


def test_png_clamps_and_paints_what_is_no_number_black():
    image = torch.tensor([[[2.0, -1.0, float("nan")]]]).expand(3, 1, 3)
    picture = Image.open(io.BytesIO(reconstructions.png(image)))
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (0,) * 3, (0,) * 3]


def test_different_expressions_have_different_slugs():
    slugs = [reconstructions.slug(e) for e in ("dlg", "dlg(steps=1)", "dlg(steps=-1)", "DLG")]
    assert slugs[0] == "dlg"
    assert len(set(slugs)) == 4
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for s in slugs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"examples": torch.zeros(5, 64)}, r"must be \[M, C, H, W\]"),
        ({"views": torch.zeros(4, dtype=torch.int64)}, r"views must be \[5\]"),
        ({"views": torch.full((5,), 2)}, "views outside the 2 there are"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"labels must be \[5\]"),
    ],
)
def test_a_malformed_reconstruction_is_refused(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        reconstructions.save(tmp_path / "new", some(**wrong), FACTS)
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_no_reconstruction_says_so(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ScenarioError, match="not readable"):
        reconstructions.load(tmp_path / "x.safetensors")
