r"""QuantSpec: which Linears are quantized, and how. Made from a preset, a YAML recipe or Python.

A recipe is a few keys. `preset` may stand for the first of them; what else is said goes over it:

    preset: w4a16-g128
    group_size: 32
    exclude: ["*.lm_head"]
    overrides:
      - match: "*.down_proj"
        preset: w8a16
      - match: 're:layers\.(0|31)\.'
        mode: none

**Filters** (`include`, `exclude`, `match`) are globs over a whole name, case and all, whose `*` crosses `.`
and `/`, or `re:` and a regular expression that is searched for. Each is tried on every name of a Linear:
its nodes', its weight's, its module scopes'. One without effect on a model is an error (`Resolver.check`).

**Order**: `exclude` first; then `include`, which must match if there is any; then the first override that
matches. A Linear whose weight is the embedding's own initializer (a tied head) is left out unless included
*by name*: an `include` or `match` fits one of its nodes or scopes, or is its weight's name to the letter,
and does not fit just anything. So this is a preset with the tied head too:

    preset: w4a16-g128
    include: ["*", "*lm_head*"]
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from qpass.filters import Resolver, check_filter
from qpass.quant_mode import QuantMode
from qpass.spec_yaml import RecipeSchema, Source, SpecError, SpecModel, read_yaml, write_yaml

GroupSize = Literal[32, 64, 128]
Rounding = Literal["amax", "signed_max", "mse"]
ActivationRange = Literal["auto", "amax", "percentile"]

DEFAULT_ROUNDING: Rounding = "mse"  # of int4; the best of the three on real weights, with and without zero points
DEFAULT_SMOOTHING = 0.5  # what the SmoothQuant paper uses for most models (arXiv 2211.10438)
DEFAULT_PERCENTILE = 99.99

# The modes that a Linear can have, in words. QuantMode can say more than there are ops for.
MODES: Mapping[QuantMode, str] = {
    QuantMode.from_text(mode): words
    for mode, words in {
        "none": "full precision",
        "int8_weights": "int8 weights per channel",
        "int4_weights": "int4 weights per channel",
        "int4_weights|per_group": "int4 weights in groups of {group_size}",
        "int8_weights|activations": "int8 weights × activations, both per tensor",
        "int8_weights|activations|per_channel": "int8 weights per channel × activations per tensor",
        "int8_weights|activations|per_token": "int8 weights per tensor × activations per token",
        "int8_weights|activations|per_token|per_channel": "int8 weights per channel × activations per token",
    }.items()
}


class Preset(NamedTuple):
    """A named start for a recipe; what it doesn't set gets the defaults."""

    doc: str
    settings: Mapping[str, object]


PRESETS: Mapping[str, Preset] = {
    "w8a16": Preset("int8 weights, a scale per output channel", {"mode": "int8_weights"}),
    "w4a16": Preset("int4 weights, a scale per output channel", {"mode": "int4_weights"}),
    "w4a16-g128": Preset("int4 weights, a scale per group of 128", {"mode": "int4_weights|per_group"}),
    "w4a16-g128-zp": Preset(
        "int4 weights, a scale and a zero point per group of 128",
        {"mode": "int4_weights|per_group", "zero_point": True},
    ),
    "w8a8": Preset(
        "SmoothQuant: int8 weights per channel × int8 activations per token; smoothed if calibrated",
        {"mode": "int8_weights|activations|per_token|per_channel"},
    ),
    "w8a8-static": Preset(
        "int8 weights per channel × int8 activations per tensor; needs calibration",
        {"mode": "int8_weights|activations|per_channel"},
    ),
}


def _parse_mode(value: object) -> QuantMode:
    if isinstance(value, str) and value in PRESETS:
        raise ValueError(f"{value!r} is a preset; write `preset: {value}`")
    if not isinstance(value, str | QuantMode):
        raise ValueError(f"should be flags such as int4_weights|per_group, or none, not {value!r}")
    mode = QuantMode.from_text(value) if isinstance(value, str) else value.checked()
    if mode not in MODES:
        raise ValueError(f"no op for {mode} yet; the modes are {', '.join(map(str, MODES))}")
    return mode


