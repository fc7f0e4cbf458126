"""QuantSpec: presets, the Resolver and its filters, and what holds for every spec."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qpass.spec
from qpass.errors import QpassError
from qpass.filters import SiteNames
from qpass.quant_mode import QuantMode
from qpass.spec import (
    DEFAULT_ROUNDING,
    MODES,
    PRESETS,
    LinearSpec,
    Override,
    QuantSpec,
)
from qpass.spec_yaml import Source, SpecError

GROUPWISE = ("w4a16-g128", "w4a16-g128-zp")


def site(name: str, weight: str | None = None, scope: str = "", tied: bool = False) -> SiteNames:
    return SiteNames((name,), weight or f"{name}.weight", (scope,), tied)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- presets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a16", LinearSpec(mode=QuantMode(2))),
        ("w4a16", LinearSpec(mode=QuantMode(1), rounding=DEFAULT_ROUNDING)),
        ("w4a16-g128", LinearSpec(mode=QuantMode(33), group_size=128, rounding=DEFAULT_ROUNDING)),
        ("w4a16-g128-zp", LinearSpec(mode=QuantMode(33), zero_point=True, rounding=DEFAULT_ROUNDING)),
        ("w8a8", LinearSpec(mode=QuantMode(30), smoothing=0.5)),
        ("w8a8-static", LinearSpec(mode=QuantMode(14), smoothing=0.5, percentile=99.99)),
    ],
)
def test_presets(name: str, expected: LinearSpec) -> None:
    spec = QuantSpec.preset(name)
    assert spec.name == name
    assert spec.resolver().linear(site("fc")) == expected
    assert spec.needs_calibration == expected.needs_calibration == (name == "w8a8-static")
    assert spec.describe() == f"{name}: {expected.describe()}"
    assert "\n" not in spec.describe()


def test_these_are_all_presets() -> None:
    assert list(PRESETS) == ["w8a16", "w4a16", "w4a16-g128", "w4a16-g128-zp", "w8a8", "w8a8-static"]


@pytest.mark.parametrize("name", PRESETS)
def test_group_size_is_for_groupwise_presets(name: str) -> None:
    if name not in GROUPWISE:
        with pytest.raises(QpassError, match=r"^group_size: is only for groupwise modes .* the mode is "):
            QuantSpec.preset(name, group_size=64)
        return
    for size in (32, 64, 128):
        assert QuantSpec.preset(name, size).group_size == size
    for size in (0, 16, 48, 256, True):
        with pytest.raises(QpassError, match=f"^group_size: should be 32, 64 or 128, not {size}$"):
            QuantSpec.preset(name, size)


def test_preset_takes_other_keys_too() -> None:
    spec = QuantSpec.preset("w8a8", exclude=["*.lm_head"], smoothing="search")
    assert spec.exclude == ("*.lm_head",)
    assert spec.smoothing == "search"
    with pytest.raises(QpassError, match=r"^exclud: unknown key; did you mean 'exclude'\?$"):
        QuantSpec.preset("w8a8", exclud=["*.lm_head"])


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("w8a61", "did you mean 'w8a16'? Presets: w8a16, w4a16, w4a16-g128, "),
        ("w4a16-g32", "did you mean 'w4a16-g128' with group size 32? "),
        ("w4a16-g64-zp", "did you mean 'w4a16-g128-zp' with group size 64? "),
        ("gguf", "Presets: w8a16, w4a16, w4a16-g128, w4a16-g128-zp, w8a8, w8a8-static"),
    ],
)
def test_an_unknown_preset_is_answered_with_the_likely_one(name: str, mend: str) -> None:
    with pytest.raises(QpassError) as caught:
        QuantSpec.preset(name)
    assert str(caught.value).startswith(f"preset: unknown preset {name!r}; {mend}")


# --- what is said, inherited and left to the default


def test_what_a_changed_mode_has_no_use_for_is_not_inherited() -> None:
    spec = QuantSpec.preset("w4a16-g128-zp", mode=QuantMode.use_weight_only())
    assert (spec.group_size, spec.zero_point, spec.rounding) == (None, None, None)
    spec = QuantSpec.preset("w8a8", mode="int8_weights|activations|per_channel")
    assert (spec.smoothing, spec.activation_range, spec.percentile) == (0.5, "auto", 99.99)


def test_rounding_is_not_inherited_across_zero_point() -> None:
    overrides: list[dict[str, Any]] = [
        {"match": "a", "zero_point": True},
        {"match": "b", "group_size": 32},
        {"match": "c", "zero_point": True, "rounding": "amax"},
    ]
    resolver = QuantSpec.preset("w4a16-g128", rounding="signed_max", overrides=overrides).resolver()
    got = [resolver.linear(site(name)) for name in "abc"]
    assert [one.rounding for one in got if isinstance(one, LinearSpec)] == ["mse", "signed_max", "amax"]
    assert QuantSpec.preset("w4a16-g128-zp", zero_point=False).rounding == DEFAULT_ROUNDING


def test_an_amax_range_has_no_percentile() -> None:
    assert QuantSpec.preset("w8a8-static", activation_range="amax").percentile is None
    assert QuantSpec.preset("w8a8-static", activation_range="percentile", percentile=100).percentile == 100


def test_off_is_none() -> None:
    for off in ("none", False):
        linear = QuantSpec.preset("w8a8", smoothing=off).resolver().linear(site("fc"))
        assert isinstance(linear, LinearSpec)
        assert linear.smoothing is None


def test_specs_are_values() -> None:
    spec = QuantSpec.preset("w8a16", exclude=["a"])
    same = QuantSpec(name="w8a16", mode=QuantMode.use_weight_only(), exclude=("a",))
    assert spec == same
    assert hash(spec) == hash(same)
    assert len({spec, same, QuantSpec.preset("w8a16")}) == 2
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


def test_with_group_size_reaches_overrides_that_inherit_it() -> None:
    overrides = [
        Override(match="a", rounding="mse"),
        Override(match="b", group_size=128),
        Override(match="c", preset="w4a16-g128"),
    ]
    spec = QuantSpec.preset("w4a16-g128", overrides=overrides).with_group_size(32)
    assert spec == QuantSpec.preset("w4a16-g128", 32, overrides=overrides)
    resolver = spec.resolver()
    got = [resolver.linear(site(name)) for name in "abcd"]
    assert [one.group_size for one in got if isinstance(one, LinearSpec)] == [32, 128, 128, 32]
    with pytest.raises(QpassError, match=r"^group_size: is only for groupwise modes"):
        QuantSpec.preset("w8a16").with_group_size(32)


# --- the Resolver


def test_overrides_first_match_wins() -> None:
    overrides = [
        Override(match="*.down_proj", preset="w8a16"),
        Override(match=r"re:layers\.(0|3)\.", mode=QuantMode(0)),
        Override(match="*proj", group_size=32),
    ]
    resolver = QuantSpec.preset("w4a16-g128", overrides=overrides).resolver()
    assert resolver.linear(site("layers.0.down_proj")) == LinearSpec(mode=QuantMode.use_weight_only())
    kept = resolver.linear(site("layers.3.up_proj"))
    assert isinstance(kept, LinearSpec)
    assert not kept.mode
    assert kept.describe() == "full precision"
    small = resolver.linear(site("layers.1.up_proj"))
    assert isinstance(small, LinearSpec)
    assert small.group_size == 32
    resolver.check()


def test_filters_see_nodes_weight_and_scopes_and_are_case_sensitive() -> None:
    names = SiteNames(("/h.0/mlp/MatMul", "/h.0/mlp/Add"), "onnx::MatMul_7", ("h.0", "h.0.mlp"), False)
    hits = ["/h.0/mlp/Add", "*/MatMul", "onnx::*", "h.0", "h.?.mlp", "re:_7$", "re:^/h", "/h*", "[/]h*"]
    misses = ["mlp", "h.0.*lp.", "*/matmul", "re:^mlp", "re:matmul"]
    for pattern in hits:
        assert QuantSpec.preset("w8a16", exclude=[pattern]).resolver().linear(names) == (
            f"excluded by exclude[0] '{pattern}'"
        )
    for pattern in misses:
        assert isinstance(QuantSpec.preset("w8a16", exclude=[pattern]).resolver().linear(names), LinearSpec), pattern


def test_include_and_exclude() -> None:
    spec = QuantSpec.preset("w8a16", include=["*.mlp.*"], exclude=["*.gate", "*.down"])
    resolver = spec.resolver()
    assert isinstance(resolver.linear(site("h.0.mlp.up")), LinearSpec)
    assert resolver.linear(site("h.0.mlp.down")) == "excluded by exclude[1] '*.down'"
    assert resolver.linear(site("h.0.attn.q")) == "not in include"


TIED = SiteNames(("/lm_head/MatMul",), "model.embed.weight", ("lm_head",), True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"include": ["*"]},
        {"include": ["**", "re:.*", "re:."]},
        {"overrides": [{"match": "*", "preset": "w8a8"}]},
        {"include": ["*", "model.*"]},  # meets only the embedding's name
    ],
)
def test_a_tied_head_is_excluded(changes: dict[str, Any]) -> None:
    reason = QuantSpec.preset("w8a16", **changes).resolver().linear(TIED)
    assert reason == "its weight 'model.embed.weight' is the embedding's own; include it by name to quantize it"


@pytest.mark.parametrize(
    "changes",
    [
        {"include": ["*", "*lm_head*"]},
        {"include": ["*", "lm_head"]},
        {"include": ["*", "re:^/lm_head"]},
        {"include": ["*", "model.embed.weight"]},
        {"overrides": [{"match": "*lm_head*", "preset": "w8a8"}]},
    ],
)
def test_a_tied_head_is_included_by_name_and_with_it_the_rest(changes: dict[str, Any]) -> None:
    resolver = QuantSpec.preset("w8a16", **changes).resolver()
    assert isinstance(resolver.linear(TIED), LinearSpec)
    assert isinstance(resolver.linear(site("fc")), LinearSpec)
    resolver.check()


def test_the_recipe_for_a_preset_and_its_tied_head(tmp_path: Path) -> None:
    spec = QuantSpec.from_yaml(recipe(tmp_path, 'preset: w4a16-g128\ninclude: ["*", "*lm_head*"]\n'))
    resolver = spec.resolver()
    assert resolver.linear(TIED) == resolver.linear(site("fc"))
    resolver.check()


def test_exclude_goes_over_everything() -> None:
    spec = QuantSpec.preset("w8a16", include=["*", "lm_head"], exclude=["lm_head"])
    assert spec.resolver().linear(TIED) == "excluded by exclude[0] 'lm_head'"


def test_a_filter_without_effect_is_an_error_that_names_key_line_and_likely_name(tmp_path: Path) -> None:
    text = """\
