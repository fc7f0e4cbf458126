"""What onnx's schemas say of a node: whether it fits another opset's, and the function that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias

from onnx import FunctionProto, NodeProto, TensorProto, TypeProto, helper
from onnx.defs import SchemaError, get_schema

from qpass.engine.opset.scope import Scope
from qpass.graph.walk import all_nodes

Schema: TypeAlias = Any  # onnx.defs.OpSchema, whose stub lacks functions


@cache
def schema_of(op: str, version: int) -> Schema | None:
    try:
        return get_schema(op, version, "")
    except SchemaError:
        return None


def unlike(node: NodeProto, scope: Scope, schema: Schema) -> str | None:
    """Why a node is not one of a schema, None where it is."""
    if later := [a for a in node.attribute if a.name not in schema.attributes]:
        return f"it has {helper.printable_attribute(later[0])}"
    if not schema.min_input <= len(node.input) <= schema.max_input:
        return f"it has {len(node.input)} inputs"
    for given, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(given):
            dtype = scope.type(name).tensor_type.elem_type
            kind = f"tensor({TensorProto.DataType.Name(dtype).lower()})"
            if dtype and kind not in formals[min(i, len(formals) - 1)].types:
                return f"{name} is a {kind}"
    return None


def is_default(attribute: Any, schema: Schema) -> bool:
    known = schema.attributes.get(attribute.name)
    if known is None or not known.default_value.name:
        return False
    same: bool = helper.get_attribute_value(known.default_value) == helper.get_attribute_value(attribute)
    return same


def function_of(call: NodeProto, schema: Schema, opset: int, types: Sequence[TypeProto]) -> FunctionProto:
    """The function that a call is of, its attributes filled in; without nodes where there is none."""
    body: FunctionProto = FunctionProto.FromString(_body_of(call, schema, opset, types))
    _fill(body, call)
    return body


def _body_of(call: NodeProto, schema: Schema, opset: int, types: Iterable[TypeProto]) -> bytes:
    """The function that a schema has for a call; empty where it has none, or where the types do not tell it."""
    body = b""
    if fit := [v for v in schema.function_opset_versions if v <= opset]:
        body = schema.get_function_with_opset_version(max(fit))
    elif fit := [v for v in schema.context_dependent_function_opset_versions if v <= opset]:
        known = [t.SerializeToString() for t in types]
        body = schema.get_context_dependent_function_with_opset_version(max(fit), call.SerializeToString(), known)
    return body


def _fill(body: FunctionProto, call: NodeProto) -> None:
    """Put the attributes of a call where its function refers to them."""
    given = {a.name: a for a in call.attribute}
    for node in all_nodes(body.node):
        for attribute in [a for a in node.attribute if a.ref_attr_name]:
            name, value = attribute.name, given.get(attribute.ref_attr_name)
            if value is None:
                node.attribute.remove(attribute)
            else:
                attribute.CopyFrom(value)
                attribute.name = name
