"""The kernels on a GPU, where there is one: a part of what `qpass plugins selftest` runs, large offsets, and graphs."""

from __future__ import annotations

import numpy as np
import pytest

from qpass import gpu, plugins
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.ops.examples import Array, example, signatures
from qpass.plugins import DeviceTensor, Library
from qpass.plugins.cases import MATMULS, every_case
from qpass.plugins.library import DEFAULT
from qpass.plugins.selftest import OnGpu, Tally, Wrong, compare, references, run, selftest
from qpass.plugins.tune.products import KINDS, job


@pytest.fixture(scope="module")
def compiled() -> Library:
    """The whole library, on a machine that can run it."""
    try:
        gpu.driver()
        return plugins.find(capability=gpu.capability())
    except QpassError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", list(REGISTRY))
def test_kernels_agree_with_their_references(name: str, compiled: Library) -> None:
    for tally in selftest(compiled, every_case([name], quick=True)):
        assert tally.passed, tally.failures[:3]
        if name == "SmoothQuantGemm" or (name in MATMULS and tally.dtype != "float32"):
            assert {DEFAULT, "skinny", "mma"} <= set(tally.variants)


def test_kinds_are_the_librarys(compiled: Library) -> None:
    for kind in KINDS:
        asked = job((kind, 256, 256), 100, "float16")
        dtype = np.dtype(np.float16)
        tensors = [[DeviceTensor(0, *t) for t in side.values()] for side in (asked.inputs(dtype), asked.outputs(dtype))]
        choice = compiled.node(asked.op, asked.attrs).choice(*tensors)
        assert choice.kind == kind
        assert choice.rule in choice.variants
        assert {"skinny", "mma"} <= set(choice.variants)


def test_a_wrong_kernel_is_found(compiled: Library) -> None:
    """The test can fail: with another epsilon, scale or byte the outputs are not the reference's."""
    for case in (make() for name in REGISTRY for make in every_case([name], quick=True)[:1]):
        outputs, wanted = run(compiled, case), references(case)
        compare(case, outputs, wanted, Tally("", ""))
        outputs[0] = outputs[0].copy()
        flat = outputs[0].reshape(-1)
        if flat.dtype == np.int8:
            flat[-1] ^= 0x40
        else:
            flat[-1] = np.nan
        with pytest.raises(Wrong):
            compare(case, outputs, wanted, Tally("", ""))


@pytest.mark.parametrize("name", ["QuantizePerToken", "RmsnormQuantization", "ActivationQuantization"])
def test_what_is_no_number_shows_in_the_scale(name: str, compiled: Library) -> None:
    """An overflow before the op is not turned into plausible integers."""
    op = REGISTRY[name]
    for attrs in (a for a in signatures(op) if a.get("dyn_act_scaling", 1)):
        case = example(op, attrs, np.dtype(np.float16), lead=(3,), k=256)
        x = case.inputs[0]
        assert x is not None
        x[1, 200] = np.nan
        scale = run(compiled, case)[1]
        assert np.isnan(scale).reshape(-1).tolist() == [False, True, False]


def test_more_than_2_31_elements(compiled: Library) -> None:
    """The last rows of an activation of 2^31 + elements are quantized like any others."""
    rows, k = 131_080, 16_392
    op = REGISTRY["QuantizePerToken"]
    attrs = op.attributes_for({"x"}, {"q", "scale"}, {})
    tail = np.random.default_rng(0).normal(size=(3, k)).astype(np.float16)
    x, q, scale = gpu.Buffer(rows * k * 2), gpu.Buffer(rows * k), gpu.Buffer(rows * 4)
    x.fill(0)
    x.upload(tail, (rows - 3) * k * 2)
    f16, i8, f32 = np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.float32)
    inputs = [DeviceTensor(x.address, f16, (rows, k))]
    outputs = [DeviceTensor(q.address, i8, (rows, k)), DeviceTensor(scale.address, f32, (rows, 1))]
    compiled.node(op.name, attrs).run(inputs, outputs)
    gpu.synchronize()
    want = op.reference([tail, None], attrs)
    assert np.array_equal(q.download(i8, (3, k), (rows - 3) * k), want[0])
    assert np.array_equal(scale.download(f32, (3, 1), (rows - 3) * 4), want[1])


def test_a_product_of_more_than_2_31_results(compiled: Library) -> None:
    """The last tokens by the last channels of a GEMM whose result has more than 2^31 elements."""
    m, n, k = 65_600, 32_832, 64
    op = REGISTRY["SmoothQuantGemm"]
    attrs = op.attributes_for({"q", "weight", "scale_a", "scale_w"}, {"y"}, {"output_type": 10})
    rng = np.random.default_rng(0)
    q, w = rng.integers(-128, 128, (m, k)).astype(np.int8), rng.integers(-128, 128, (n, k)).astype(np.int8)
    a, b = rng.uniform(1e-3, 2e-3, (m, 1)).astype(np.float32), rng.uniform(1e-3, 2e-3, n).astype(np.float32)
    buffers = []
    for array in (q, w, a, b):
        buffers.append(gpu.Buffer(array.nbytes))
        buffers[-1].upload(array)
    y = gpu.Buffer(m * n * 2)
    arrays: list[Array] = [q, w, a, b]
    inputs = [DeviceTensor(u.address, v.dtype, v.shape) for u, v in zip(buffers, arrays, strict=True)]
    outputs = [DeviceTensor(y.address, np.dtype(np.float16), (m, n))]
    node = compiled.node(op.name, attrs)
    workspace = gpu.Buffer(node.workspace(inputs, outputs))
    node.run(inputs, outputs, workspace.address)
    gpu.synchronize()
    got = y.download(np.dtype(np.float16), (8, n), (m - 8) * n * 2)
    want = (q[-8:].astype(np.float64) @ w.astype(np.float64).T) * a[-8:] * b
    assert np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want) < 1e-3


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_op_can_be_captured(name: str, compiled: Library) -> None:
    """Nothing allocates or synchronizes: a graph of a call gives what the call gives."""
    for make in every_case([name], quick=True)[::40]:
        there = OnGpu(compiled, make())
        for variant in (DEFAULT, *there.variants):
            want = there.run(variant)
            there.poison()
            graph = gpu.Graph(lambda stream, there=there: there.enqueue(stream.handle))  # type: ignore[misc]
            graph.launch()
            gpu.synchronize()
            for got, expected in zip(there.outputs(), want, strict=True):
                assert np.array_equal(got.view(np.uint8), expected.view(np.uint8))
