"""How each attack is run in ``leak_by_clients.py``, and what its law expects.

Small on purpose: eight images a client and four bins for each, an ``mlp`` of 16 units where an
attack brings its own layer.  ``{clients}`` in an expression stands for how many uploads are summed,
``{images}`` for a client's images, ``{together}`` for those of the whole sum.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim import registry
from fedsim.attack import Active
from strategies.attacks.analytic.isolation.loki import expected_share
from strategies.attacks.analytic.isolation.trap import expected_recall, firing_rate, tuned_scale

CLIENTS, STEPS = (2, 8, 32), (1, 2, 8, 32)
# Federations at 2, 8 and 32 clients that hold the same images, and half as many at 2.
SAME, FEWER = (16, 4, 1), (8, 4, 1)
Law = Callable[[int, Tensor], float]


@dataclass(frozen=True)
class Setting:
    """One cell: an attack at so many clients, or after so many local steps.

    ``holders`` clients hold ``images`` each; ``target`` is the one whose images are judged, or None
    for all of them.
    """

    name: str
    axis: str
    point: int
    attack: str
    threat: str
    channel: str
    local: str
    model: str
    defenses: str
    rounds: int
    holders: int
    images: int
    target: int | None
    federations: int

    def flat(self) -> dict[str, str | int]:
        """Return the scenario, but for the data."""
        return {
            "threat-model": self.threat,
            "attack": self.attack,
            "channel": self.channel,
            "defenses": self.defenses,
            "model.name": self.model,
            "model.batchnorm": "private" if "norm='batch'" in self.model else "frozen",
            "federation.local": self.local,
            "federation.clients": self.holders,
            "federation.rounds": self.rounds,
        }

    def judges(self, client: int) -> bool:
        """Say whether this client's images count."""
        return self.target is None or client == self.target


