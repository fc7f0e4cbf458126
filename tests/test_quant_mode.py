"""QuantMode over its whole flag space: values, predicates, contradictions and both round trips."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest

from qpass.quant_mode import QuantMode

FLAGS = {
    "INT4_WEIGHTS": 1,
    "INT8_WEIGHTS": 2,
    "ACTIVATIONS": 4,
    "PER_CHANNEL": 8,
    "PER_TOKEN": 16,
    "PER_GROUP": 32,
    "INT8_KV_CACHE": 64,
    "FP8_KV_CACHE": 128,
    "FP8_QDQ": 256,
}
EVERY_SET = [QuantMode(i) for i in range(512)]


def valid(mode: QuantMode) -> bool:
    try:
        return mode.checked() is mode
    except ValueError:
        return False


VALID = [mode for mode in EVERY_SET if valid(mode)]

# Written out by hand, not derived: what a Linear can be, times what a KV cache can be.
LINEARS = [
    "none",
    "int4_weights",
    "int4_weights|per_group",
    "int8_weights",
    "int8_weights|per_group",
    "int8_weights|activations",
    "int8_weights|activations|per_channel",
    "int8_weights|activations|per_token",
    "int8_weights|activations|per_token|per_channel",
    "fp8_qdq",
]
CACHES = ["none", "int8_kv_cache", "fp8_kv_cache"]


def test_flags_have_the_values_of_tensorrt_llm() -> None:
    assert {flag.name: flag.value for flag in QuantMode} == FLAGS
    assert int(QuantMode.WEIGHTS_AND_ACTIVATIONS) == 7
    assert int(QuantMode.VALID_FLAGS) == 511


def test_the_valid_modes_are_the_linears_times_the_caches() -> None:
    expected = {
        QuantMode.from_text(linear) | QuantMode.from_text(cache) for linear, cache in itertools.product(LINEARS, CACHES)
    }
    assert len(expected) == 30
    assert set(VALID) == expected


@pytest.mark.parametrize("mode", VALID, ids=str)
def test_round_trips(mode: QuantMode) -> None:
    assert QuantMode(int(mode)) is mode
    assert QuantMode.from_text(str(mode)) is mode
    assert QuantMode.from_text(str(mode).upper().replace("|", " | ")) is mode
    assert pickle.loads(pickle.dumps(mode)) is mode
    assert json.loads(json.dumps(mode)) == int(mode)
    assert f"{mode}" == str(mode)
    assert f"{mode:d}" == repr(int(mode))


def test_a_set_of_flags_that_is_no_mode_still_has_a_text_and_refuses_to_read_back() -> None:
    assert len({str(mode) for mode in EVERY_SET}) == 512
    for mode in set(EVERY_SET) - set(VALID):
        with pytest.raises(ValueError, match=r"contradicts|needs"):
            QuantMode.from_text(str(mode))


def test_predicates_over_every_set_of_flags() -> None:
    for mode in EVERY_SET:
        check_predicates(mode)


def check_predicates(mode: QuantMode) -> None:
    has = {name: bool(mode & bit) for name, bit in FLAGS.items()}
    int4, int8, activations = has["INT4_WEIGHTS"], has["INT8_WEIGHTS"], has["ACTIVATIONS"]
    assert mode.is_int8_weight_only() == (int8 and not int4 and not activations)
    assert mode.is_int4_weight_only() == (int4 and not int8 and not activations)
    assert mode.is_int4_weight_only_per_group() == (mode.is_int4_weight_only() and has["PER_GROUP"])
    assert mode.is_weight_only() == (mode.is_int4_weight_only() or mode.is_int8_weight_only())
    assert mode.has_act_and_weight_quant() == (int8 and activations and not int4)
    assert mode.has_act_or_weight_quant() == (int4 or int8 or activations)
    assert mode.has_per_token_dynamic_scaling() == has["PER_TOKEN"]
    assert mode.has_act_static_scaling() == (not has["PER_TOKEN"])
    assert mode.has_per_channel_scaling() == has["PER_CHANNEL"]
    assert mode.has_per_group_scaling() == has["PER_GROUP"]
    assert mode.has_int8_kv_cache() == has["INT8_KV_CACHE"]
    assert mode.has_fp8_kv_cache() == has["FP8_KV_CACHE"]
    assert mode.has_kv_cache_quant() == (has["INT8_KV_CACHE"] or has["FP8_KV_CACHE"])
    assert mode.has_fp8_qdq() == has["FP8_QDQ"]
    quantized = int4 or int8 or activations or has["INT8_KV_CACHE"] or has["FP8_KV_CACHE"] or has["FP8_QDQ"]
    assert mode.has_any_quant() == quantized


ANSWERS = (
    "quantize_weights",
    "quantize_activations",
    "per_token",
    "per_channel",
    "per_group",
    "use_int4_weights",
    "use_int8_kv_cache",
    "use_fp8_kv_cache",
    "use_fp8_qdq",
)


def test_every_description_gives_the_mode_it_describes_or_a_contradiction() -> None:
    described = set()
    for bits in itertools.product([False, True], repeat=len(ANSWERS)):
        said = dict(zip(ANSWERS, bits, strict=True))
        try:
            mode = QuantMode.from_description(**said)
        except ValueError:
            continue
        described.add(mode)
        assert mode.has_act_or_weight_quant() == said["quantize_weights"]
        assert (QuantMode.INT4_WEIGHTS in mode) == said["use_int4_weights"]
        assert (QuantMode.ACTIVATIONS in mode) == said["quantize_activations"]
        assert mode.has_per_token_dynamic_scaling() == said["per_token"]
        assert mode.has_per_channel_scaling() == said["per_channel"]
        assert mode.has_per_group_scaling() == said["per_group"]
        assert mode.has_int8_kv_cache() == said["use_int8_kv_cache"]
        assert mode.has_fp8_kv_cache() == said["use_fp8_kv_cache"]
        assert mode.has_fp8_qdq() == said["use_fp8_qdq"]
    assert described == set(VALID)  # nothing valid is out of reach


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quantize_activations": True}, "activations needs int8_weights"),
        ({"use_int4_weights": True}, "use_int4_weights needs quantize_weights"),
        ({"quantize_weights": True, "per_token": True}, "per_token needs activations"),
        ({"quantize_weights": True, "per_channel": True}, "per_channel needs activations"),
        ({"per_group": True}, "per_group needs int4_weights or int8_weights"),
        (
            {"quantize_weights": True, "quantize_activations": True, "use_int4_weights": True},
            "int4_weights contradicts activations",
        ),
        (
            {"quantize_weights": True, "quantize_activations": True, "per_group": True},
            "per_group contradicts activations",
        ),
        ({"use_int8_kv_cache": True, "use_fp8_kv_cache": True}, "int8_kv_cache contradicts fp8_kv_cache"),
        ({"quantize_weights": True, "use_fp8_qdq": True}, "fp8_qdq contradicts int8_weights"),
        (
            {"quantize_weights": True, "use_int4_weights": True, "use_fp8_qdq": True},
            "fp8_qdq contradicts int4_weights",
        ),
        ({"per_token": True, "use_fp8_qdq": True}, "per_token needs activations"),
        ({"per_group": True, "use_fp8_qdq": True}, "per_group needs int4_weights or int8_weights"),
    ],
)
def test_contradictions_say_what_contradicts_what(said: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: ") as caught:
        QuantMode.from_description(**said)
    assert "\n" not in str(caught.value)


def test_contradictions_that_only_flags_can_spell() -> None:
    with pytest.raises(ValueError, match=r"^int4_weights contradicts int8_weights: "):
        (QuantMode.INT4_WEIGHTS | QuantMode.INT8_WEIGHTS).checked()
    with pytest.raises(ValueError, match=r"^fp8_qdq contradicts activations: "):
        (QuantMode.FP8_QDQ | QuantMode.ACTIVATIONS).checked()


def test_shorthands() -> None:
    assert QuantMode.use_weight_only() == 2
    assert QuantMode.use_weight_only(use_int4_weights=True) == 1
    assert QuantMode.use_weight_only(True, True) == 33
    assert QuantMode.use_weight_only(per_group=True) == 34
    assert [int(QuantMode.use_smooth_quant(t, c)) for t in (False, True) for c in (False, True)] == [
        6,
        14,
        22,
        30,
    ]


def test_setters_return_a_new_mode_and_keep_it_sound() -> None:
    mode = QuantMode.use_weight_only()
    assert mode.set_int8_kv_cache() == 2 | 64
    assert mode.set_fp8_kv_cache() == 2 | 128
    assert QuantMode(0).set_fp8_qdq().set_fp8_kv_cache() == 256 | 128
    assert mode == 2
    with pytest.raises(ValueError, match="int8_kv_cache contradicts fp8_kv_cache"):
        mode.set_fp8_kv_cache().set_int8_kv_cache()
    with pytest.raises(ValueError, match="int8_kv_cache contradicts fp8_kv_cache"):
        mode.set_int8_kv_cache().set_fp8_kv_cache()
    with pytest.raises(ValueError, match="fp8_qdq contradicts int8_weights"):
        mode.set_fp8_qdq()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8_weight", "unknown flag 'int8_weight'; did you mean 'int8_weights'?"),
        ("int8_weights|", "unknown flag ''; flags are int4_weights, int8_weights, "),
        ("", "unknown flag ''; flags are int4_weights, int8_weights, "),
        ("none|int8_weights", "unknown flag 'none'; "),
        ("valid_flags", "unknown flag 'valid_flags'; "),
        ("int8_weights|int4_weights", "int4_weights contradicts int8_weights: "),
    ],
)
def test_text_that_spells_no_mode(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, and as text, not as a regex
        QuantMode.from_text(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, 512, 1 << 20])
def test_ints_with_other_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{value} is not a QuantMode: .* 511$"):
        QuantMode(value)


def test_complement_stays_within_the_flags() -> None:
    assert ~QuantMode.INT4_WEIGHTS == 510
    assert QuantMode.use_smooth_quant(True, True) & ~QuantMode.PER_TOKEN == 14