def _parse_smoothing(value: object) -> object:
    if value is False:  # YAML reads an unquoted off as false
        return "none"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    if value in ("search", "none"):
        return value
    raise ValueError(f"should be a strength from 0 to 1, search or none, not {value!r}")


def _check_name(name: str) -> str:
    if not name.strip() or not name.isprintable():
        raise ValueError(f"should be one line of text, not {name!r}")
    return name


Mode = Annotated[
    QuantMode,
    PlainValidator(_parse_mode),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "enum": [str(mode) for mode in MODES]}),
]
Smoothing = Annotated[
    float | Literal["search", "none"],
    PlainValidator(_parse_smoothing),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"enum": ["search", "none"]}]}),
]
Percentile = Annotated[float, Field(gt=50, le=100)]
Filter = Annotated[str, AfterValidator(check_filter)]
Filters = Annotated[tuple[Filter, ...], Field(strict=False)]  # not strict: a list will do


class LinearSpec(BaseModel):
    """What one Linear gets, all decided. A field that the mode has no use for holds its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mode: Mode  # falsy: left in full precision ("kept")
    group_size: GroupSize = 128
    zero_point: bool = False
    rounding: Rounding = "amax"
    smoothing: float | Literal["search"] | None = None  # strength α; None = off
    activation_range: ActivationRange = "auto"
    percentile: float = DEFAULT_PERCENTILE
    merge_siblings: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether activation scales must be known before running (smoothing only profits from it)."""
        return _is_static(self.mode)

    def describe(self) -> str:
        """One line for a table, such as "int4 weights in groups of 128, symmetric, signed_max scales"."""
        parts = [MODES[self.mode].format(group_size=self.group_size)]
        if self.mode.has_per_group_scaling():
            parts.append("zero points" if self.zero_point else "symmetric")
        if self.mode.is_int4_weight_only():
            parts.append(f"{self.rounding} scales")
        if self.smoothing is not None:
            parts.append(f"smoothing {self.smoothing}")
        if self.needs_calibration:
            share = "" if self.activation_range == "amax" else f" ({self.percentile} %)"
            parts.append(f"range {self.activation_range}{share}")
        if self.merge_siblings:
            parts.append("siblings merged")
        return ", ".join(parts)


class _Settings(SpecModel):
    """How a Linear is quantized, as far as it is said. The descriptions are the recipe's comments."""

    mode: Mode | None = Field(default=None, description="what is quantized and how finely: QuantMode's flags, or none")
    group_size: GroupSize | None = Field(
        default=None, description="input channels that share a weight scale: 32, 64 or 128"
    )
    zero_point: bool | None = Field(
        default=None, description="a zero point per group, for weights that aren't centred on 0"
    )
    rounding: Rounding | None = Field(
        default=None,
        description="int4 scale: amax, signed_max (the largest weight becomes -8) or mse (least error)",
    )
    smoothing: Smoothing | None = Field(
        default=None,
        description="SmoothQuant's strength from 0 to 1, search (per layer) or none; it needs calibration",
    )
    activation_range: ActivationRange | None = Field(
        default=None,
        description="static activation scale: from the amax, a percentile, or auto (whichever errs less)",
    )
    percentile: Percentile | None = Field(
        default=None, description="share of activations, in percent, that a percentile range covers"
    )
    merge_siblings: bool | None = Field(
        default=None, description="Linears on one input (q, k, v; gate, up) become one GEMM, its result split"
    )

    def _said(self) -> dict[str, object]:
        return {key: getattr(self, key) for key in _Settings.model_fields if getattr(self, key) is not None}


class Override(_Settings):
    """Other settings for the Linears that `match`: a preset's, single ones over the spec's, or `mode: none`.

    A setting of the spec that the override's mode has no use for is dropped; one that the override itself
    says must apply.
    """

    match: Filter = Field(description="a glob or re:regex on node names, weight name or module scopes")
    preset: str | None = Field(default=None, description="start from this preset and not from the spec's own settings")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.preset is None and not self._said():
            raise SpecError("changes nothing; say preset, mode or another setting")
        return self


