"""Operators by name: `op.MatMul(x, w)`, `ir.Linear(x, w)`, `ms.FusedMatMul(x, w)`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import onnx

from qpass.rewriter.contrib import MICROSOFT
from qpass.rewriter.location import PatternError, caller
from qpass.rewriter.pattern import LIFTED, Op


class Domain:
    """`Domain("com.microsoft").SkipLayerNormalization(x, skip, g)` builds patterns over another operator domain."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, type_: str) -> Callable[..., Any]:
        if type_.startswith("_"):
            raise AttributeError(type_)
        self._check(type_)

        def build(*args: object, **keywords: object) -> Any:
            return Op(type_, args, keywords, self._name)

        return build

    def _check(self, type_: str) -> None:
        """PatternError where the domain cannot have this operator; a domain nobody declared can have any."""


class Standard(Domain):
    """The ONNX domain, whose operators are known."""

    def _check(self, type_: str) -> None:
        if not onnx.defs.has(type_):
            near = difflib.get_close_matches(type_, {s.name for s in onnx.defs.get_all_schemas()}, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PatternError(
                f"{caller()}: ONNX has no operator '{type_}'{hint} (Domain(\"\").{type_} takes any name)"
            )


op = Standard("")
"""Nodes of the standard ONNX domain: `op.MatMul(x, w)`."""

ir = Domain(LIFTED)
"""Lifted nodes: `ir.Linear(x, w, b)`, `ir.Norm(x, gamma, beta, kind=…, epsilon=…)`."""

ms = Domain(MICROSOFT)
"""Nodes that ONNX Runtime's optimizers write: `ms.SkipLayerNormalization(x, skip, gamma)`."""
