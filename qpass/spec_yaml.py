"""Recipes as YAML text: reading that knows the line of every key, and the error that says it."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from qpass.errors import QpassError

At = tuple[str | int, ...]  # a key of a spec: ("overrides", 1, "group_size") is overrides[1].group_size


@dataclass(frozen=True)
class Source:
    """Where a spec was read from; empty for one made in Python.

    All sources compare equal, because two specs that say the same are equal wherever they come from.
    """

    path: str = field(default="", compare=False)
    lines: Mapping[At, int] = field(default_factory=dict, compare=False)

    def where(self, at: At) -> str:
        """`file.yaml:LINE: key: `, as far as known; a key that isn't in the file has its parent's line."""
        parent = at
        while parent and parent not in self.lines:
            parent = parent[:-1]
        line = f":{self.lines[parent]}" if parent in self.lines else ""
        return "".join(f"{part}: " for part in (f"{self.path}{line}", _spell(at)) if part)


class SpecError(QpassError, ValueError):
    """A mistake in a spec: the problem, the key that it is about and, from a file, the line.

    It is a ValueError too so that pydantic hands it up from a nested model and adds the outer key.
    """

    def __init__(self, problem: str, at: At = (), source: Source = Source()) -> None:
        super().__init__(source.where(at) + problem)
        self.problem = problem
        self.at = at


def _spell(at: At) -> str:
    spelt = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")
    return spelt if spelt.isprintable() else repr(spelt)


def read_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Source]:
    """The mapping that a YAML file holds, and where each of its keys stands.

    Raises SpecError, with the line where there is one, if the file can't be read, is not one YAML mapping,
    gives a key twice or without a value.
    """
    lines: dict[At, int] = {}
    source = Source(os.fspath(path), lines)
    try:
        root = yaml.compose(Path(path).read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", (), source) from None
    except yaml.YAMLError as error:
        raise _syntax_error(error, source) from None
    if not isinstance(root, yaml.MappingNode):
        problem = "is empty" if root is None else "does not hold keys"
        raise SpecError(f"{problem}; a recipe has at least `preset: NAME` or `mode: FLAGS`", (), source)
    data = _Reader(source, lines).read(root, ())
    assert isinstance(data, dict)
    return data, source


class _Reader:
    """Turns nodes into plain data and notes the line of each key on the way."""

    def __init__(self, source: Source, lines: dict[At, int]) -> None:
        self.source = source
        self.lines = lines
        self.open: list[yaml.Node] = []  # the nodes that we are inside of
        self.scalars = yaml.SafeLoader("")

    def read(self, node: yaml.Node, at: At) -> object:
        self.lines.setdefault(at, _line(node.start_mark))
        if any(node is outer for outer in self.open):
            raise SpecError("an alias stands for something that contains it", at, self.source)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, at)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*at, i)) for i, item in enumerate(node.value)]
            return self.scalar(node, at)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode, at: At) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, value in node.value:
            line = _line(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError(f"line {line} has something else where a key should be", at, self.source)
            inner = (*at, key.value)
            if key.value in data:
                first = self.lines[inner]
                self.lines[inner] = line
                raise SpecError(f"the key is given twice, first in line {first}", inner, self.source)
            self.lines[inner] = line
            data[key.value] = self.read(value, inner)
        return data

    def scalar(self, node: yaml.Node, at: At) -> object:
        try:
            value = self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-99-99 looks like a date and is none
            problem = getattr(error, "problem", None) or error
            raise SpecError(f"{node.value!r} is not a value: {problem}", at, self.source) from None
        if value is None:
            raise SpecError("has no value; leave it out, or write none to switch it off", at, self.source)
        return value


def _line(mark: yaml.Mark) -> int:
    return mark.line + 1


def _syntax_error(error: yaml.YAMLError, source: Source) -> SpecError:
    if not isinstance(error, yaml.MarkedYAMLError):  # a byte that can't be text has no line
        return SpecError(f"is not YAML text: {str(error).splitlines()[0]}", (), source)
    mark = error.problem_mark or error.context_mark
    problem = f"is not YAML: {error.problem}"
    if "alias" in f"{error.context} {error.problem}":
        problem += "; a filter that begins with * needs quotes"
    return SpecError(problem, (), Source(source.path, {(): _line(mark)} if mark else {}))


def write_yaml(data: Mapping[str, object], docs: Mapping[str, str]) -> str:
    """A commented recipe: each key of `data` under its comment; values are scalars or lists."""
    head = "# A recipe for: qpass rewrite MODEL --spec FILE\n\n"
    return head + "\n".join(f"# {docs[key]}\n{key}:{_spell_value(value)}\n" for key, value in data.items())


def _spell_value(value: object) -> str:
    if not isinstance(value, list) or not value:
        return f" {_spell_scalar(value)}"
    return "".join(f"\n  - {_spell_item(item)}" for item in value)


def _spell_item(item: object) -> str:
    if not isinstance(item, dict):
        return _spell_scalar(item)
    return "\n    ".join(f"{key}: {_spell_scalar(value)}" for key, value in item.items())


def _spell_scalar(value: object) -> str:
    # only double quotes escape: in the other styles PyYAML folds some line breaks away
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(value, default_style=style, allow_unicode=True, width=1 << 30)
    return text.removesuffix("\n").removesuffix("\n...")


class SpecModel(BaseModel):
    """A pydantic model whose mistakes are SpecErrors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    if not TYPE_CHECKING:  # a type checker sees the signature that pydantic makes from the fields

        def __init__(self, /, **said: object) -> None:
            try:
                super().__init__(**said)
            except ValidationError as error:
                raise _first_mistake(error, type(self)) from None


def _first_mistake(error: ValidationError, model: type[BaseModel]) -> SpecError:
    """pydantic's first error in our words, on one line. (A missing key may just be the misspelt one.)"""
    mistake = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] == "missing")
    at: At = mistake["loc"]
    given = reprlib.repr(mistake["input"])
    context = mistake.get("ctx", {})
    match mistake["type"]:
        case "value_error":
            cause = context["error"]
            if isinstance(cause, SpecError):
                return SpecError(cause.problem, at + cause.at)
            problem = str(cause)
        case "extra_forbidden":
            known = list(dict.fromkeys(["preset", *model.model_fields]))
            close = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.5)
            mend = f"did you mean {close[0]!r}?" if close else f"keys are {', '.join(known)}"
            problem = f"unknown key; {mend}"
        case "missing":
            problem = "is missing" + ("; say mode or preset" if at == ("mode",) else "")
        case "literal_error":
            problem = f"should be {context['expected']}, not {given}"
        case kind if kind in _EXPECTED:
            problem = f"should be {_EXPECTED[kind]}, not {given}"
        case _:
            problem = f"{mistake['msg'].removeprefix('Input ')}, not {given}"
    return SpecError(problem, at)


_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "float_type": "a number",
    "tuple_type": "a list",
    "model_type": "keys with values",
}


class RecipeSchema(GenerateJsonSchema):
    """What isn't said is left out of a recipe, never null."""

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        value = super().default_schema(schema)
        return {key: item for key, item in value.items() if key != "default" or item is not None}