class QuantSpec(_Settings):
    """What to quantize and how. A value: frozen, hashable, equal to another one that says the same.

    Settings that `mode` uses and that are not said get their defaults; the others are None. Raises
    QpassError, naming the key, for anything that can't be. In a recipe `preset: NAME` stands for that
    preset's keys; in Python use `QuantSpec.preset`.
    """

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        default="custom", description="what tables and ledgers call this spec"
    )
    mode: Mode = Field(description=_Settings.model_fields["mode"].description)
    norm_plugins: bool = Field(
        default=False, description="norms that feed no int8 Linear become plugins too, with the Add before them"
    )
    include: Filters = Field(default=(), description="if not empty, only Linears that match one of these are quantized")
    exclude: Filters = Field(
        default=(),
        description="Linears, and norms that would become plugins, that match one of these are left as they are",
    )
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = Field(
        default=(), description="other settings for some Linears; the first whose match matches wins"
    )

    _source: Source = PrivateAttr(default_factory=Source)

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        said = {key: value for key, value in data.items() if value is not None}
        base: Mapping[str, object] = {}
        if (preset := said.pop("preset", None)) is not None:
            base = _find_preset(preset).settings
            said.setdefault("name", preset)
        if said.keys() <= cls.model_fields.keys():  # else a key is misspelt, and that comes first
            said |= _settle({key: said[key] for key in _Settings.model_fields if key in said}, base)
        return said

    @model_validator(mode="after")
    def _applies(self) -> Self:
        if not any(linear.mode for linear in self._linears()):
            raise SpecError("none quantizes nothing, and no override does either", ("mode",))
        return self

    def _linears(self) -> list[LinearSpec]:
        """What a Linear can get: without an override, and by each. Raises SpecError if one can't apply."""
        linears = [_linear(self._said())]
        for i, override in enumerate(self.overrides):
            try:
                preset = override.preset and _find_preset(override.preset).settings
                linears.append(_linear(_settle(override._said(), preset or self._said())))
            except SpecError as error:
                raise SpecError(error.problem, ("overrides", i, *error.at)) from None
        return linears

    @classmethod
    def preset(cls, name: str, group_size: int | None = None, **changes: Any) -> QuantSpec:
        """The preset `name` (see PRESETS) with another group size and other `changes`, such as `exclude=[…]`.

        Raises QpassError for an unknown preset (with the likely one), a group size that isn't 32, 64 or 128,
        or one for a preset that isn't groupwise.
        """
        return cls(**{"preset": name, "group_size": group_size} | changes)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> QuantSpec:
        """The recipe in a YAML file; it is called after the file unless it says a name.

        Raises QpassError with `FILE:LINE: KEY: ` in front for whatever is wrong with it.
        """
        data, source = read_yaml(path)
        data.setdefault("name", Path(path).stem)
        try:
            spec = cls(**data)
        except SpecError as error:
            raise SpecError(error.problem, error.at, source) from None
        spec._source = source
        return spec

    @property
    def needs_calibration(self) -> bool:
        """Whether any Linear may get static activation scales."""
        return any(linear.needs_calibration for linear in self._linears())

    def with_group_size(self, group_size: int) -> QuantSpec:
        """The same spec with another group size, also where an override inherits it.

        Raises QpassError if the size isn't 32, 64 or 128 or the spec isn't groupwise.
        """
        spec = type(self)(**self.to_dict() | {"group_size": group_size})
        spec._source = self._source
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Everything it says, ready for JSON; `QuantSpec(**spec.to_dict()) == spec`."""
        said = self.model_dump(mode="json", exclude_none=True)
        said["overrides"] = [{"match": override.pop("match")} | override for override in said["overrides"]]
        return {"name": said.pop("name")} | said

    def to_yaml(self) -> str:
        """A commented recipe with every key that applies; it loads back equal."""
        docs = {key: field.description or "" for key, field in type(self).model_fields.items()}
        return write_yaml(self.to_dict(), docs)

    def describe(self) -> str:
        """One line for a table: the name, what most Linears get, and how many filters say otherwise."""
        counts = [(key, len(getattr(self, key))) for key in ("overrides", "include", "exclude")]
        filters = "".join(f", {key}: {count}" for key, count in counts if count)
        norms = ", norm plugins" if self.norm_plugins else ""
        return f"{self.name}: {_linear(self._said()).describe()}{norms}{filters}"

    def resolver(self) -> Resolver:
        """A fresh Resolver, for one model."""
        return Resolver(self)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of a recipe, for editors that complete and check YAML."""
        schema = cls.model_json_schema(schema_generator=RecipeSchema)
        preset = {"type": "string", "enum": list(PRESETS)}
        schema["properties"]["preset"] = preset | {"description": "start from this preset's settings"}
        schema["$defs"]["Override"]["properties"]["preset"] |= preset
        schema["required"] = []
        schema["anyOf"] = [{"required": ["preset"]}, {"required": ["mode"]}]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _find_preset(name: object) -> Preset:
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.5)
    mend = f"did you mean {close[0]!r}? " if close else ""
    if sized := re.fullmatch(r"(w4a16-g)(\d+)(-zp)?", str(name)):
        mend = f"did you mean '{sized[1]}128{sized[3] or ''}' with group size {sized[2]}? "
    raise SpecError(f"unknown preset {name!r}; {mend}Presets: {', '.join(PRESETS)}", ("preset",))


