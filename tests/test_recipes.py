"""Recipes: the text of every mistake in one, files, and YAML that loads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpass.errors import QpassError
from qpass.spec import (
    Override,
    QuantSpec,
)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- mistakes in a recipe: each says the file, the line, the key and the mend

HEAD = "preset: w8a16\n"
MISTAKES = [
    ("preset: w8a61", "1: preset: unknown preset 'w8a61'; did you mean 'w8a16'? "),
    ("prest: w8a16", "1: prest: unknown key; did you mean 'preset'?"),
    ("\nname: x\n", "2: mode: is missing; say mode or preset"),
    ("mode: w8a16", "1: mode: 'w8a16' is a preset; write `preset: w8a16`"),
    ("mode: int8_weight", "1: mode: unknown flag 'int8_weight'; did you mean 'int8_weights'?"),
    ("mode: int8_weights|int4_weights", "1: mode: int4_weights contradicts int8_weights: "),
    ("mode: int8_weights|per_group", "1: mode: no op for int8_weights|per_group yet; the modes are none, "),
    ("mode: fp8_qdq", "1: mode: no op for fp8_qdq yet; "),
    ("mode: 2", "1: mode: should be flags such as int4_weights|per_group, or none, not 2"),
    ("mode: none", "1: mode: none quantizes nothing, and no override does either"),
    (
        "mode: none\noverrides: [{match: a, mode: none}]",
        "1: mode: none quantizes nothing, and no override does either",
    ),
    ("mode:", "1: mode: has no value; leave it out, or write none to switch it off"),
    (HEAD + "name: ''", "2: name: should be one line of text, not ''"),
    (HEAD + 'name: "a\\n"', "2: name: should be one line of text, not 'a\\n'"),
    (HEAD + "name: 3", "2: name: should be text, not 3"),
    (HEAD + "zero: 3", "2: zero: unknown key; did you mean 'zero_point'?"),
    (HEAD + '"a\\nb": 3', "2: 'a\\nb': unknown key; keys are preset, mode, "),
    (HEAD + "ask: 3", "2: ask: unknown key; keys are preset, mode, group_size, "),
    (
        HEAD + "group_size: 64",
        "2: group_size: is only for groupwise modes (per_group); the mode is int8_weights",
    ),
    (HEAD + "zero_point: true", "2: zero_point: is only for groupwise modes (per_group); "),
    (HEAD + "rounding: mse", "2: rounding: is only for int4 weights (an int8 scale is amax / 127); "),
    (HEAD + "smoothing: 0.5", "2: smoothing: is only for modes that quantize activations; "),
    (HEAD + "activation_range: amax", "2: activation_range: is only for static activation scales "),
    ("preset: w8a8\npercentile: 99", "2: percentile: is only for static activation scales "),
    ("preset: w4a16-g128\n\n# odd\ngroup_size: 48", "4: group_size: should be 32, 64 or 128, not 48"),
    ("preset: w4a16-g128\nzero_point: 1", "2: zero_point: should be true or false, not 1"),
    ("preset: w4a16\nrounding: msa", "2: rounding: should be 'amax', 'signed_max' or 'mse', not 'msa'"),
    ("preset: w4a16-g128-zp\nrounding: signed_max", "2: rounding: signed_max is for symmetric scales; "),
    (
        "preset: w8a8\nsmoothing: 1.5",
        "2: smoothing: should be a strength from 0 to 1, search or none, not 1.5",
    ),
    ("preset: w8a8\nsmoothing: true", "2: smoothing: should be a strength from 0 to 1, "),
    ("preset: w8a8\nsmoothing: .nan", "2: smoothing: should be a strength from 0 to 1, "),
    ("preset: w8a8-static\npercentile: 50", "2: percentile: should be greater than 50, not 50"),
    (
        "preset: w8a8-static\npercentile: 100.5",
        "2: percentile: should be less than or equal to 100, not 100.5",
    ),
    ("preset: w8a8-static\npercentile: high", "2: percentile: should be a number, not 'high'"),
    (
        "preset: w8a8-static\npercentile: 99\nactivation_range: amax",
        "2: percentile: has no use, as activation_range is amax",
    ),
    (HEAD + "include: '*'", "2: include: should be a list, not '*'"),
    (HEAD + "include:\n  - a\n  - 3", "4: include[1]: should be text, not 3"),
    (HEAD + "include:\n  - a\n  -", "4: include[1]: has no value; "),
    (HEAD + "exclude:", "2: exclude: has no value; "),
    (HEAD + "exclude: [' ']", "2: exclude[0]: the filter is empty; for all Linears write '*'"),
    (HEAD + "exclude: ['re:']", "2: exclude[0]: the filter is empty; "),
    (HEAD + r"exclude: ['re:\d(']", r"2: exclude[0]: 're:\d(' is not a regular expression: missing ), "),
    (
        HEAD + "exclude: ['re:a{9999999999}']",
        "2: exclude[0]: 're:a{9999999999}' is not a regular expression: ",
    ),
    (HEAD + "overrides: 3", "2: overrides: should be a list, not 3"),
    (HEAD + "overrides: [3]", "2: overrides[0]: should be keys with values, not 3"),
    (HEAD + "overrides:\n- mode: none", "3: overrides[0].match: is missing"),
    (
        HEAD + "overrides:\n- match: a",
        "3: overrides[0]: changes nothing; say preset, mode or another setting",
    ),
    (HEAD + "overrides:\n- match: 're:['\n  mode: none", "3: overrides[0].match: 're:[' is not a regular "),
    (
        HEAD + "overrides:\n- match: a\n  mode: none\n- match: b\n  group_sice: 32",
        "6: overrides[1].group_sice: unknown key; did you mean 'group_size'?",
    ),
    (
        HEAD + "overrides:\n- match: a\n  mode: none\n- match: b\n  group_size: 32",
        "6: overrides[1].group_size: is only for groupwise modes (per_group); the mode is int8_weights",
    ),
    (
        HEAD + "overrides:\n- match: a\n  preset: w4a16-g128\n  group_size: 7",
        "5: overrides[0].group_size: should be 32, 64 or 128, not 7",
    ),
    (HEAD + "overrides:\n- match: a\n  preset: w8a1", "4: overrides[0].preset: unknown preset 'w8a1'; "),
    (
        HEAD + "overrides:\n- {match: a, mode: none, smoothing: 0.1}",
        "3: overrides[0].smoothing: is only for modes that quantize activations; the mode is none",
    ),
    # YAML itself
    ("a: [1,", "1: is not YAML: expected the node content, but found '<stream end>'"),
    (
        HEAD + "exclude: [*.lm_head]",
        "2: is not YAML: expected alphabetic or numeric character, but found '.'; a ",
    ),
    (
        HEAD + "exclude:\n - *lm_head",
        "3: is not YAML: found undefined alias 'lm_head'; a filter that begins with",
    ),
    (HEAD + "\tname: x", "2: is not YAML: found character '\\t' that cannot start any token"),
    (HEAD + "---\npreset: w8a8", "2: is not YAML: but found another document"),
    (
        HEAD + "name: \x01",
        " is not YAML text: unacceptable character #x0001: special characters are not allowed",
    ),
    (HEAD + "preset: w8a8", "2: preset: the key is given twice, first in line 1"),
    (
        HEAD + "overrides:\n- match: a\n  match: b",
        "4: overrides[0].match: the key is given twice, first in line 3",
    ),
    (HEAD + "exclude: &x [a, *x]", "2: exclude[1]: an alias stands for something that contains it"),
    (HEAD + "? [a]\n: b", "1: line 2 has something else where a key should be"),
    (
        HEAD + "name: !!python/object:os.system x",
        "2: name: 'x' is not a value: could not determine a constructor",
    ),
    (HEAD + "name: 2024-99-99", "2: name: '2024-99-99' is not a value: month must be in 1..12"),
    ("", " is empty; a recipe has at least `preset: NAME` or `mode: FLAGS`"),
    ("# nothing yet\n", " is empty; a recipe has at least `preset: NAME` or `mode: FLAGS`"),
    ("- preset: w8a16", " does not hold keys; a recipe has at least "),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(QpassError) as caught:
        QuantSpec.from_yaml(path)
    assert str(caught.value).startswith(f"{path}:{message}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(QpassError) as caught:
        QuantSpec.from_yaml(missing)
    assert str(caught.value) == f"{missing}: cannot be read: No such file or directory"
    with pytest.raises(QpassError, match=r": cannot be read: Is a directory$"):
        QuantSpec.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(QpassError, match=r"latin.yaml: is not YAML text: "):
        QuantSpec.from_yaml(tmp_path / "latin.yaml")


def test_mistakes_in_python_name_the_key_too() -> None:
    with pytest.raises(QpassError, match=r"^overrides\[0\]\.group_size: should be 32, 64 or 128, not 7$"):
        QuantSpec.preset("w4a16-g128", overrides=[{"match": "a", "group_size": 7}])
    with pytest.raises(QpassError, match=r"^group_size: should be 32, 64 or 128, not 7$"):
        Override(match="a", group_size=7)  # type: ignore[arg-type]
    with pytest.raises(QpassError, match=r"^mode: is missing; say mode or preset$"):
        QuantSpec()  # type: ignore[call-arg]
