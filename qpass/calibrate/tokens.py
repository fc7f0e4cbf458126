"""Which rows of an activation are tokens, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from qpass.errors import QpassError
from qpass.runtime import Feeds, Input, descendants, inputs_of

Array = NDArray[Any]
Mask = NDArray[np.bool_]

DEFAULT = "attention_mask"


class Tokens:
    """Reads the mask of a batch and lays it over activations.

    Args:
        proto: the model.
        mask: name of the input that says which tokens count; None for one called attention_mask, if any.

    Raises:
        QpassError: the model has no input of that name.
    """

    def __init__(self, proto: ModelProto, mask: str | None = None) -> None:
        inputs = inputs_of(proto)
        if mask is not None and mask not in inputs:
            names = ", ".join(f"'{name}'" for name in inputs)
            raise QpassError(f"the model has no input '{mask}' to take as the mask; its inputs are {names}")
        self.name = mask if mask is not None else DEFAULT if DEFAULT in inputs else None
        self._explicit = mask is not None
        self._streams = _streams(inputs, self.name)
        self._caches = [i.name for i in inputs.values() if i.dtype.kind == "f" and len(i.shape or ()) > 2]
        self._foreign = descendants(proto.graph, _foreign(inputs, self.name, self._streams))

    def mask(self, feeds: Feeds) -> Mask | None:
        """Which tokens of a batch count, bool [batch, sequence]; None where the model has no mask.

        A mask of another type than bool counts what is above 0, but one with negative values, and a float one
        without positive values, is of the kind that is added to scores: 0 counts and −10000 or −inf does not.
        """
        if self.name is None or self.name not in feeds:
            return None
        mask = feeds[self.name]
        if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
            mask = mask[:, 0, 0]
        if mask.ndim != 2:
            if not self._explicit:
                return None
            raise QpassError(
                f"the mask '{self.name}' has shape {list(mask.shape)} and should have [batch, sequence]; "
                "name another input, or leave --mask out"
            )
        if mask.dtype == np.bool_:
            return mask
        added = bool((mask < 0).any()) or (mask.dtype.kind == "f" and not mask.any())
        counts: Mask = mask > (-1 if added else 0)
        return counts

    def over(self, tensor: str, leading: tuple[int, ...], mask: Mask | None, feeds: Feeds) -> Mask | None:
        """Which rows of an activation count: bool of its `leading` dims, or None where all do.

        The mask is for activations of [batch, sequence], flattened or transposed too, where the shape leaves
        no doubt. It is not for those computed from another stream of tokens (a decoder's, where the mask is
        the encoder's), even if that happens to be as long. Where a mask covers cached tokens too, its end is
        taken.
        """
        if mask is None or tensor in self._foreign:
            return None
        for m in (mask, self._without_cache(mask, feeds)):
            if m is None:
                continue
            if leading == m.shape:
                return m
            if leading == (m.size,):
                return m.reshape(-1)
            if leading == m.T.shape:  # as long as wide is m.shape and was taken as that
                return m.T
        return None

    def _without_cache(self, mask: Mask, feeds: Feeds) -> Mask | None:
        """The part of a mask over past and present tokens [B, P + S] that is of the present [B, S]."""
        lengths = {feeds[name].shape[1] for name in self._streams if name in feeds and feeds[name].ndim > 1}
        if len(lengths) != 1:
            return None
        past = mask.shape[1] - lengths.pop()
        cached = any(past in feeds[name].shape[1:] for name in self._caches if name in feeds)
        return mask[:, past:] if past > 0 and cached else None


def _streams(inputs: Mapping[str, Input], mask: str | None) -> dict[str, int | str | None]:
    """Inputs that hold tokens, ids [batch, sequence] or embeddings [batch, sequence, K], and their length."""
    found = {}
    for i in inputs.values():
        ids = i.dtype.kind in "iu" and len(i.shape or ()) == 2
        embeddings = i.dtype.kind == "f" and len(i.shape or ()) == 3
        if i.name != mask and i.shape is not None and (ids or embeddings):
            found[i.name] = i.shape[1]
    return found


def _foreign(inputs: Mapping[str, Input], mask: str | None, streams: Mapping[str, int | str | None]) -> list[str]:
    """Streams that the mask is not of. Known where it shares the name of its length with others."""
    shape = inputs[mask].shape if mask is not None else None
    if not shape or len(shape) not in (2, 4) or shape[-1] not in streams.values():
        return []
    return [name for name, length in streams.items() if length != shape[-1]]
