"""``report.json``: what a run proved, as data.

Versioned by ``schema``.  Every float is finite; where there is no figure there is null and, beside
it, a reason.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Summary(_Part):
    """One metric over all matched images."""

    mean: FiniteFloat
    median: FiniteFloat
    min: FiniteFloat
    max: FiniteFloat


class Guess(_Part):
    """One way of guessing without the updates: its mean PSNR (dB) and leak rate."""

    name: str
    psnr: FiniteFloat
    leak_rate: FiniteFloat


class CurvePoint(_Part):
    """Share of all private images that came back at this PSNR (dB) or better."""

    psnr: FiniteFloat
    leak_rate: FiniteFloat
    floor: FiniteFloat | None = None


class Floor(_Part):
    """What an attacker gets who never looks at the updates: the best of ``guesses``."""

    guess: str
    leaked: int
    leak_rate: FiniteFloat
    psnr: Summary
    ssim: Summary
    mse: Summary
    lpips: Summary | None = None
    guesses: list[Guess]


class Leak(_Part):
    """How much came back.

    ``private_examples`` images were behind the views, ``reconstructed`` candidates were returned,
    ``matched`` images got a candidate, ``leaked`` of them meet ``criterion``; ``interval`` is the
    95 % Wilson interval of ``leak_rate``.  Metrics are over matched images.
    """

    private_examples: int
    reconstructed: int
    matched: int
    leaked: int
    exact: int = Field(description="images within rounding of the original: MSE below 1e-10")
    leak_rate: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]
    criterion: str
    psnr_limit: FiniteFloat | None = Field(None, description="the criterion's PSNR (dB), if any")
    psnr: Summary
    ssim: Summary
    mse: Summary
    lpips: Summary | None = None
    lpips_reason: str | None = None
    label_accuracy: FiniteFloat | None = None
    label_accuracy_reason: str | None = None
    floor: Floor | None = None
    floor_reason: str | None = None
    curve: list[CurvePoint]


class Membership(_Part):
    """How often an attack was right about who has an image that it holds.

    Of ``asked`` cases the image was there in ``present``; the attack said so in ``found`` of them,
    and in ``alarms`` of the others.  ``guess`` is the accuracy of the commoner answer, always.
    """

    asked: int
    present: int
    found: int
    alarms: int
    accuracy: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat] = Field(description="95 % Wilson, of the accuracy")
    precision: FiniteFloat | None = Field(None, description="null where it never said so")
    recall: FiniteFloat | None = Field(None, description="null where the image was never there")
    guess: FiniteFloat


class Example(_Part):
    """One private image and the candidate matched to it, if any (``match`` is its position)."""

    client: int
    round: int
    index: int
    label: int
    label_recovered: int | None = None
    match: int | None = None
    psnr: FiniteFloat | None = None
    ssim: FiniteFloat | None = None
    mse: FiniteFloat | None = None
    lpips: FiniteFloat | None = None
    leaked: bool = False


class ThreatModel(_Part):
    """Which adversary this was; ``used`` and ``oracles`` are what the attack really asked for."""

    letter: str
    name: str
    granted: list[str]
    used: list[str]
    oracles: list[str]


class Failure(_Part):
    """A client that did not answer as it should have; or refused to."""

    round: int | None = None
    client: int | None = None
    reason: str
    refused: bool = False


class Refusals(_Part):
    """How many clients were asked in a round, and how many of them refused."""

    round: int
    asked: int
    refused: int


class Accuracy(_Part):
    """Share of held-out images classified right; ``baseline_after`` without attack and defenses."""

    before: FiniteFloat | None = None
    after: FiniteFloat | None = None
    baseline_after: FiniteFloat | None = None


class FederationPart(_Part):
    """What the federation did and what it cost; null where a figure was never taken."""

    engine: str | None = None
    clients: int | None = None
    rounds: int | None = None
    rounds_done: int | None = None
    seconds: FiniteFloat | None = None
    round_seconds: list[FiniteFloat] = []
    failures: list[Failure] = []
    refusals: list[Refusals] = []
    bytes_up: int | None = None
    bytes_down: int | None = None
    accuracy: Accuracy = Accuracy()
    receipts: list[str] = []
    channel: dict[str, Any] = {}


class Sent(_Part):
    """What clients were sent in the last round, beside the honest model that it was made from.

    Accuracies are on the hold-out, ``accuracy`` the mean over ``models_measured`` models: the one
    that all clients got, or those of the first few clients; sizes are the largest that one got.
    """

    accuracy: FiniteFloat | None = None
    honest_accuracy: FiniteFloat | None = None
    models_measured: int
    parameters: int
    honest_parameters: int
    bytes: int
    honest_bytes: int


class AttackPart(_Part):
    """Which attack, what it cost, and what it says it did."""

    expression: str
    name: str
    paper: str
    seconds: FiniteFloat | None
    gradient_evaluations: int | None
    parameters_added: int
    bytes_added: int
    sent: Sent | None = Field(None, description="of a manipulation")
    receipts: list[str]
    reconstruction: str | None = Field(
        description="the file under reconstructions/; null where clients refused and left nothing "
        "to reconstruct from"
    )
    aggregated: bool = Field(description="the server saw sums over several clients only")


class DefenseReceipts(_Part):
    """What a defense really did to the uploads; means over the uploads it touched."""

    uploads_changed: str
    cosine: FiniteFloat | None = None
    norm_ratio: FiniteFloat | None = None
    seconds: FiniteFloat | None = None
    figures: dict[str, FiniteFloat] = {}


class Epsilon(_Part):
    """A formal guarantee: ``epsilon`` is null where the mechanism gives none.

    ``withheld`` says what happened in the run that the promise did not count on: there is no
    epsilon then.
    """

    epsilon: FiniteFloat | None = None
    delta: FiniteFloat | None = None
    unit: str = ""
    relation: str = ""
    mechanism: str = ""
    withheld: str = ""


class Spent(_Part):
    """What one client spent: epsilon of all its releases up to its last deposit, in ``round``.

    ``releases`` counts mechanisms; ``epsilon`` is null where there is none that is finite.
    ``reconstruction`` bounds the probability of being right about a unit's data, for who would be
    right once in ten without the releases (``GUESS``); null in reports from before it was told.
    """

    client: int
    round: int
    releases: int
    epsilon: FiniteFloat | None = None
    reconstruction: Annotated[float, Field(ge=0, le=1)] | None = None


class DefensePart(_Part):
    """One defense of the chain.

    ``epsilon`` is what was promised before the run; ``spent`` what each client's ledger holds,
    the most first.  ``server`` is what the defense had the server do, where it has a part there.
    """

    name: str
    parameters: dict[str, Any] = {}
    receipts: DefenseReceipts | None = None
    epsilon: Epsilon | None = None
    spent: list[Spent] = []
    server: dict[str, FiniteFloat] | None = None


class Detection(_Part):
    """What one client thought of the model it was sent, or of what it was asked."""

    client: int
    round: int
    checks: dict[str, FiniteFloat] = {}
    verdict: str = ""


class Report(_Part):
    """Everything the page shows; ``verdict`` is its first sentence.

    ``failed`` says why the run must not be believed, ``stopped`` where it ended before its time,
    ``notes`` what a reader should know before quoting a figure.
    """

    schema_: Literal["fedsim-report/1"] = Field(default="fedsim-report/1", alias="schema")
    title: str
    run: str
    verdict: str
    failed: str | None = None
    stopped: str | None = None
    notes: list[str] = []
    scenario: dict[str, Any]
    threat_model: ThreatModel
    federation: FederationPart
    attack: AttackPart | None = None
    defenses: list[DefensePart] = []
    detection: list[Detection] = []
    leak: Leak | None = None
    leak_reason: str | None = None
    membership: Membership | None = None
    examples: list[Example] = []
    classes: list[str] = []
    environment: dict[str, Any] = {}
