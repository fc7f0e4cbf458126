"""QuantMode: what is quantized and how finely, as the set of flags that TensorRT-LLM's users know.

Values, predicates and builders are those of TensorRT-LLM 0.5 (`tensorrt_llm/quantization/mode.py`), so a mode
can be exchanged with it as an int. What differs is deliberate: a combination that contradicts itself raises
instead of being dropped, an int with unknown bits raises, and `str(mode)` is text that reads back.
"""

from __future__ import annotations

import difflib
import enum


class QuantMode(enum.IntFlag, boundary=enum.STRICT):
    """A set of quantization flags; the empty set means full precision.

    Not every set of flags is a mode: `|` combines flags freely, while whatever describes a mode (the
    builders, setters and `from_text`) goes through `checked` and raises ValueError for a contradiction.

    A weight-only mode carries no PER_CHANNEL: its scales are per output channel unless PER_GROUP is set.

    >>> mode = QuantMode.use_smooth_quant(per_token=True, per_channel=True)
    >>> str(mode), int(mode)
    ('int8_weights|activations|per_token|per_channel', 30)
    >>> QuantMode.from_text("int4_weights|per_group").is_int4_weight_only_per_group()
    True
    """

    INT4_WEIGHTS = 1
    INT8_WEIGHTS = 2
    ACTIVATIONS = 4
    PER_CHANNEL = 8  # one weight scale per output channel, known before running
    PER_TOKEN = 16  # one activation scale per token, computed while running
    PER_GROUP = 32  # one weight scale per group of input channels
    INT8_KV_CACHE = 64
    FP8_KV_CACHE = 128
    FP8_QDQ = 256

    WEIGHTS_AND_ACTIVATIONS = INT4_WEIGHTS | INT8_WEIGHTS | ACTIVATIONS
    VALID_FLAGS = 511

    # --- what is quantized

    def is_int8_weight_only(self) -> bool:
        return self & QuantMode.WEIGHTS_AND_ACTIVATIONS == QuantMode.INT8_WEIGHTS

    def is_int4_weight_only(self) -> bool:
        return self & QuantMode.WEIGHTS_AND_ACTIVATIONS == QuantMode.INT4_WEIGHTS

    def is_int4_weight_only_per_group(self) -> bool:
        return self.is_int4_weight_only() and self.has_per_group_scaling()

    def is_weight_only(self) -> bool:
        return self.is_int8_weight_only() or self.is_int4_weight_only()

    def has_act_and_weight_quant(self) -> bool:
        """Whether this is W8A8: int8 activations times int8 weights."""
        return self & QuantMode.WEIGHTS_AND_ACTIVATIONS == QuantMode.INT8_WEIGHTS | QuantMode.ACTIVATIONS

    def has_act_or_weight_quant(self) -> bool:
        return bool(self & QuantMode.WEIGHTS_AND_ACTIVATIONS)

    def has_int8_kv_cache(self) -> bool:
        return QuantMode.INT8_KV_CACHE in self

    def has_fp8_kv_cache(self) -> bool:
        return QuantMode.FP8_KV_CACHE in self

    def has_kv_cache_quant(self) -> bool:
        return self.has_int8_kv_cache() or self.has_fp8_kv_cache()

    def has_fp8_qdq(self) -> bool:
        return QuantMode.FP8_QDQ in self

    def has_any_quant(self) -> bool:
        """Whether anything at all is quantized (int4 weights too, which TensorRT-LLM 0.5 left out)."""
        return self.has_act_or_weight_quant() or self.has_kv_cache_quant() or self.has_fp8_qdq()

    # --- how finely

    def has_per_token_dynamic_scaling(self) -> bool:
        return QuantMode.PER_TOKEN in self

    def has_act_static_scaling(self) -> bool:
        """Whether activation scales, *if there are any*, are fixed: true of weight-only modes too."""
        return QuantMode.PER_TOKEN not in self

    def has_per_channel_scaling(self) -> bool:
        return QuantMode.PER_CHANNEL in self

    def has_per_group_scaling(self) -> bool:
        return QuantMode.PER_GROUP in self

    # --- setters: a mode is a value, so each returns a new one

    def set_int8_kv_cache(self) -> QuantMode:
        """This mode with an int8 KV cache. Raises ValueError if that contradicts what is set."""
        return (self | QuantMode.INT8_KV_CACHE).checked()

    def set_fp8_kv_cache(self) -> QuantMode:
        """This mode with an FP8 KV cache. Raises ValueError if that contradicts what is set."""
        return (self | QuantMode.FP8_KV_CACHE).checked()

    def set_fp8_qdq(self) -> QuantMode:
        """This mode with FP8 Linears. Raises ValueError if that contradicts what is set."""
        return (self | QuantMode.FP8_QDQ).checked()

    # --- builders

    @staticmethod
    def from_description(
        quantize_weights: bool = False,
        quantize_activations: bool = False,
        per_token: bool = False,
        per_channel: bool = False,
        per_group: bool = False,
        use_int4_weights: bool = False,
        use_int8_kv_cache: bool = False,
        use_fp8_kv_cache: bool = False,
        use_fp8_qdq: bool = False,
    ) -> QuantMode:
        """The mode that these answers describe.

        Raises ValueError, naming both sides, if they contradict each other.
        """
        if use_int4_weights and not quantize_weights:
            # the flags can't show this one: without quantize_weights no weight flag is set at all
            raise ValueError("use_int4_weights needs quantize_weights: it is their width")
        width = QuantMode.INT4_WEIGHTS if use_int4_weights else QuantMode.INT8_WEIGHTS
        answers = {
            width: quantize_weights,
            QuantMode.ACTIVATIONS: quantize_activations,
            QuantMode.PER_CHANNEL: per_channel,
            QuantMode.PER_TOKEN: per_token,
            QuantMode.PER_GROUP: per_group,
            QuantMode.INT8_KV_CACHE: use_int8_kv_cache,
            QuantMode.FP8_KV_CACHE: use_fp8_kv_cache,
            QuantMode.FP8_QDQ: use_fp8_qdq,
        }
        mode = QuantMode(0)
        for flag, wanted in answers.items():
            if wanted:
                mode |= flag
        return mode.checked()

    @staticmethod
    def use_smooth_quant(per_token: bool = False, per_channel: bool = False) -> QuantMode:
        """W8A8: activation scales per token or static per tensor, weight scales per channel or per tensor."""
        return QuantMode.from_description(True, True, per_token, per_channel)

    @staticmethod
    def use_weight_only(use_int4_weights: bool = False, per_group: bool = False) -> QuantMode:
        """Int8 or int4 weights, scales per output channel or per group; activations in full precision."""
        return QuantMode.from_description(True, per_group=per_group, use_int4_weights=use_int4_weights)

    # --- checks and text

    def checked(self) -> QuantMode:
        """This very mode. Raises ValueError, saying what contradicts what and why, if it is contradictory."""
        for one, other, why in _EXCLUDES:
            if one | other in self:
                raise ValueError(f"{one} contradicts {other}: {why}")
        for flag, needed, why in _NEEDS:
            if flag in self and not self & needed:
                raise ValueError(f"{flag} needs {' or '.join(map(str, needed))}: {why}")
        return self

    def __str__(self) -> str:
        """The flags in lower case joined by `|`, or "none"; `from_text` reads it back."""
        return "|".join(word for word, flag in _WORDS.items() if flag in self) or "none"

    @staticmethod
    def from_text(text: str) -> QuantMode:
        """The mode that `text` spells, such as "int4_weights|per_group", or "none". Case and spaces are free.

        Raises ValueError for an unknown flag (with the likely one) and for a contradiction.
        """
        mode = QuantMode(0)
        if text.strip().lower() == "none":
            return mode
        for word in (part.strip().lower() for part in text.split("|")):
            if word not in _WORDS:
                close = difflib.get_close_matches(word, _WORDS, n=1)
                mend = f"did you mean {close[0]!r}?" if close else f"flags are {', '.join(_WORDS)}, or none"
                raise ValueError(f"unknown flag {word!r}; {mend}")
            mode |= _WORDS[word]
        return mode.checked()

    @classmethod
    def _missing_(cls, value: object) -> object:
        # enum's own message for stray bits draws them over several lines
        if isinstance(value, int) and not 0 <= value <= 511:
            raise ValueError(f"{value} is not a QuantMode: valid flags are the bits of 511")
        return super()._missing_(value)


