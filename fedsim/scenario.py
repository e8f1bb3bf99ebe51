"""A scenario: one TOML file that says everything about a run, validated whole before it starts.

Every key is also declared with its default in ``[tool.flwr.app.config]`` of ``pyproject.toml``,
so that plain ``flwr run . --run-config FILE`` takes the file as it is.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsim import wanted
from fedsim.errors import ScenarioError
from fedsim.registry import Expression, nearest, parse

# Keys whose value is an expression: `attack.iterations=50` changes one argument of it.
EXPRESSIONS = (
    "attack",
    "defenses",
    "channel",
    "federation.strategy",
    "federation.local",
    "data.dataset",
    "data.partition",
    "model.name",
)


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=_kebab, allow_inf_nan=False
    )


class FederationTable(_Table):
    """``[federation]``: who trains, how often and how."""

    clients: int = Field(4, ge=1, description="Participants, each with a partition of its own.")
    rounds: int = Field(1, ge=1, description="Server rounds.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients in each round.")
    strategy: str = Field("fedavg", description="Any Flower strategy: `fedadam(eta=0.01)`.")
    local: str = Field(
        "fedsgd(batch_size=8, lr=0.1)",
        description="What a client does in a round: `fedsgd(...)` uploads one batch's gradient, "
        "`fedavg(epochs=, batch_size=, lr=)` uploads weights after local training.",
    )
    timeout: float = Field(
        600.0, gt=0, le=31_536_000, description="Seconds a round may wait for its clients."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where clients train and the attack computes; `auto` prefers CUDA."
    )
    precision: Literal["float32", "float64"] = Field(
        "float32", description="Floating-point type of models, training and uploads."
    )
    threads: int = Field(  # at most, whatever machine a client is on: tens of thousands crash it
        0,
        ge=0,
        le=1024,
        description="CPU threads a client trains with; 0 is all cores of its machine.",
    )


class DataTable(_Table):
    """``[data]``: what clients hold."""

    dataset: str = Field("photo-tiles", description="Data set expression.")
    partition: str = Field(
        "iid", description="A flwr-datasets partitioner: `dirichlet(alpha=0.5)`."
    )
    known: str = Field(
        "none",
        pattern=r"^(none|\d+(, ?\d+)*)$",
        description="Private images that the attacker holds too, by position in the train split "
        "(`17, 130`), for attacks that ask whose they are; such attacks reconstruct nothing.",
    )


class ModelTable(_Table):
    """``[model]``: what is trained."""

    name: str = Field("convnet", description="Model expression.")
    weights: str = Field(
        "none",
        min_length=1,
        description="What training starts from: a `.safetensors` file, or the folder of a run, "
        "which leaves its trained model there; relative as `output.dir` is. `none`: drawn anew.",
    )
    batchnorm: Literal["frozen", "shared", "private"] = Field(
        "frozen",
        description="`frozen`: clients use the running statistics the server sent, and return "
        "them unchanged. `shared`: clients use batch statistics and upload the new running "
        "statistics (they leak: the attack sees them). `private`: batch statistics, and the "
        "running statistics stay at the client.",
    )


class AuditTable(_Table):
    """``[audit]``: how the auditor judges."""

    criterion: str = Field(
        "psnr>=20", description="What counts as leaked, on psnr, ssim, mse, lpips, joined by and."
    )
    baseline: bool = Field(
        False, description="Also run without attack and defenses: what did they cost in accuracy?"
    )


class OutputTable(_Table):
    """``[output]``: where the run folder goes."""

    dir: str = Field(
        "runs",
        min_length=1,
        description="Relative: to the caller's folder for `fedsim`, to `$FEDSIM_HOME` (default "
        "`~/fedsim`) for plain `flwr run`.",
    )


class Scenario(_Table):
    """One run, whole."""

    title: str = Field("untitled", description="For the report.")
    threat_model: Literal["A", "B", "C", "D", "E", "F", "G", "H"] = Field(
        "B", description="The SoK's letter: what the attack may know and do."
    )
    attack: str = Field("none", description="Attack expression; `none` for an honest server.")
    oracles: str = Field(
        "none",
        description="What the attack may know beyond any threat model: `labels`, `batchnorm` "
        "(the private batch's statistics in each BatchNorm layer), or both with a comma.",
    )
    defenses: str = Field("none", description="Defense expressions, joined by ` | `.")
    channel: str = Field(
        "plain", description="What reaches the server: `plain`, `secagg(...)`, `trusted-sum`."
    )
    seed: int = Field(7, ge=0, le=2**63 - 1, description="The public seed.")
    federation: FederationTable = FederationTable.model_construct()
    data: DataTable = DataTable.model_construct()
    model: ModelTable = ModelTable.model_construct()
    audit: AuditTable = AuditTable.model_construct()
    output: OutputTable = OutputTable.model_construct()

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> "Scenario":
        """Read a scenario file; ``overrides`` maps dotted keys to values.

        Raises
        ------
        ScenarioError
            Naming the key, the value and what would be right.
        """
        try:
            content = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ScenarioError("scenario", str(path), "no such file") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ScenarioError("scenario", str(path), f"not readable as TOML: {error}") from None
        flat = _flatten(content)
        changes = _flatten(overrides or {})
        # Whole expressions first: an argument is one of the expression that is left in the end.
        for key in sorted(changes, key=lambda key: _table_of(key) is not None):
            flat.update(change(flat, key, changes[key]))
        return cls.from_flat(flat)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> "Scenario":
        """Build from dotted keys, as Flower's ``context.run_config`` has them.

        Raises
        ------
        ScenarioError
            Naming the key, the value and what would be right.
        """
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            table, _, name = key.rpartition(".")
            target = nested.setdefault(table, {}) if table else nested
            if not isinstance(target, dict):
                remedy = f"{table} is not a table; {nearest(key, known_keys())}"
                raise ScenarioError(key, value, remedy)
            target[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ScenarioError(key, first["input"], _remedy(key, first)) from None

    def flat(self) -> dict[str, Any]:
        """Return dotted keys and values, every key of the scenario."""
        return _flatten(self.model_dump(by_alias=True))

    def to_toml(self) -> str:
        """Return the resolved scenario as a TOML file."""
        text: str = tomli_w.dumps(self.model_dump(by_alias=True))
        return text

    def with_changes(self, **flat: Any) -> "Scenario":
        """Return a scenario with some dotted keys changed."""
        return Scenario.from_flat({**self.flat(), **flat})


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def change(flat: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the change that ``key=value`` makes; ``attack.iterations`` is an argument's key."""
    if (table := _table_of(key)) is None:
        return {key: value}
    text = str(flat.get(table, Scenario.from_flat({}).flat()[table]))
    names = key.removeprefix(f"{table}.").split(".")
    return {table: _with_argument(table, text, names, value)}


