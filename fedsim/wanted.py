"""What a value should be, in words: for messages that refuse one, or miss one."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticOmit

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


class _Writable(GenerateJsonSchema):
    """Of a choice of types, those that somebody can write down (no NumPy array)."""

    def handle_invalid_for_json_schema(self, *_: Any) -> JsonSchemaValue:
        raise PydanticOmit


def schema_of(annotation: Any) -> dict[str, Any]:
    """Return an annotation as a JSON schema; empty if nothing of the kind can be written down."""
    try:
        return TypeAdapter(annotation, config=STRICT).json_schema(schema_generator=_Writable)
    except PydanticOmit:
        return {}


def remedy(
    schema: Mapping[str, Any], error: Mapping[str, Any], default: object = None, *, toml: bool
) -> str:
    """Say what to write instead of a value that pydantic refused.

    Parameters
    ----------
    schema : mapping
        The JSON schema of what is wanted.
    error : mapping
        What pydantic said; told only where a validator said it in its own words.
    default : object
        A right value, as an example; None if there is none.
    toml : bool
        Whether the value is written in TOML, or inside an expression.
    """
    said = str(error["msg"])
    wanted = in_words(schema, toml=toml)
    if not wanted:
        return said
    if default is not None and not isinstance(default, bool) and "enum" not in schema:
        wanted += f", for instance {list(default) if isinstance(default, tuple) else default!r}"
    if error["type"] in ("value_error", "assertion_error"):
        return f"{said.partition(' error, ')[2]}; write {wanted}"
    return f"write {wanted}"


def in_words(schema: Mapping[str, Any], *, toml: bool = False) -> str:
    """Say what a JSON schema wants: ``a whole number of at least 1``; empty where it cannot."""
    if "anyOf" in schema:
        words = dict.fromkeys(in_words(choice, toml=toml) for choice in _choices(schema))
        return " or ".join(word for word in words if word)
    if "enum" in schema or "const" in schema:
        *values, last = map(repr, schema.get("enum", [schema.get("const")]))
        return f"{', '.join(values)} or {last}" if values else last
    kind = schema.get("type", "")
    if kind == "array":
        each = in_words(schema.get("items", {}), toml=toml)
        return f"a list, each item {each}" if each else "a list"
    if kind in ("integer", "number"):
        return _number(schema)
    flags, text = ("true or false", "text") if toml else ("True or False", "text in quotes")
    text += ", not empty" if schema.get("minLength") else ""
    return {"boolean": flags, "string": text, "null": "None"}.get(kind, "")


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a schema allows; a whole number is a number."""
    choices = schema.get("anyOf", [schema])
    if {"type": "number"} in choices:
        choices = [choice for choice in choices if choice != {"type": "integer"}]
    return list(choices)


def _number(schema: Mapping[str, Any]) -> str:
    limits = [f"{words} {_written(schema[key])}" for key, words in _LIMITS.items() if key in schema]
    finite = "a number" if len(limits) == 2 else "a finite number"
    kind = "a whole number" if schema["type"] == "integer" else finite
    return " ".join([kind, " and ".join(limits)]) if limits else kind


def _written(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:.15g}"


def example(schema: Mapping[str, Any]) -> object:
    """Return a value of the type that a JSON schema wants, to show how it is written."""
    first = _choices(schema)[0]
    if "enum" in first or "const" in first:
        return first.get("enum", [first.get("const")])[0]
    written = {"integer": first.get("minimum", 2), "number": 0.5, "boolean": True, "array": [2]}
    return written.get(first.get("type", ""), "...")


def meanings(component: object) -> dict[str, str]:
    """Return what a component's docstring (NumPy style) says of each parameter: a sentence.

    Of a class, what its bases say of theirs too.
    """
    if not inspect.isclass(component):
        return _meanings(component)
    bases = [base for base in reversed(component.__mro__) if base.__doc__]
    return {name: said for base in bases for name, said in _meanings(base).items()}


def _meanings(component: object) -> dict[str, str]:
    section = (inspect.getdoc(component) or "").partition("Parameters\n----------\n")[2]
    section = re.split(r"\n\w[\w ]*\n---", section)[0]
    told: dict[str, list[str]] = {}
    names: list[str] = []
    for line in section.splitlines():
        if found := re.match(r"(\w+(?:, \w+)*) ?:", line):
            names = found[1].split(", ")
        for name in names if line.startswith(" ") else ():
            told.setdefault(name, []).append(line.strip())
    sentences = {name: re.split(r"\.\s+(?=[A-Z])", " ".join(told[name]))[0] for name in told}
    return {name: sentence.rstrip(".") for name, sentence in sentences.items()}