# Each flag's word, in the order of the text: what is quantized, its scales (activation's first), the rest.
_WORDS = {
    "int4_weights": QuantMode.INT4_WEIGHTS,
    "int8_weights": QuantMode.INT8_WEIGHTS,
    "activations": QuantMode.ACTIVATIONS,
    "per_token": QuantMode.PER_TOKEN,
    "per_channel": QuantMode.PER_CHANNEL,
    "per_group": QuantMode.PER_GROUP,
    "int8_kv_cache": QuantMode.INT8_KV_CACHE,
    "fp8_kv_cache": QuantMode.FP8_KV_CACHE,
    "fp8_qdq": QuantMode.FP8_QDQ,
}

_Q = QuantMode  # so that a row is a line

_EXCLUDES = (  # both set is a contradiction, and why
    (_Q.INT4_WEIGHTS, _Q.INT8_WEIGHTS, "a weight has one width"),
    (_Q.INT4_WEIGHTS, _Q.ACTIVATIONS, "int4 weights are multiplied by unquantized activations"),
    (_Q.PER_GROUP, _Q.ACTIVATIONS, "an integer GEMM sums over all of K, so no scale can change along K"),
    (_Q.FP8_QDQ, _Q.INT4_WEIGHTS, "fp8_qdq already makes the weights FP8"),
    (_Q.FP8_QDQ, _Q.INT8_WEIGHTS, "fp8_qdq already makes the weights FP8"),
    (_Q.FP8_QDQ, _Q.ACTIVATIONS, "fp8_qdq already makes the activations FP8"),
    (_Q.INT8_KV_CACHE, _Q.FP8_KV_CACHE, "a KV cache has one format"),
)

_NEEDS = (  # the first set without any of the second is a contradiction, and why
    (_Q.ACTIVATIONS, _Q.INT8_WEIGHTS, "int8 activations are multiplied by int8 weights"),
    (_Q.PER_TOKEN, _Q.ACTIVATIONS, "tokens are rows of the activations"),
    (_Q.PER_CHANNEL, _Q.ACTIVATIONS, "weight-only scales are per channel anyway, unless per_group"),
    (_Q.PER_GROUP, _Q.INT4_WEIGHTS | _Q.INT8_WEIGHTS, "groups are of weights"),
)