def _table_of(key: str) -> str | None:
    """Return the key of the expression that ``key`` names an argument of."""
    return next((table for table in EXPRESSIONS if key.startswith(f"{table}.")), None)


def _with_argument(key: str, text: str, names: list[str], value: Any) -> str:
    """Return an expression with one argument changed, or one of an expression inside it."""
    found = parse(text, key)
    if len(found) != 1:
        remedy = f"{key} = {text!r} is not one expression whose argument it could be"
        raise ScenarioError(".".join([key, *names]), value, remedy)
    name, *deeper = names
    if deeper:
        inner = str(found[0].arguments.get(name, ""))
        value = _with_argument(f"{key}.{name}", inner, deeper, value)
    return str(Expression(found[0].name, {**found[0].arguments, name: value}))


def known_keys() -> list[str]:
    """Return every key a scenario may hold, dotted."""
    return list(Scenario.from_flat({}).flat())


def _remedy(key: str, error: Any) -> str:
    known = known_keys()
    if error["type"] == "extra_forbidden":
        return f"there is no such key; {nearest(key, known)}"
    if error["type"] == "model_type":
        inside = [name for name in known if name.startswith(f"{key}.")]
        return f"this is a table, [{key}]; there is: {', '.join(inside)}"
    table, _, name = key.rpartition(".")
    model: Any = Scenario.model_fields[table].annotation if table else Scenario
    schema = model.model_json_schema()["properties"][name]
    return wanted.remedy(schema, error, schema.get("default"), toml=True)


def parse_override(text: str) -> dict[str, Any]:
    """Parse one ``key=value`` of the command line; the value is TOML (text may go unquoted).

    Raises
    ------
    ScenarioError
        If there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ScenarioError("override", text, "write key=value, for instance seed=3")
    try:
        return {key.strip(): tomllib.loads(f"value = {value}")["value"]}
    except tomllib.TOMLDecodeError:
        return {key.strip(): value.strip()}