@dataclass(frozen=True)
class Setup:
    """How one attack is run along one axis.

    ``law`` gives the expected share of images at a point, from that and images of the attacker's
    own ``[S, D]``; ``criterion`` is the PSNR (dB) from which an image counts as leaked; ``why``
    says in a sentence what the figures do, ``label`` what sets this row apart from another one of
    the same attack.
    """

    attack: str
    why: str
    label: str = ""
    axis: str = "clients"
    threat: str = "G"
    channel: str = "secagg(max_weight={images})"
    local: str = "fedsgd(batch_size={images}, lr=0.1)"
    model: str = "mlp(hidden=[16])"
    defenses: str = "none"
    rounds: int = 1
    holders: int | None = None
    images: int = 8
    target: int | None = None
    federations: tuple[int, ...] = FEWER
    criterion: float = 20.0
    law: Law | None = None

    @property
    def name(self) -> str:
        """The attack's."""
        return self.attack.partition("(")[0]

    @property
    def shown(self) -> str:
        """The row's name."""
        return f"{self.name}, {self.label}" if self.label else self.name

    def at(self, point: int) -> Setting:
        """Return the cell at so many clients or local steps."""
        summed = self.axis == "clients"
        holders = self.holders or point
        known = {
            "clients": point if summed else holders,
            "images": self.images,
            "together": point * self.images,
            # So many steps of equal batches: one epoch of them, or more where images do not do.
            "batch": max(self.images // point, 1),
            "epochs": max(point // self.images, 1),
        }
        texts = ("attack", "channel", "local", "defenses")
        filled = {text: _filled(getattr(self, text), known) for text in texts}
        at = (CLIENTS if summed else STEPS).index(point)
        return Setting(
            name=self.name,
            axis=self.axis,
            point=point,
            threat=self.threat,
            model=self.model,
            rounds=self.rounds,
            holders=holders,
            images=self.images,
            target=self.target,
            federations=self.federations[at],
            **filled,
        )


def _filled(text: str, known: dict[str, int]) -> str:
    for name, value in known.items():
        text = text.replace("{" + name + "}", str(value))
    return text


# -- laws ------------------------------------------------------------------------------------------
def alone_in_sum(units: int, images: int) -> Law:
    """Alone in one of ``units`` bins of all clients' images."""
    return lambda clients, _: float((1 - 1 / units) ** (clients * images - 1))


def alone_at_home(units: int, images: int) -> Law:
    """Alone in one of ``units`` bins of one client's images."""
    return lambda _, __: float((1 - 1 / units) ** (images - 1))


def pushed_out(units: int, images: int, steps: int | None = None) -> Law:
    """First in a bin of one client, and alone in its step; ``steps``, or what is on the axis."""
    return lambda point, _: expected_share(units, images, steps or point, push_out=True)


def trapped(units: int, images: int | None = None) -> Law:
    """Alone in one of ``units`` rows with the best traps for so many images, or 8 a client."""

    def recall(point: int, own: Tensor) -> float:
        together = images or 8 * point
        rates = firing_rate(own, tuned_scale(own, units, together))
        return expected_recall(rates, units, together)

    return recall


# -- behind SecAgg+, by clients --------------------------------------------------------------------
SUMMED = (
    Setup(
        "robbing-the-fed(units=32)",
        "All clients share the bins: who is alone at home is not alone in the sum.",
        federations=SAME,
        law=alone_in_sum(32, 8),
    ),
    Setup(
        "robbing-the-fed(units=32)",
        "The same runs: images that are alone in a bin come back but for rounding; at 20 dB "
        "mixtures that one image dominates count too.",
        label="exact",
        federations=SAME,
        criterion=50.0,
        law=alone_in_sum(32, 8),
    ),
    Setup(
        "loki(units=32, bins='empirical')",
        "Bins of its own for each client: the sum takes nothing away. Two local steps.",
        local="fedavg(epochs=1, batch_size=4, lr=0.005)",
        federations=SAME,
        law=pushed_out(32, 8, steps=2),
    ),
    Setup(
        "sparse-linear-layer(units=32, bins='empirical')",
        "Bins of its own for each client, one step.",
        federations=SAME,
        law=alone_at_home(32, 8),
    ),
    Setup(
        "model-inconsistency(then='robbing-the-fed(units=32)')",
        "All others' models are dead: the share is of the target's images, whose bins are its own, "
        "eight a sum.",
        target=0,
        federations=(8, 4, 3),
        law=alone_at_home(32, 8),
    ),
    Setup(
        "curious-abandon-honesty(together={together})",
        "A trap is of use if one image of the whole sum falls into it: 256 rows are few for 256 "
        "images. The law knows who is alone in a row; reading it wants two rows that agree.",
        model="mlp(hidden=[256])",
        law=trapped(256),
    ),
    Setup(
        "scale-mia(epochs=20)",
        "All clients share 256 bins, and of the codes that are alone the decoder, trained on 1,000 "
        "images, shows most at 18 dB, as it does mixtures of codes that are alike; the law counts "
        "the codes that are alone.",
        model="cnn(hidden=[256, 64])",
        federations=(3, 1, 1),
        criterion=18.0,
        law=alone_in_sum(256, 8),
    ),
    Setup(
        "seer(mode='thresh', clients={clients}, steps=0)",
        "One image of a sum at best, if just one is above the threshold: no more than a guess "
        "at this size. The start alone, which its training does not improve here.",
        model="convnet(width=16, stride=2, norm='batch', hidden=[16])",
        images=16,
        rounds=4,
        federations=(4, 1, 1),
        criterion=18.0,
    ),
    Setup(
        "cocktail-party",
        "A sum of 4 images a client is one mixture of 8, 32 or 128, told apart by their statistics "
        "alone: the more there are, the less they stand out, and 256 units is all it has.",
        threat="B",
        model="mlp(hidden=[256])",
        images=4,
        federations=(8, 2, 1),
    ),
    Setup(
        "sybil-sa-dp(cohort={clients})",
        "The sum is of one client and its sybils, so that more of them hide nothing; each client's "
        "share of the noise (sigma = 0.01 of the clipping norm for the cohort) gets smaller.",
        threat="H",
        channel="secagg(max_weight=1)",
        local="fedsgd(batch_size=1, lr=0.1)",
        model="mlp(hidden=[64])",
        defenses="distributed-dp(norm=1.0, sigma=0.01, cohort={clients})",
        rounds=8,
        holders=8,
        images=1,
        federations=(1, 1, 1),
    ),
    Setup(
        "secagg-unmasking(then='linear-inversion')",
        "It takes every single upload out of the protocol: there is no sum. One image a client.",
        threat="F",
        images=1,
        law=lambda *_: 1.0,
    ),
)

# -- FedAvg, by local steps ------------------------------------------------------------------------
_TWO = {"axis": "steps", "channel": "plain", "holders": 2, "federations": (2, 2, 2, 2)}
_AVERAGED: dict[str, Any] = {
    **_TWO,
    "images": 32,
    "local": "fedavg(epochs={epochs}, batch_size={batch}, lr=0.0001)",
}
_FASTER = {"local": "fedavg(epochs={epochs}, batch_size={batch}, lr=0.01)"}
STEPPED = (
    Setup(
        "robbing-the-fed(units=128, variant='sparse')",
        "The first image of a bin pushes its unit out of all others' range, so that more steps "
        "leave fewer collisions.",
        law=pushed_out(128, 32),
        **_AVERAGED,
    ),
    Setup(
        "loki(units=128, bins='empirical')",
        "The same push-out, by the kernels' scale.",
        law=pushed_out(128, 32),
        **_AVERAGED,
    ),
    Setup(
        "loki(units=128, bins='empirical')",
        "A hundred times the rate of LOKI's demonstration: the scale is worked out on the model as "
        "sent, and at this rate the model behind the blocks trains on.",
        label="rate 0.01",
        law=pushed_out(128, 32),
        **_AVERAGED | _FASTER,
    ),
    Setup(
        "model-inconsistency(then=\"robbing-the-fed(units=128, variant='sparse')\")",
        "Dead models stay dead while clients train; the share is of the target's images, in a sum "
        "of two.",
        law=pushed_out(128, 32),
        target=0,
        **_AVERAGED | {"channel": "trusted-sum"},
    ),
    Setup(
        "curious-abandon-honesty(together=32)",
        "A row that one image moves stays that image's; the layers behind it train on.",
        model="mlp(hidden=[256])",
        law=trapped(256, 32),
        **_AVERAGED | _FASTER,
    ),
    Setup(
        "scale-mia(epochs=20)",
        "Equal rows drift apart, and the encoder moves under its decoder; from the second step on "
        "codes are mixed.",
        model="cnn(hidden=[256, 64])",
        criterion=18.0,
        law=lambda *_: (1 - 1 / 256) ** 31,
        **_AVERAGED | _FASTER | {"federations": (1, 1, 1, 1)},
    ),
    Setup(
        "cocktail-party",
        "Mixtures of the same eight images, whatever the steps.",
        threat="B",
        model="mlp(hidden=[256])",
        **_AVERAGED | _FASTER | {"images": 8, "federations": (1, 1, 1, 1)},
    ),
    Setup(
        "secagg-unmasking(then='linear-inversion')",
        "The upload that it unmasks is a multiple of one image's gradient after any number of "
        "steps. One image a client.",
        threat="F",
        **_AVERAGED | _FASTER | {"images": 1, "channel": "secagg(max_weight=1)"},
    ),
)


def behind_secagg() -> set[str]:
    """Return the attacks that a scenario of ``scenarios/`` puts behind ``secagg``."""
    names = set()
    for file in sorted((Path(__file__).parents[2] / "scenarios").glob("*.toml")):
        told = tomllib.loads(file.read_text())
        if str(told.get("channel", "plain")).startswith("secagg") and "attack" in told:
            names.add(registry.parse(told["attack"], "attack")[0].name)
    return {name for name in names if not registry.components("attack")[name].asks}


def by_steps() -> list[Setup]:
    """Return the settings of every active attack with FedAvg; many refuse, and say why."""
    known = {setup.name for setup in STEPPED}
    others = [
        replace(Setup(name, "", threat="H"), **_AVERAGED)
        for name, kind in sorted(registry.components("attack").items())
        if issubclass(kind, Active) and name not in known and not kind.asks
    ]
    return [*STEPPED, *others]
