"""The canary: a kernel that fires for one image alone, so that a sum tells whether it was there.

Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated Learning via Model
Inconsistency", CCS 2022, the canary attack.  A test of membership: the server holds the image x
and asks whether the target trains on it; nothing is reconstructed.

The server trains theta on data of its own so that one kernel of the last hidden layer is positive
for x and below zero for all else.  Behind its ReLU, with ``kappa`` the kernel's pre-activation,

    dL/dw = sum_j relu'(kappa_j) (p_j - y_j)^T W_L[:, kernel] h_j

is exactly zero without x, and of a size that the server can work out with it.  All others get the
same model with that kernel dead (inconsistency, as in gradient suppression), so that it is the
target's data that a securely aggregated sum tells about.

*Training*: Adam on the binary cross-entropy of ``max kappa`` over positions, x in every batch,
weighted ``5 (batch - 1)`` as the authors'.  Half of the others are those that came nearest.

*Afterwards* (ours): the kernel's zero is put between x and the nearest of the server's images,
nearer to x, and kernel and last layer are scaled so that x alone moves the logits, by 1 up or down,
while its gradient is ``gain`` times as large: what nobody else has, nobody else feels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fedsim.attack import Manipulation, ModelToSend, Paper, Reconstruction, Setting, ToyCase
from fedsim.errors import RunFailed
from fedsim.models import build_model, load_arrays, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.sparsification import probing
from strategies.attacks.analytic.sparsification.model_inconsistency import Inconsistent
from strategies.attacks.labels.rule import classifier

# Whatever has rows and biases, one for each kernel.
Hidden = nn.Linear
Client = Annotated[int, Field(ge=0)]
# The kernel that is the canary.
KERNEL = 0
# How far below the target's bias the others' lies, where the image's own kappa is 1 / gain.
DEPTH = 1.0
# A bias that alone decides whether a kernel fires.
FAR = 1e4
# The authors' weight of x in a batch, in negatives.
POSITIVE = 5.0
# At this loss of a batch training ends.
ENOUGH = 0.02
RATE = 3e-3
# Where the kernel's zero is put between the nearest of the server's own images (0) and x (1): x
# comes back to the bit, and what else comes near is not it.
ZERO = 0.9


@register("attack", "model-inconsistency-canary")
@dataclass(frozen=True, kw_only=True)
class Canary(Manipulation):
    """Ask whether an image that the server holds is among the target's data.

    Threat model G, with a model for each client.  Adds no parameter.  ``data.known`` names the
    images; round r asks about the one whose turn it is.

    Parameters
    ----------
    targets : list of int
        Whose data to ask about in rounds 1, 2, ..., and from the first again; ``[]`` gives
        everybody the canary and asks whether anybody behind a view has the image.
    steps : int
        Of training, for each image, at the most.
    batch : int
        Images in a step.
    gain : float
        How many times larger to make the image's gradient; against rounding.  With local training
        it also moves the kernel, and 10 is enough.

    Fails where the last hidden layer is not followed by a ReLU, with weight decay, where an image
    of the clients lies nearer to x than all of the server's own, and where clients compare the
    models that they got.
    """

    paper: ClassVar[Paper] = Paper(
        title="Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
        authors="Dario Pasquini, Danilo Francati, Giuseppe Ateniese",
        venue="CCS",
        year=2022,
        published="accuracy, precision and recall of 100 %: CIFAR-10 target, CIFAR-100 as the "
        "server's data, ResNet-20 with LayerNorm, batches of 64 (the authors' notebooks)",
        measured="always right, where the commoner answer would be in 75 %: 24 rounds of CIFAR-10 "
        "behind SecAgg+ with 8 clients, batches of 64, two of four images another client's; 5,000 "
        "CIFAR-10 images as the server's data, convnet (pytest -s -m slow "
        "tests/strategies/sparsification/test_canary.py).  12 of 12 rounds, 24 clients, tiles "
        "(fedsim run scenarios/model_inconsistency_canary_secagg.toml)",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {
            Capability.UPDATES,
            Capability.BASICS,
            Capability.DETAILS,
            Capability.SURROGATE,
            Capability.MANIPULATION,
        }
    )
    asks: ClassVar[bool] = True
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "G",
            "attack": "model-inconsistency-canary",
            "channel": "secagg",
            "data.dataset": "digits",
            "data.known": "2, 11",
            "model.name": "mlp(hidden=[64, 64])",
            "federation.clients": 4,
            "federation.rounds": 4,
            "federation.local": "fedsgd(batch_size=361, lr=0.1)",
        },
        figure="membership.accuracy",
        low=0.9,
        high=1.0,
    )

    targets: list[Client] | tuple[Client, ...] = (0,)
    steps: Annotated[int, Field(gt=0)] = 2000
    batch: Annotated[int, Field(gt=1)] = 64
    gain: Annotated[float, Field(gt=0)] = 100.0

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse a model of which no kernel can be silenced."""
        model = copy.deepcopy(model).eval()
        head, layer = classifier(model)[1], self.layer(model)
        images, _ = probing.noise(model)
        columns = columns_of(model, layer, head)
        for bias in (-FAR, FAR):
            with torch.no_grad():
                layer.bias[KERNEL] = bias
                kappa = run(model, layer, images)[:, KERNEL].reshape(len(images), -1)
            if not torch.equal(probing.features(model, head)[:, columns], kappa.relu()):
                raise ValueError(
                    "the canary wants a last hidden layer of which the last one reads nothing but "
                    "the ReLU (no shortcut, no pooling); use mlp(hidden=[64, 64]) or convnet"
                )

    def layer(self, model: nn.Module) -> Hidden:
        """Return the last hidden layer.

        Raises
        ------
        ValueError
            If there is none with a bias.
        """
        name = probing.last_hidden(model, classifier(model)[0])
        if name is None:
            raise ValueError(
                "the canary wants a hidden layer with a bias; use mlp(hidden=[128]) or convnet"
            )
        return cast(Hidden, model.get_submodule(name))

    def target(self, server_round: int) -> int | None:
        """Return whom a round asks about; None for anybody."""
        return self.targets[(server_round - 1) % len(self.targets)] if self.targets else None

    def check_setting(self, setting: Setting) -> None:
        """Refuse targets that are not there, and weight decay."""
        if absent := sorted(target for target in self.targets if target >= setting.clients):
            raise ValueError(
                f"target {absent[0]} is none of the {setting.clients} clients, 0 and up"
            )
        if setting.training.weight_decay:
            raise ValueError(
                "weight decay moves kernels that have no gradient; use "
                "federation.local = 'fedavg(weight_decay=0.0, ...)'"
            )

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Train the canary of the image whose turn it is, or take it from an earlier round.

        Raises
        ------
        RunFailed
            If no kernel can be made to tell the image from the server's own.
        """
        # Every target is asked about an image before the next one's turn comes.
        rounds = len({view.round for view in knowledge.history})
        turn = rounds // max(1, len(self.targets)) % len(knowledge.known)
        for view in knowledge.history:
            asked, live = self.asked(view, knowledge)
            if asked == turn:
                return self._with_dead(ModelToSend(expression, live), knowledge)
        model = build_model(expression, knowledge.basics.data)
        load_arrays(model, arrays)
        model = model.to(next(iter(arrays.values())).dtype).eval().to(knowledge.device)
        image = knowledge.known[turn][None].to(next(model.parameters()))
        self._train(model, image, knowledge)
        self._set_zero(model, image, knowledge)
        self._scale(model, image)
        trained = {name: value.cpu() for name, value in travelling(model).items()}
        return self._with_dead(ModelToSend(expression, trained), knowledge)

    def _train(self, model: nn.Module, image: Tensor, knowledge: Knowledge) -> None:
        """Make the kernel fire for the image and for none of the server's own."""
        layer, shadow = self.layer(model), knowledge.surrogate
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        generator = knowledge.generator("canary")
        others = self.batch - 1
        truth = torch.zeros(self.batch).to(image)
        truth[0] = 1.0
        weight = torch.where(truth > 0, POSITIVE * others, 1.0)
        nearness = torch.zeros(len(shadow))
        for step in range(self.steps):
            drawn = torch.randint(len(shadow), (others,), generator=generator)
            nearest = nearness.topk(min(others // 2, len(shadow))).indices
            drawn[: len(nearest)] = nearest
            images = shadow.batch(drawn, image.dtype)[0].to(image.device)
            kappa = activations(model, layer, torch.cat([image, images]))
            loss = binary_cross_entropy_with_logits(kappa, truth, weight)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            nearness[drawn] = kappa[1:].detach().float().cpu()
            if loss.item() < ENOUGH:
                return
            knowledge.progress(step + 1, self.steps, f"canary: loss {loss.item():.2g}")

    def _set_zero(self, model: nn.Module, image: Tensor, knowledge: Knowledge) -> None:
        """Put the kernel's zero between the image and the nearest of the server's own."""
        layer, shadow = self.layer(model), knowledge.surrogate
        with torch.no_grad():
            own = activations(model, layer, image).max()
            nearest = torch.stack(
                [
                    activations(
                        model, layer, shadow.batch(places, image.dtype)[0].to(image.device)
                    ).max()
                    for places in torch.split(torch.arange(len(shadow)), 512)
                ]
            ).max()
            if not own > nearest:
                raise RunFailed(
                    f"model-inconsistency-canary: after {self.steps} steps an image of the "
                    "server's own still looks more like the one asked about; use more steps"
                )
            layer.bias[KERNEL] -= nearest + ZERO * (own - nearest)

    def _scale(self, model: nn.Module, image: Tensor) -> None:
        """Let the image move logits by 1, up and down by turns, with an output of ``1 / gain``."""
        head, layer = classifier(model)[1], self.layer(model)
        with torch.no_grad():
            columns = columns_of(model, layer, head)
            own = run(model, layer, image)[0, KERNEL].relu().sum()
            factor = 1 / (self.gain * own)
            layer.weight[KERNEL] *= factor
            layer.bias[KERNEL] *= factor
            signs = 1.0 - 2.0 * (torch.arange(head.out_features) % 2)
            head.weight[:, columns] = self.gain * signs.to(head.weight)[:, None]

    def _with_dead(self, live: ModelToSend, knowledge: Knowledge) -> Inconsistent:
        model = build_model(live.expression, knowledge.basics.data)
        name = f"{probing.last_hidden(model, classifier(model)[0])}.bias"
        dead = live.arrays[name].clone()
        dead[KERNEL] -= DEPTH
        return Inconsistent(live.expression, live.arrays, dead={name: dead})

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        """Give the target the canary, and all others a dead one."""
        if not isinstance(sent, Inconsistent) or self.target(server_round) in (None, client):
            return sent
        return replace(sent, arrays={**sent.arrays, **sent.dead})

    # -- what is read ----------------------------------------------------------------------------
    def asked(self, view: ServerView, knowledge: Knowledge) -> tuple[int, dict[str, Tensor]]:
        """Return which image a view asks about, and its live canary; -1 where it fires for none."""
        model = knowledge.model(view).eval()
        layer = self.layer(model)
        images = torch.stack(knowledge.known).to(next(model.parameters()))
        with torch.no_grad():
            if not (activations(model, layer, images) > 0).any():
                layer.bias[KERNEL] += DEPTH
            kappa = activations(model, layer, images)
        arrays = {name: value.cpu() for name, value in travelling(model).items()}
        return int(kappa.argmax()) if bool((kappa > 0).any()) else -1, arrays

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Say of every view of a target whether the image was there.

        Raises
        ------
        ValueError
            If no target sent anything.
        """
        places, images, scores, whose, receipts = [], [], [], [], []
        for index, view in enumerate(views):
            target = self.target(view.round)
            if target is not None and target not in view.senders:
                continue
            turn, live = self.asked(view, knowledge)
            if turn < 0:
                raise ValueError(f"{view.label} holds no canary of an image that is known")
            moved, least = self.moved(view, live, knowledge.known[turn], knowledge)
            places.append(index)
            images.append(knowledge.known[turn])
            scores.append(moved / least)
            whose.append(-1 if target is None else target)
            receipts.append(
                f"{view.label}: image {turn} would move the canary by {least:.3g} at least, and "
                f"it moved by {moved:.3g}"
            )
        if not places:
            raise ValueError(f"none of the targets {list(self.targets)} sent anything")
        certainty = torch.tensor(scores)
        return Reconstruction(
            examples=torch.stack(images).float(),
            views=torch.tensor(places),
            present=certainty > 0.5,
            whose=torch.tensor(whose),
            scores=(certainty - 0.5).abs(),
            receipts=tuple(receipts),
        )

    def moved(
        self, view: ServerView, live: dict[str, Tensor], image: Tensor, knowledge: Knowledge
    ) -> tuple[float, float]:
        """Return how far the canary moved, and how far the image moves it whatever its label is.

        Both are norms of one example's gradient: of the sum over a view's examples, and, of local
        training, divided by the rate, which is more than one example's where clients hold more
        than a batch.
        """
        model = knowledge.model(view).eval()
        load_arrays(model, live)
        layer = self.layer(model)
        name = f"{probing.last_hidden(model, classifier(model)[0])}.weight"
        update = view.update()[name][KERNEL].double() * knowledge.num_examples(view)
        if view.kind == "weights":
            update = update / knowledge.training.lr
        logits = model(image[None].to(next(model.parameters())))
        norms = []
        for label in range(logits.shape[1]):
            loss = cross_entropy(logits, torch.tensor([label], device=logits.device))
            (gradient,) = torch.autograd.grad(loss, [layer.weight], retain_graph=True)
            norms.append(float(gradient[KERNEL].double().norm()))
        return float(update.norm()), min(norms)


def activations(model: nn.Module, layer: Hidden, images: Tensor) -> Tensor:
    """Return ``max kappa`` over positions for ``[N, C, H, W]``, ``[N]``."""
    return run(model, layer, images)[:, KERNEL].reshape(len(images), -1).amax(dim=1)


def run(model: nn.Module, layer: Hidden, images: Tensor) -> Tensor:
    """Return what a layer gives, ``[N, U, ...]``."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *called: seen.append(called[2]))
    model(images)
    handle.remove()
    return seen[0]


def columns_of(model: nn.Module, layer: Hidden, head: nn.Linear) -> Tensor:
    """Return which inputs of the last layer are the kernel's, ``[D]`` bool."""
    kept, seen = layer.bias[KERNEL].clone(), []
    with torch.no_grad():
        for bias in (-FAR, FAR):
            layer.bias[KERNEL] = bias
            seen.append(probing.features(model, head))
        layer.bias[KERNEL] = kept
    return (seen[0] != seen[1]).any(dim=0)