def _is_static(mode: QuantMode) -> bool:
    return mode.has_act_and_weight_quant() and mode.has_act_static_scaling()


def _is_per_row(mode: QuantMode) -> bool:
    """Whether each output channel is quantized on its own, so that others beside it change nothing."""
    return bool(mode) and (mode.is_weight_only() or mode.has_per_channel_scaling())


# setting -> the modes that it is for, as a test and in words, and its default there
_APPLIES: Mapping[str, tuple[Callable[[QuantMode], bool], str, object]] = {
    "group_size": (QuantMode.has_per_group_scaling, "groupwise modes (per_group)", 128),
    "zero_point": (QuantMode.has_per_group_scaling, "groupwise modes (per_group)", False),
    "rounding": (
        QuantMode.is_int4_weight_only,
        "int4 weights (an int8 scale is amax / 127)",
        DEFAULT_ROUNDING,
    ),
    "smoothing": (QuantMode.has_act_and_weight_quant, "modes that quantize activations", DEFAULT_SMOOTHING),
    "activation_range": (_is_static, "static activation scales (activations, not per_token)", "auto"),
    "percentile": (_is_static, "static activation scales (activations, not per_token)", DEFAULT_PERCENTILE),
    "merge_siblings": (_is_per_row, "weights with scales of their own per output channel", False),
}


def _settle(said: Mapping[str, object], base: Mapping[str, object]) -> dict[str, object]:
    """All settings that the mode has a use for: what is said, else what the base says, else the default.

    Raises SpecError if something that is said doesn't apply. The values' types are checked elsewhere.
    """
    try:
        mode = _parse_mode(said.get("mode", base.get("mode")))
    except ValueError:
        return dict(said)  # no mode, or a wrong one: the field's own validation says so
    settled: dict[str, object] = {"mode": mode}
    for key, (applies, modes, default) in _APPLIES.items():
        if applies(mode):
            settled[key] = said.get(key, base.get(key, default))
        elif key in said:
            raise SpecError(f"is only for {modes}; the mode is {mode}", (key,))

    if "rounding" in settled:
        zero_point = settled.get("zero_point", False)
        if zero_point and said.get("rounding") == "signed_max":
            problem = "signed_max is for symmetric scales; with zero_point use amax or mse"
            raise SpecError(problem, ("rounding",))
        if zero_point and settled["rounding"] == "signed_max":  # inherited from symmetric scales
            settled["rounding"] = DEFAULT_ROUNDING
    if settled.get("activation_range") == "amax":
        if "percentile" in said:
            raise SpecError("has no use, as activation_range is amax", ("percentile",))
        del settled["percentile"]
    return settled


def _linear(settled: Mapping[str, object]) -> LinearSpec:
    said = {key: value for key, value in settled.items() if value != "none"}
    return LinearSpec.model_validate(said)
