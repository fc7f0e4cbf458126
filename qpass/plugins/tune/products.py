"""What is tuned: kinds of products and their shapes, from models and from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import TensorProto

from qpass.errors import QpassError
from qpass.graph import Const, Model
from qpass.ops import DOMAIN, REGISTRY
from qpass.ops.weight_only_quant_matmul import INT4, INT8
from qpass.plugins.bench.jobs import Job

Product = tuple[str, int, int]
"""Kind, N and K: what the table knows a product by."""

TOKENS = (1, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
_BITS = {INT8: "w8a16", INT4: "w4a16"}
_GEMM, _CHANNELS, _GROUPS = "SmoothQuantGemm", "WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul"


def _kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "w8a8": (_GEMM, {"output_type": TensorProto.BFLOAT16}),
        "w8a8-float32": (_GEMM, {"output_type": TensorProto.FLOAT}),
    }
    for bits, name in _BITS.items():
        found[name] = _CHANNELS, {"weight_type_id": bits}
        found |= {f"{name}-g{g}": (_GROUPS, {"weight_type_id": bits, "group_size": g}) for g in (32, 64, 128)}
    return found


KINDS = _kinds()
"""The op and the attributes of each kind; the names are the library's."""
USUAL = ("w8a8", "w8a16", "w4a16-g128")
"""Kinds of a shape that is given without one."""


def job(product: Product, m: int, dtype: str) -> Job:
    """A call of a product; `dtype`, "bfloat16" or "float16", is of its 16-bit tensors."""
    kind, n, k = product
    op, attrs = KINDS[kind]
    if kind == "w8a8":
        attrs = {"output_type": TensorProto.DataType.Value(dtype.upper())}
    names = ["q", "weight", "scale_a", "scale_w"] if op == _GEMM else ["x", "weight", "scale"]
    return Job(op, kind, REGISTRY[op].attributes_for(names, ["y"], attrs), m, n, k)


def products(models: Sequence[Path], shapes: Sequence[tuple[int, int]], kinds: Sequence[str] = ()) -> list[Product]:
    """What models multiply by, and these N and K in `kinds`, by default the usual ones; sorted.

    Args:
        kinds: of models too only these.

    Raises:
        QpassError: a model has nothing to tune, a kind is not known, or a shape does not fit one.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise QpassError(f"--kind {kind}: there are {', '.join(KINDS)}")
    if not models and not shapes:
        raise QpassError("there is nothing to tune: give rewritten models, or shapes with --shape NxK")
    found = {p for path in models for p in of_model(path) if not kinds or p[0] in kinds}
    for n, k in shapes:
        for kind in kinds or USUAL:
            group = int(KINDS[kind][1].get("group_size", 0)) or (2 if kind.startswith("w4") else 1)
            if not n or not k or k % group:
                wants = f"N, and K a multiple of {group}" if group > 1 else "N and K"
                raise QpassError(f"--shape {f'{n}x' if n else ''}{k}: {kind} wants {wants}, such as 8192x28672")
            found.add((kind, n, k))
    if not found:
        raise QpassError(f"--kind {', '.join(kinds)}: the models have no such products")
    return sorted(found)


def of_model(path: Path) -> set[Product]:
    """The products of a rewritten model's plugin nodes.

    Raises:
        QpassError: it cannot be read, or there are none.
    """
    model = Model.load(path)
    found: set[Product] = set()
    for node in model.nodes():
        if node.domain != DOMAIN or node.op not in (_GEMM, _CHANNELS, _GROUPS):
            continue
        weight = node.inputs[1]
        constant = weight if isinstance(weight, Const) else model.constant(weight)
        if constant is not None:
            found |= {(kind, *_size(constant.shape, node.attrs)) for kind in _kinds_of(node.op, node.attrs)}
    if not found:
        raise QpassError(
            f"{path} has no plugin nodes that multiply by a weight; rewrite it first with `qpass rewrite`, "
            "or give shapes with --shape"
        )
    return found


def _kinds_of(op: str, attrs: Mapping[str, Any]) -> list[str]:
    if op == _GEMM:  # float32 may become float16 in a build for fp16
        return ["w8a8", "w8a8-float32"] if attrs["output_type"] == TensorProto.FLOAT else ["w8a8"]
    name = _BITS[int(attrs["weight_type_id"])]
    return [f"{name}-g{attrs['group_size']}" if op == _GROUPS else name]


def _size(shape: tuple[int, ...], attrs: Mapping[str, Any]) -> tuple[int, int]:
    """N and K of a weight as it is stored."""
    n, k = shape
    return n, k * (2 if attrs.get("weight_type_id") == INT4 else 1)