preset: w8a16
include: ['*', 'zzz*']
exclude:
  - '*.up'
  - '*.lm_haed'
overrides:
  - match: '*.down'
    mode: none
  - match: '*.0.down'
    preset: w8a8
  - match: '*.0.up'
    preset: w8a8
"""
    path = recipe(tmp_path, text)
    resolver = QuantSpec.from_yaml(path).resolver()
    for name in ("h.0.up", "h.0.down", "model.lm_head"):
        resolver.linear(site(name))
    with pytest.raises(QpassError) as caught:
        resolver.check()
    assert str(caught.value) == (
        f"{path}:5: exclude[1]: '*.lm_haed' matches no Linear of the model; did you mean 'model.lm_head'?; "
        f"{path}:2: include[1]: 'zzz*' matches no Linear of the model; they have names like 'h.0.up'; "
        f"{path}:9: overrides[1].match: '*.0.down' has no effect: overrides[0] '*.down' comes first; "
        f"{path}:11: overrides[2].match: '*.0.up' has no effect: 'h.0.up': excluded by exclude[0] '*.up'"
    )


def test_check_without_a_file_or_without_linears() -> None:
    resolver = QuantSpec.preset("w8a16", exclude=["head"]).resolver()
    with pytest.raises(QpassError, match=r"^exclude\[0\]: 'head' matches no Linear of the model; it has none$"):
        resolver.check()
    QuantSpec.preset("w8a16").resolver().check()


def test_naming_a_tied_head_by_a_glob_on_its_embedding_is_no_silent_no_op() -> None:
    resolver = QuantSpec.preset("w8a16", include=["fc", "model.embed*"]).resolver()
    resolver.linear(TIED)
    resolver.linear(site("fc"))
    with pytest.raises(QpassError, match=r"^include\[1\]: 'model.embed\*' has no effect: '/lm_head/MatMul': its w"):
        resolver.check()


# --- YAML round trip


def test_a_recipe_is_called_after_its_file_unless_it_says_a_name(tmp_path: Path) -> None:
    assert QuantSpec.from_yaml(recipe(tmp_path, "preset: w8a16")).name == "recipe"
    assert QuantSpec.from_yaml(recipe(tmp_path, "preset: w8a16\nname: mine")).name == "mine"


def test_where_a_spec_comes_from_does_not_make_it_another(tmp_path: Path) -> None:
    spec = QuantSpec.from_yaml(recipe(tmp_path, "preset: w8a16\nname: w8a16"))
    assert spec == QuantSpec.preset("w8a16")
    assert hash(spec) == hash(QuantSpec.preset("w8a16"))


def test_the_recipes_of_the_documentation_load(tmp_path: Path) -> None:
    recipes = re.findall(r"(?:^    .*\n)+", qpass.spec.__doc__ or "", flags=re.MULTILINE)
    assert len(recipes) == 2
    for text in recipes:
        assert QuantSpec.from_yaml(recipe(tmp_path, textwrap.dedent(text))).group_size in (32, 128)


def test_aliases_are_followed(tmp_path: Path) -> None:
    text = "preset: w8a16\noverrides:\n- &head {match: a, mode: none}\n- *head\n"
    assert len(QuantSpec.from_yaml(recipe(tmp_path, text)).overrides) == 2


def test_yaml_text_explains_every_key_that_applies() -> None:
    text = QuantSpec.preset("w8a8-static", exclude=["*.lm_head"]).to_yaml()
    assert "\n# share of activations, in percent, that a percentile range covers\npercentile: 99.99\n" in text
    assert "\nexclude:\n  - '*.lm_head'\n" in text
    assert "group_size" not in text
    keys = [line for line in text.splitlines() if line[:1].isalpha()]
    comments = [line for line in text.splitlines()[1:] if line.startswith("# ")]
    assert len(comments) == len(keys)
    assert all(len(line) <= 110 for line in text.splitlines())


FILTERS = st.one_of(
    st.sampled_from(["*", "*.lm_head", r"re:layers\.(0|1)\.", "'", '"', "# no comment", "a: b", "- a", "on", "1"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: bool(text.strip()) and not text.startswith("re:")
    ),
)
NAMES = FILTERS.filter(str.isprintable)
ROUNDINGS = st.sampled_from(["amax", "signed_max", "mse"])
MAYBE: dict[str, Any] = {
    "group_size": st.sampled_from([32, 64, 128]),
    "zero_point": st.booleans(),
    "rounding": ROUNDINGS,
    "smoothing": st.one_of(st.floats(0, 1), st.sampled_from(["search", "none"])),
    "activation_range": st.sampled_from(["auto", "amax", "percentile"]),
    "percentile": st.floats(50, 100, exclude_min=True),
}
CHANGES = st.fixed_dictionaries({}, optional=MAYBE)
MODE = st.sampled_from(list(MODES))
OVERRIDES = st.lists(
    st.builds(
        lambda match, start, changes: {"match": match} | start | changes,
        FILTERS,
        st.one_of(
            MODE.map(lambda mode: {"mode": mode}),
            st.sampled_from(list(PRESETS)).map(lambda preset: {"preset": preset}),
            st.just({}),
        ),
        CHANGES,
    ),
    max_size=2,
)
SPECS = st.fixed_dictionaries(
    {"mode": MODE},
    optional=MAYBE
    | {
        "name": NAMES,
        "include": st.lists(FILTERS, max_size=2),
        "exclude": st.lists(FILTERS, max_size=2),
        "overrides": OVERRIDES,
    },
)


def applicable(said: dict[str, Any]) -> QuantSpec:
    """The spec of `said` without the keys that the spec itself calls out of place."""
    while True:
        try:
            return QuantSpec(**said)
        except SpecError as error:
            *path, key = error.at
            inner: Any = said
            for step in path:
                inner = inner[step]
            if key == "mode":
                said = said | {"mode": QuantMode.use_weight_only()}
            elif isinstance(key, int):
                inner[key]["mode"] = "none"
            else:
                del inner[key]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(SPECS)
def test_every_spec_survives_yaml_json_and_python(tmp_path: Path, said: dict[str, Any]) -> None:
    spec = applicable(said)
    assert QuantSpec.from_yaml(recipe(tmp_path, spec.to_yaml())) == spec
    assert QuantSpec(**json.loads(json.dumps(spec.to_dict()))) == spec
    assert len(spec.describe().splitlines()) == 1


def tried(said: dict[str, Any]) -> QuantSpec | SpecError:
    try:
        return QuantSpec(**said)
    except SpecError as error:
        return error


@settings(deadline=None)
@given(SPECS)
def test_a_spec_applies_or_names_the_key_that_does_not(said: dict[str, Any]) -> None:
    spec = tried(said)
    if isinstance(spec, SpecError):
        assert spec.at
    else:
        assert all(getattr(spec, key) == value for key, value in said.items() if key in MAYBE)


# --- schema


def test_json_schema_knows_every_key_and_no_null() -> None:
    schema = QuantSpec.json_schema()
    assert set(schema["properties"]) == {"preset", *QuantSpec.model_fields}
    override = schema["$defs"]["Override"]
    assert set(override["properties"]) == set(Override.model_fields)
    assert override["required"] == ["match"]
    assert not schema["additionalProperties"]
    assert not override["additionalProperties"]
    assert schema["properties"]["preset"]["enum"] == list(PRESETS)
    assert schema["properties"]["mode"]["enum"] == [str(mode) for mode in MODES]
    assert schema["properties"]["group_size"]["enum"] == [32, 64, 128]
    assert {"required": ["preset"]} in schema["anyOf"]
    assert "null" not in json.dumps(schema)
    assert all("description" in value for value in schema["properties"].values())


def test_source_without_a_file_names_just_the_key() -> None:
    assert Source().where(("overrides", 1, "group_size")) == "overrides[1].group_size: "
    assert Source().where(()) == ""
