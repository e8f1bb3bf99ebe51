"""What a test asks of a run of Fishing: the answers, and the truth beside them."""

import torch
from torch import Tensor, nn

from fedsim import reconstructions
from fedsim.attack import Reconstruction
from fedsim.data import Split
from fedsim.models import build_model, load_arrays
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.sparsification.fishing_heads import Answer
from strategies.attacks.labels.rule import classifier
from tests.fedsim.small import Ran


def knowing(ran: Ran) -> Knowledge:
    counts = {view.label: view.num_examples for view in ran.views}
    details = ran.parts.local.details()
    device = torch.device("cpu")
    return Knowledge(
        "F", data=ran.parts.spec, training=details, seed=1, device=device, num_examples=counts
    )


def answers(ran: Ran) -> list[Answer]:
    name, _ = classifier(ran.parts.model())
    return [Answer.read(view, name, knowing(ran), at) for at, view in enumerate(ran.views)]


def truth(ran: Ran, view: ServerView) -> Split:
    (client,) = view.senders
    record = ran.vault.record(client, view.round)
    assert record is not None
    return Split(record.examples, record.labels)


def on_its_model(ran: Ran, view: ServerView, batch: Split) -> dict[str, Tensor]:
    """Return the mean gradient of a batch on the model that a view is of, in float64."""
    model = build_model(view.model, ran.parts.spec).double()
    load_arrays(model, {name: tensor.double() for name, tensor in view.sent.items()})
    images, labels = batch.batch(torch.arange(len(batch)), torch.float64)
    nn.functional.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def features(ran: Ran, view: ServerView, batch: Split) -> Tensor:
    """Return what the head gets, ``[B, D]``."""
    model = build_model(view.model, ran.parts.spec).double()
    load_arrays(model, {name: tensor.double() for name, tensor in view.sent.items()})
    seen: list[Tensor] = []
    classifier(model)[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch.batch(torch.arange(len(batch)), torch.float64)[0])
    return seen[0].detach()


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[n].double().flatten() for n in sorted(one)]) for g in (one, other))
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def without_head(gradient: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: g for n, g in gradient.items() if not n.startswith(name)}


def found(ran: Ran) -> Reconstruction:
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    return reconstructions.load(path)[0]
