"""The kernels on an emulated GPU: what `qpass plugins selftest` asks of them, a part of it, where there is none.

It takes minutes, most of them to compile.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from qpass import gpu
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.ops.base import Op
from qpass.ops.examples import example, signatures
from qpass.ops.weight_only_quant_matmul import INT8
from qpass.plugins import DeviceTensor, Library
from qpass.plugins.cases import MATMULS, Make, every_case
from qpass.plugins.selftest import OnGpu, run, selftest
from tests.plugins.emulated import as_cpp, compile_emulated
from tests.plugins.shells import cuda_include

Array = np.ndarray[Any, Any]


class HostBuffer:
    """Memory of the CPU in place of `gpu.Buffer`'s."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes = np.empty(size + 256, np.uint8)
        start = -self._bytes.ctypes.data % 256
        self._bytes = self._bytes[start : start + max(size, 1)]
        self.address = int(self._bytes.ctypes.data)

    def upload(self, x: Array, offset: int = 0) -> None:
        ctypes.memmove(self.address + offset, np.ascontiguousarray(x).ctypes.data, x.nbytes)

    def download(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> Array:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._bytes[offset : offset + count].copy().view(dtype).reshape(shape)

    def fill(self, value: int, offset: int = 0, size: int | None = None) -> None:
        self._bytes[offset : None if size is None else offset + size] = value


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if shutil.which("g++") is None or cuda_include() is None:
        pytest.skip("no g++, or no CUDA headers: pip install nvidia-cuda-runtime")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return compile_emulated(folder)


LARGEST = 1 << 18
"""Elements of an input that are multiplied in seconds."""
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def split_cases(op: Op) -> list[Make]:
    """Products whose K is long enough to be split among blocks, in every signature."""
    found: list[Make] = []
    for attrs, dtype in itertools.product(signatures(op), DTYPES):
        if attrs.get("output_type", code := helper.np_dtype_to_tensor_dtype(dtype)) == code:
            m, n = (1, 3, 9, 20, 40)[len(found) % 5], (130, 70, 24)[len(found) % 3]
            found.append(partial(example, op, attrs, dtype, lead=(m,), n=n, k=1536, seed=m))
    return found


def small_cases(op: str) -> list[Make]:
    """A part of the selftest's."""
    made = [make() for make in every_case([op], quick=True)[::5]]
    small = [c for c in made if max(x.size for x in c.inputs if x is not None) <= LARGEST]
    return [partial(lambda case: case, case) for case in small]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REGISTRY))
def test_kernels_agree_with_their_references(name: str, emulated: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Buffer", HostBuffer)
    monkeypatch.setattr(gpu, "synchronize", lambda: None)
    for tally in selftest(emulated, small_cases(name) + (split_cases(REGISTRY[name]) if name in MATMULS else [])):
        assert tally.cases
        assert tally.passed, tally.failures[:3]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 9])
def test_large_values_and_none(tokens: int, emulated: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large value costs its 128 neighbours half a step of 16 bits at most; what is not finite, its own token alone.

    Three tokens become integers in the product itself, nine in a kernel ahead of it.
    """
    monkeypatch.setattr(gpu, "Buffer", HostBuffer)
    monkeypatch.setattr(gpu, "synchronize", lambda: None)
    op = REGISTRY["WeightOnlyQuantMatmul"]
    attrs = op.attributes_for(["x", "weight", "scale"], ["y"], {"weight_type_id": INT8})
    case = example(op, attrs, np.dtype(np.float16), lead=(tokens,), n=24, k=256, seed=1)
    x, weight, scale = (np.array(v) for v in case.inputs[:3])
    x[0, 7], x[1, 7], x[1, 200] = 1000, np.inf, np.nan
    weight[3, 7] = 0  # a channel that does not see it
    case = dataclasses.replace(case, inputs=[x, weight, scale, *case.inputs[3:]])
    (y,) = run(emulated, case)
    others = [t for t in range(tokens) if t != 1]
    products = np.abs(weight * scale.reshape(-1, 1)).reshape(24, 2, 128).sum(2)  # of a block, at most, with ones
    steps = np.abs(x[others]).reshape(-1, 2, 128).max(2).astype(np.float64) / (127 * 256 + 127)
    with np.errstate(invalid="ignore"):
        wanted = op.reference(case.inputs, attrs)[0][others].astype(np.float64)
    assert np.isnan(y[1].astype(np.float32)).all()
    assert (np.abs(y[others] - wanted) <= steps @ products.T / 2 + 2e-3 * np.abs(wanted)).all()


@pytest.mark.slow
def test_what_enqueueing_takes(emulated: Library) -> None:
    """Here a call does its work, too; what is asked is that it is made as often as said, and timed."""
    attrs = REGISTRY["QuantizePerToken"].attributes_for(["x"], ["q", "scale"], {})
    held = [HostBuffer(3 * 64 * 4), HostBuffer(3 * 64), HostBuffer(3 * 4)]
    dtypes: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.float32)]
    shapes = (3, 64), (3, 64), (3, 1)
    x, q, scale = (DeviceTensor(b.address, d, s) for b, d, s in zip(held, dtypes, shapes, strict=True))
    held[0].fill(0)
    node = emulated.node("QuantizePerToken", attrs)
    assert node.host_us([x], [q, scale], count=2) > 0
    assert emulated.launch_us(0, count=2) > 0
    with pytest.raises(QpassError, match="QuantizePerToken"):
        node.host_us([x], [scale, q], count=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["QuantizePerToken", *MATMULS])
def test_calls_after_the_first_only_launch(name: str, emulated: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not change is asked of CUDA once: questions take longer than what else a call does on the CPU."""
    monkeypatch.setattr(gpu, "Buffer", HostBuffer)
    op = REGISTRY[name]
    call = OnGpu(emulated, example(op, list(signatures(op))[-1], DTYPES[0]))
    questions = ctypes.c_int.in_dll(ctypes.CDLL(str(emulated.path)), "emulated_questions")
    call.enqueue(0)
    assert questions.value
    asked = questions.value
    call.enqueue(0)
    assert questions.value == asked


def test_launches_become_calls() -> None:
    called = "{ emulator::launch({n(1), 2, 0, s}, f<T, 2>, a, g(b)); }"
    assert as_cpp("{ f<T, 2><<<n(1), 2, 0, s>>>(a, g(b)); }") == called
