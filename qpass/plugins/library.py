"""The compiled plugin library: what it holds, and its ops run without TensorRT."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from qpass.errors import QpassError
from qpass.ops.base import Attr

LIBRARY = "libqpass_plugins.so"
DEFAULT = "auto"
"""The variant of calls that ask for none: what the library's table has, else the rule's."""


@dataclass(frozen=True)
class OpInfo:
    """An op as the library declares it. Lists are in the order of nodes.

    `inputs` and `outputs` have the keys name, kind, shape and when, as in `qpass.ops`; `fields` are name → "int" or
    "float".
    """

    name: str
    version: str
    namespace: str
    fields: Mapping[str, str]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    types: tuple[str, ...]
    """Dtypes that its activations may have."""


class _Tensor(ctypes.Structure):
    """qpass::Tensor of cuda_plugins/plugins/op.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    )


class _Choice(ctypes.Structure):
    """qpass_choice of cuda_plugins/kernels/qpass_kernels.h."""

    _fields_ = (("mask", ctypes.c_uint32), ("rule", ctypes.c_int32), ("kind", ctypes.c_int32))


@dataclass(frozen=True)
class Choice:
    """The ways that a call of a matrix product can go, the one that the rule takes, and the kind that tables have it
    under. Ops that go one way only have no variants."""

    variants: tuple[str, ...]
    rule: str
    kind: str


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in GPU memory: its address, dtype and shape. It owns nothing."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def _c(self) -> _Tensor:
        dims = (ctypes.c_int64 * 8)(*self.shape)
        return _Tensor(self.address, helper.np_dtype_to_tensor_dtype(self.dtype), len(self.shape), dims)


class Library:
    """A compiled plugin library. Nothing is loaded until it is asked for what it holds.

    Raises:
        QpassError: the file cannot be loaded, or is no library of qpass's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _c(self) -> ctypes.CDLL:
        try:
            c = ctypes.CDLL(str(self.path))
            c.qpass_describe.restype = ctypes.c_char_p
            c.qpass_node_create.restype = ctypes.c_void_p
            c.qpass_node_create.argtypes = [
                ctypes.c_char_p,
                ctypes.POINTER(ctypes.c_double),
                ctypes.c_int,
                ctypes.c_char_p,
                ctypes.c_size_t,
            ]
            tensors = ctypes.POINTER(_Tensor)
            c.qpass_node_destroy.argtypes = [ctypes.c_void_p]
            c.qpass_node_destroy.restype = None
            c.qpass_node_workspace.restype = ctypes.c_size_t
            c.qpass_node_workspace.argtypes = [ctypes.c_void_p, tensors, tensors]
            c.qpass_node_run.argtypes = [
                ctypes.c_void_p,
                tensors,
                ctypes.c_int,
                tensors,
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_char_p,
                ctypes.c_size_t,
            ]
            c.qpass_node_host_us.argtypes = [
                *c.qpass_node_run.argtypes[:-2],
                ctypes.c_int,
                ctypes.POINTER(ctypes.c_double),
                ctypes.c_char_p,
                ctypes.c_size_t,
            ]
            c.qpass_launch_us.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_double)]
            c.qpass_node_choice.argtypes = [
                ctypes.c_void_p,
                tensors,
                ctypes.c_int,
                tensors,
                ctypes.c_int,
                ctypes.POINTER(_Choice),
                ctypes.c_char_p,
                ctypes.c_size_t,
            ]
            c.qpass_node_set_variant.argtypes = [ctypes.c_void_p, ctypes.c_int]
            c.qpass_node_set_variant.restype = None
            c.qpass_tuned.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_int64] * 3]
        except OSError as error:
            raise QpassError(f"{self.path} cannot be loaded: {error}") from error
        except AttributeError:
            wrong = f"{self.path} is no plugin library of qpass's; make one with `qpass plugins build`"
            raise QpassError(wrong) from None
        return c

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the library says of itself."""
        told: dict[str, Any] = json.loads(self._c.qpass_describe())
        return told

    @property
    def architectures(self) -> tuple[str, ...]:
        """Compute capabilities that it was compiled for, such as ("80", "90a")."""
        return tuple(str(self.description["architectures"]).split())

    @property
    def interface(self) -> str:
        """Of TensorRT's, that its plugins have; a value of `toolchain.INTERFACES`."""
        return str(self.description["interface"])

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all ways that a matrix product can go, in the order of their numbers."""
        return tuple(self.description["variants"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of matrix products that tables of tuning tell apart."""
        return tuple(self.description["kinds"])

    def tuned(self, device: str, kind: str, n: int, k: int, m: int) -> str:
        """The variant that the library's table has for a product on a GPU, by its name; "rule" where it has none."""
        number = int(self._c.qpass_tuned(device.encode(), kind.encode(), n, k, m))
        if number < 0:
            raise QpassError(f"{self.path} has no kind {kind}; it has {', '.join(self.kinds)}")
        return self.variants[number]

    def launch_us(self, stream: int, count: int = 100) -> float:
        """What a launch alone takes of the CPU, µs: of a kernel that does nothing, the median of batches of ten.

        Raises:
            QpassError: CUDA refused.
        """
        us = ctypes.c_double()
        if error := int(self._c.qpass_launch_us(stream, count, ctypes.byref(us))):
            raise QpassError(f"CUDA: a kernel that does nothing could not be launched, error {error}")
        return us.value

    @cached_property
    def ops(self) -> dict[str, OpInfo]:
        """Every op by its name."""
        d = self.description
        return {
            o["name"]: OpInfo(
                o["name"],
                d["version"],
                d["namespace"],
                {f["name"]: f["type"] for f in o["fields"]},
                o["inputs"],
                o["outputs"],
                tuple(d["types"]),
            )
            for o in d["ops"]
        }

    def node(self, op: str, attrs: Mapping[str, Attr]) -> Node:
        """One node of an op, to be run.

        Raises:
            QpassError: the library has no such op, or it has other attributes.
        """
        if op not in self.ops:
            raise QpassError(f"{self.path} has no op {op}; it has {', '.join(self.ops)}")
        fields = self.ops[op].fields
        if missing := [f for f in fields if f not in attrs]:
            raise QpassError(f"{op} needs its attribute '{missing[0]}'")
        return Node(self._c, op, [float(attrs[f]) for f in fields], self.variants, self.kinds)


