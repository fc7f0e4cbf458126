"""TensorProto data types as numpy dtypes, and how many bytes a tensor of them takes in a file."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
DType: TypeAlias = np.dtype[Any]

#: Types that share bytes between elements: bits per element. Everything else takes whole bytes.
_PACKED = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **{
        getattr(TensorProto, name): bits  # newer than the oldest onnx that qpass accepts
        for name, bits in {"INT2": 2, "UINT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}.items()
        if hasattr(TensorProto, name)
    },
}


def to_numpy(data_type: int) -> DType:
    """The numpy (or ml_dtypes) dtype of a TensorProto data type; ValueError for one that onnx has no name for."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError:
        raise ValueError(f"unknown tensor data type {data_type}") from None


def to_onnx(dtype: DType) -> int:
    """The TensorProto data type of a numpy or ml_dtypes dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def packed_bits(dtype: DType) -> int | None:
    """Bits per element where elements share bytes in a file (int4 and the like), else None."""
    return None if dtype.kind in "biufcO" else _PACKED.get(to_onnx(dtype))


def file_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file; sub-byte types are packed over the whole tensor."""
    count = math.prod(shape)
    bits = packed_bits(dtype)
    return count * dtype.itemsize if bits is None else -(-count * bits // 8)


def pack(array: Array) -> memoryview:
    """The file bytes of an array: little-endian, C order, sub-byte types packed. No copy where none is needed."""
    if packed_bits(array.dtype) is not None:
        return memoryview(numpy_helper.from_array(array).raw_data)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def unpack(data: memoryview | Array, dtype: DType, shape: tuple[int, ...]) -> Array:
    """The array of shape `shape` that file bytes hold; a view of `data` where elements take whole bytes."""
    if packed_bits(dtype) is None:
        return np.frombuffer(data, dtype).reshape(shape)
    proto = onnx.TensorProto(data_type=to_onnx(dtype), dims=shape, raw_data=bytes(data))
    return numpy_helper.to_array(proto)