class Node:
    """An op with its attributes. Tensors are the present ones, in the order of the declaration."""

    def __init__(
        self, c: ctypes.CDLL, op: str, values: Sequence[float], variants: Sequence[str], kinds: Sequence[str]
    ) -> None:
        self._c = c
        self._variants = variants
        self._kinds = kinds
        self._error = ctypes.create_string_buffer(1024)
        array = (ctypes.c_double * len(values))(*values)
        self._node = c.qpass_node_create(op.encode(), array, len(values), self._error, len(self._error))
        if not self._node:
            raise QpassError(self._error.value.decode())

    def __del__(self) -> None:
        if getattr(self, "_node", None):
            self._c.qpass_node_destroy(self._node)

    def workspace(self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> int:
        """Bytes of workspace for these shapes, and for any with fewer tokens."""
        return int(self._c.qpass_node_workspace(self._node, _array(inputs), _array(outputs)))

    def choice(self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> Choice:
        """The variants of a call of these shapes on the current GPU.

        Raises:
            QpassError: types or shapes do not fit the op, or CUDA refused.
        """
        found = _Choice()
        given = self._node, _array(inputs), len(inputs), _array(outputs), len(outputs), ctypes.byref(found)
        if self._c.qpass_node_choice(*given, self._error, len(self._error)):
            raise QpassError(self._error.value.decode())
        names = tuple(name for i, name in enumerate(self._variants) if found.mask >> i & 1)
        return Choice(names, self._variants[found.rule], self._kinds[found.kind] if names else "")

    def take(self, variant: str) -> None:
        """Go by this variant from now on, at calls that can; others fail."""
        self._c.qpass_node_set_variant(self._node, self._variants.index(variant))

    def run(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor], workspace: int = 0, stream: int = 0
    ) -> None:
        """Enqueue on a CUDA stream. The tensors must live until the stream is done.

        Raises:
            QpassError: types or shapes do not fit the op, or CUDA refused, with the op and its shapes.
        """
        self.prepare(inputs, outputs, workspace, stream)()

    def host_us(
        self,
        inputs: Sequence[DeviceTensor],
        outputs: Sequence[DeviceTensor],
        workspace: int = 0,
        stream: int = 0,
        count: int = 100,
    ) -> float:
        """What enqueueing takes of the CPU, µs: the median of batches of ten of `count` calls in a row.

        Raises:
            QpassError: as `run`.
        """
        us = ctypes.c_double()
        arguments = (_array(inputs), len(inputs), _array(outputs), len(outputs), workspace, stream, count)
        error = self._error
        if self._c.qpass_node_host_us(self._node, *arguments, ctypes.byref(us), error, len(error)):
            raise QpassError(error.value.decode())
        return us.value

    def prepare(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor], workspace: int = 0, stream: int = 0
    ) -> Launch:
        """The same call to be made many times."""
        return Launch(self, _array(inputs), len(inputs), _array(outputs), len(outputs), workspace, stream)


class Launch:
    """A call with its arguments made ready."""

    def __init__(self, node: Node, *arguments: Any) -> None:
        self._keep = node
        self._arguments = (node._node, *arguments, node._error, len(node._error))

    def __call__(self) -> None:
        if self._keep._c.qpass_node_run(*self._arguments):
            raise QpassError(self._keep._error.value.decode())


def _array(tensors: Sequence[DeviceTensor]) -> Any:
    return (_Tensor * max(1, len(tensors)))(*(t._c() for t in tensors))
