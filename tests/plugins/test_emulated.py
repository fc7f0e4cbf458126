"""The kernels on an emulated GPU: what `qpass plugins selftest` asks of them, a part of it, where there is none.

It takes minutes, most of them to compile.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from qpass import gpu
from qpass.errors import QpassError
from qpass.ops import REGISTRY
from qpass.ops.base import Attr, Op
from qpass.ops.examples import Case, example, signatures
from qpass.ops.weight_only_quant_matmul import INT8
from qpass.plugins import DeviceTensor, Library
from qpass.plugins.cases import MATMULS, Make, every_case
from qpass.plugins.selftest import LIMITS, OnGpu, Tally, compare, references, relative_error, run, selftest
from qpass.plugins.tune.products import job as product

Array = np.ndarray[Any, Any]


class HostBuffer:
    """Memory of the CPU in place of `gpu.Buffer`'s."""

    def __init__(self, size: int) -> None:
        self.size = size
        behind = 4 << 20  # what is written there breaks the fence, and nothing of the process's
        self._bytes = np.empty(size + 256 + behind, np.uint8)
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


@pytest.fixture
def on_host(emulated: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library with memory of the CPU's; what a GPU would have stopped at is told when it is waited for."""
    fault = ctypes.c_char_p.in_dll(ctypes.CDLL(str(emulated.path)), "emulated_fault")

    def synchronize() -> None:
        if told := fault.value:
            fault.value = None
            raise QpassError(told.decode())

    monkeypatch.setattr(gpu, "Buffer", HostBuffer)
    monkeypatch.setattr(gpu, "synchronize", synchronize)
    return emulated


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
def test_kernels_agree_with_their_references(name: str, on_host: Library) -> None:
    for tally in selftest(on_host, small_cases(name) + (split_cases(REGISTRY[name]) if name in MATMULS else [])):
        assert tally.cases
        assert tally.passed, tally.failures[:3]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 9])
def test_large_values_and_none(tokens: int, on_host: Library) -> None:
    """A large value costs its 128 neighbours half a step of 16 bits at most; what is not finite, its own token alone.

    Three tokens become integers in the product itself, nine in a kernel ahead of it.
    """
    op = REGISTRY["WeightOnlyQuantMatmul"]
    attrs = op.attributes_for(["x", "weight", "scale"], ["y"], {"weight_type_id": INT8})
    case = example(op, attrs, np.dtype(np.float16), lead=(tokens,), n=24, k=256, seed=1)
    x, weight, scale = (np.array(v) for v in case.inputs[:3])
    x[0, 7], x[1, 7], x[1, 200] = 1000, np.inf, np.nan
    weight[3, 7] = 0  # a channel that does not see it
    case = dataclasses.replace(case, inputs=[x, weight, scale, *case.inputs[3:]])
    (y,) = run(on_host, case)
    others = [t for t in range(tokens) if t != 1]
    products = np.abs(weight * scale.reshape(-1, 1)).reshape(24, 2, 128).sum(2)  # of a block, at most, with ones
    steps = np.abs(x[others]).reshape(-1, 2, 128).max(2).astype(np.float64) / (127 * 256 + 127)
    with np.errstate(invalid="ignore"):
        wanted = op.reference(case.inputs, attrs)[0][others].astype(np.float64)
    assert np.isnan(y[1].astype(np.float32)).all()
    assert (np.abs(y[others] - wanted) <= steps @ products.T / 2 + 2e-3 * np.abs(wanted)).all()


STREAMING = ("sm90_split_k", "sm90_mixed")
WEIGHT_ONLY = ("WeightOnlyQuantMatmul", "WeightOnlyGroupwiseQuantMatmul")


def streamed(
    library: Library, case: Case, check: Callable[[list[Array]], None], of: Sequence[str] = STREAMING
) -> list[str]:
    """Have `check` look at the outputs of every variant on streams that can do a case; which these were."""
    there = OnGpu(library, case)
    variants = [v for v in of if v in there.variants]
    for variant in variants:
        check(there.run(variant))
    return variants


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 17, 33, 65, 129, 257])
@pytest.mark.parametrize("name", MATMULS)
def test_products_on_streams(name: str, tokens: int, on_host: Library) -> None:
    """Every shape of tiles, parts of one, K split and whole: results, and nothing written behind outputs and workspace.

    With K above 2048 many tokens have larger tiles; 17 stages of it are no whole number of any two. A long K beside few
    channels is split the most, where other kernels need little of the workspace.
    """
    op = REGISTRY[name]
    asked = [(a, d) for a, d in itertools.product(signatures(op), DTYPES) if output_of(a, d) == d]
    seen: set[str] = set()
    for i, (n, k) in enumerate([(24, 4096), (130, 2176), (256, 1536), (300, 1536), (300, 2176)]):
        attrs, dtype = asked[(i * 7 + tokens * 5) % len(asked)]
        case = example(op, attrs, dtype, lead=(tokens,), n=n, k=k, seed=i)
        tally = Tally(name, dtype.name)
        seen |= {*streamed(on_host, case, partial(compare, case, wanted=references(case), tally=tally))}
    few, of_ints = tokens <= 64, name in WEIGHT_ONLY
    assert seen == {v for v, can in zip(STREAMING, (few, of_ints), strict=True) if can}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_tokens_that_become_integers_in_every_block(name: str, on_host: Library) -> None:
    """Of weights that a large GPU's multiprocessors share: in tiles of 64 and 128 channels, by clusters and not."""
    op = REGISTRY[name]
    signed = itertools.cycle(itertools.product(signatures(op), DTYPES))
    for (m, n, k), _ in itertools.product([(3, 8192, 2048), (8, 11008, 1024), (1, 4096, 2048)], range(5)):
        attrs, dtype = next(signed)
        case = example(op, attrs, dtype, lead=(m,), n=n, k=k, seed=m)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        assert streamed(on_host, case, check, ["sm90_split_k"])


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_small_products_whose_warpgroups_share_k(name: str, on_host: Library) -> None:
    """Fewer stages of K than warpgroups, no whole number of them, and K split among the blocks of a cluster too."""
    signed = itertools.cycle(itertools.product(signatures(REGISTRY[name]), DTYPES))
    sizes = [(17, 64, 128), (33, 130, 384), (128, 72, 640), (100, 200, 1152), (64, 24, 2048)]
    for (m, n, k), _ in itertools.product(sizes, range(5)):
        attrs, dtype = next(signed)
        case = example(REGISTRY[name], attrs, dtype, lead=(m,), n=n, k=k, seed=m)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        assert streamed(on_host, case, check, ["sm90_mixed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "n", "k", "rule"),
    [
        (1, 384, 384, "sm90_mixed"),
        (16, 384, 1536, "sm90_split_k"),
        (17, 384, 1536, "sm90_mixed"),
        (17, 4096, 4096, "sm90_split_k"),
        (128, 4096, 384, "sm90_mixed"),
    ],
)
def test_the_rule_of_small_products(tokens: int, n: int, k: int, rule: str, on_host: Library) -> None:
    """What was faster on an H100 (benchmarks/results/small_h100.json)."""
    job = product(("w8a16", n, k), tokens, "float16")
    tensors = [
        [DeviceTensor(1 << 20, dtype, shape) for dtype, shape in kinds(np.dtype(np.float16)).values()]
        for kinds in (job.inputs, job.outputs)
    ]
    assert on_host.node(job.op, job.attrs).choice(*tensors).rule == rule


@pytest.fixture(params=[2, 5, 8])
def small_gpu(request: pytest.FixtureRequest, on_host: Library) -> Iterator[Library]:
    """On a GPU of so few multiprocessors that products of a test's size are divided among them as large ones are."""
    library = ctypes.CDLL(str(on_host.path))
    device, multiprocessors = (ctypes.c_int.in_dll(library, f"emulated_{n}") for n in ("device", "multiprocessors"))
    before = device.value, multiprocessors.value
    device.value, multiprocessors.value = request.param, request.param
    yield on_host
    device.value, multiprocessors.value = before


@pytest.mark.slow
@pytest.mark.parametrize("name", MATMULS)
def test_products_on_streams_of_a_small_gpu(name: str, small_gpu: Library) -> None:
    """Tile after tile by a block that stays. Tiles of 64, 128 and 192 channels whose tokens become integers in every
    block or in a kernel ahead, with K split among warpgroups and among the blocks of a cluster, and whole.
    """
    op = REGISTRY[name]
    asked = [(a, d) for a, d in itertools.product(signatures(op), DTYPES) if output_of(a, d) == d]
    few = [(1, 300, 1024), (5, 530, 1024), (8, 200, 2048), (8, 1000, 1024)]
    few += [(9, 200, 128), (12, 520, 4096), (13, 260, 4352), (16, 130, 2048)]
    few += [(m, n, 1024) for n in (384, 950, 1500) for m in (4, 14, 30)] + [
        (m, n, 512) for n in (384, 950) for m in (70, 128)
    ]
    seen: set[str] = set()
    for i, (m, n, k) in enumerate([*few, (300, 300, 512), (100, 600, 512)]):
        attrs, dtype = asked[(i * 7 + 3) % len(asked)]
        case = example(op, attrs, dtype, lead=(m,), n=n, k=k, seed=i)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        seen |= {*streamed(small_gpu, case, check)}
    assert seen == {*STREAMING} if name in WEIGHT_ONLY else {"sm90_split_k"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_tiles_of_many_tokens(name: str, small_gpu: Library) -> None:
    """Those that take the least time: of 128, 192 and 256 channels beside as many tokens, one after another by a block
    that stays, and with K split; of odd channels too, which are stored one by one.
    """
    signed = itertools.cycle(itertools.product(signatures(REGISTRY[name]), DTYPES))
    sizes = [(70, 131, 512), (70, 500, 512), (150, 130, 512), (200, 130, 512), (200, 201, 512), (300, 130, 512)]
    sizes += [(300, 385, 512), (450, 200, 512), (70, 1000, 512), (150, 130, 1152), (200, 131, 1152), (300, 620, 512)]
    sizes += [(200, 1000, 512)]
    for m, n, k in sizes:
        attrs, dtype = next(signed)
        case = example(REGISTRY[name], attrs, dtype, lead=(m,), n=n, k=k, seed=m)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        assert streamed(small_gpu, case, check, ["sm90_mixed"])


@pytest.mark.slow
@pytest.mark.parametrize("small_gpu", [3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_stages_that_are_dealt_out(name: str, dtype: np.dtype[Any], small_gpu: Library) -> None:
    """Stream-K, of tiles of 192 and of 256 tokens: of several blocks, the first of which have whole tiles besides, with
    tokens and channels that are no whole tile. Flags are down again in the end, as the next launch wants them.
    """
    library = ctypes.CDLL(str(small_gpu.path))
    flags = [ctypes.c_int.in_dll(library, f"emulated_flags_{n}") for n in ("raised", "lowered")]
    signed = itertools.islice(itertools.cycle(signatures(REGISTRY[name])), DTYPES.index(dtype), None, 5)
    for m, n, k in [(230, 450, 4096), (150, 834, 3584), (200, 386, 5120)]:
        case = example(REGISTRY[name], next(signed), dtype, lead=(m,), n=n, k=k, seed=m)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        before = [f.value for f in flags]
        assert streamed(small_gpu, case, check, ["sm90_mixed"])
        raised, lowered = (f.value - b for f, b in zip(flags, before, strict=True))
        assert raised == lowered > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_tokens_that_become_integers_beside_the_products(name: str, dtype: np.dtype[Any], small_gpu: Library) -> None:
    """Fewer stages than the ring has and many more, a last one that is not whole, and fewer tokens than a tile has.
    Of all plain weights; in tiles of 128 channels, and of 256 or 192 where those are more than multiprocessors."""
    plain = [a for a in signatures(REGISTRY[name]) if not a.get("has_zero") and not a.get("quant_algo")]
    sizes = [(9, 200, 128), (16, 520, 2176), (13, 260, 4224), (12, 130, 1152), (5, 300, 8320), (8, 500, 6144)]
    sizes += [(16, 2000, 512), (11, 1100, 1152), (9, 520, 3200), (16, 950, 1152), (10, 1500, 640), (12, 384, 1408)]
    for (m, n, k), attrs in zip(sizes, itertools.cycle(plain[:: 1 if dtype == DTYPES[0] else -1]), strict=False):
        case = example(REGISTRY[name], attrs, dtype, lead=(m,), n=n, k=k, seed=m)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        assert streamed(small_gpu, case, check, ["sm90_split_k"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_change_places(dtype: np.dtype[Any], small_gpu: Library) -> None:
    """Fewer stages than the ring has and many more, a last one that is not whole; rows of groups that begin at
    multiples of 16 bytes and that do not, and channels that are no whole number of those that are copied together.
    With pre_quant_scale a kernel ahead makes the tokens where these are many."""
    sizes = [(17, 300, 1536), (40, 264, 768), (64, 130, 1280), (33, 520, 2176), (24, 24, 8448), (19, 950, 768)]
    signed = [(name, attrs) for name in WEIGHT_ONLY for attrs in signatures(REGISTRY[name])]
    signed.sort(key=lambda one: int(one[1]["weight_type_id"]))  # else each dtype would see one of them alone
    for i, (name, attrs) in enumerate(signed[DTYPES.index(dtype) :: 2]):
        m, n, k = sizes[i % len(sizes)]
        case = example(REGISTRY[name], attrs, dtype, lead=(m,), n=n, k=k, seed=i)
        check = partial(compare, case, wanted=references(case), tally=Tally(name, dtype.name))
        assert streamed(small_gpu, case, check, ["sm90_split_k"])


def output_of(attrs: Mapping[str, Attr], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What a product with activations of a dtype returns."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(int(attrs["output_type"]))) if "output_type" in attrs else dtype


def extreme_cases(name: str) -> list[tuple[Mapping[str, Attr], np.dtype[Any]]]:
    return list(itertools.product(signatures(REGISTRY[name]), DTYPES))


def changed(case: Case, **tensors: Array) -> Case:
    """A case with other inputs in place of those of these names, where it has them."""
    pairs = zip(case.op.inputs, case.inputs, strict=True)
    return dataclasses.replace(case, inputs=[x if x is None else tensors.get(t.name, x) for t, x in pairs])


def given(case: Case, name: str) -> Array:
    """A copy of an input."""
    pairs = zip(case.op.inputs, case.inputs, strict=True)
    return next(np.array(x) for t, x in pairs if t.name == name and x is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_large_values_beside_small_ones(name: str, on_host: Library) -> None:
    """Made into 16-bit operands, weights leave activations what they are: one that is a thousand times the others costs
    these nothing, and one that is not finite costs its own token alone."""
    for attrs, dtype in extreme_cases(name):
        if any("zero" in t.name and t.present(attrs) for t in REGISTRY[name].inputs):
            continue  # a weight of 0 would count
        case = example(REGISTRY[name], attrs, dtype, lead=(40,), n=24, k=256, seed=2)
        x, weight = given(case, "x"), given(case, "weight")
        x[:, 8] *= 1000  # of weights that are 0: what is left are the others
        weight[:, 4 if weight.shape[1] == 128 else 8] = 0
        x[1, 7], x[39, 200] = np.nan, np.inf
        case = changed(case, x=x, weight=weight)
        with np.errstate(invalid="ignore"):
            (wanted,) = references(case)[1]
        others = [t for t in range(40) if t not in (1, 39)]
        y = OnGpu(on_host, case).run("sm90_mixed")[0].astype(np.float64)
        assert np.isnan(y[1]).all()
        assert not np.isfinite(y[39]).any()
        for t in others:
            assert relative_error(y[t], wanted[t]) <= LIMITS[dtype.name], (attrs, dtype, t)


def parts_agree(case: Case, outputs: list[Array], parts: Sequence[Any]) -> None:
    """The output's limit holds for each of these parts of it by itself."""
    (y,), (wanted,) = outputs, references(case)[1]
    for part in parts:
        assert relative_error(y[part], wanted[part]) <= LIMITS[y.dtype.name], (dict(case.attrs), part)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_ends_of_integers(name: str, on_host: Library) -> None:
    """The least and the largest weights and zero points, on activations of one sign and of both.

    Sums of tokens by zero points that far from int4 weights have no room in 32 bits; what int8 ones leave is 1 or 255.
    """
    for attrs, dtype in extreme_cases(name):
        case = example(REGISTRY[name], attrs, dtype, lead=(20,), n=24, k=256, seed=3)
        x, weight = given(case, "x"), given(case, "weight")
        x[0], x[1] = 1, -1
        int4 = weight.shape[1] == 128
        weight[0], weight[1], weight[2], weight[3] = [-0x78, 0x77] * 2 if int4 else [-128, 127] * 2
        case = changed(case, x=x, weight=weight)
        if any(t.name == "zero" and t.present(attrs) for t in case.op.inputs):
            zero = given(case, "zero")
            zero[0], zero[1], zero[2], zero[3], zero[4] = 127, -128, -127, 126, 0
            case = changed(case, zero=zero)
        check = partial(parts_agree, case, parts=[np.s_[:, i] for i in range(24)])
        assert streamed(on_host, case, check, ("skinny", *STREAMING)) == ["skinny", *STREAMING]


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weights_that_are_their_zero_points(name: str, on_host: Library) -> None:
    """They are nothing: where a zero point's part is taken off in float, its rounding is all that is left."""
    for attrs, dtype in extreme_cases(name):
        if not any(t.name == "zero" and t.present(attrs) for t in REGISTRY[name].inputs):
            continue
        case = example(REGISTRY[name], attrs, dtype, lead=(20,), n=24, k=256, seed=3)
        weight, zero = given(case, "weight"), given(case, "zero")
        int4 = weight.shape[1] == 128
        for channel, code in enumerate((7, -8) if int4 else (127, -128)):
            weight[channel] = (code & 15) * 17 if int4 and code >= 0 else -120 if int4 else code
            zero[channel] = code
        case = changed(case, weight=weight, zero=zero)
        (wanted,) = references(case)[1]
        scale = np.abs(given(case, "scale").reshape(24, -1)).max(1)[:2]
        most = np.abs(given(case, "x").astype(np.float64)).sum(1, keepdims=True) * scale * 128 * 2.0**-22

        def check(outputs: list[Array], wanted: Array = wanted, most: Array = most) -> None:
            off = np.abs(outputs[0].astype(np.float64) - wanted)[:, :2]
            assert (off <= most + 4e-3 * np.abs(wanted[:, :2])).all()  # beside a bias, its rounding

        assert streamed(on_host, case, check, ("skinny", *STREAMING)) == ["skinny", *STREAMING]


@pytest.mark.slow
def test_scales_far_apart(on_host: Library) -> None:
    """Nine orders of magnitude in a channel, of which all tokens but the first see a hundred thousandth of the largest
    and less; and a channel without any."""
    for attrs, dtype in extreme_cases("WeightOnlyGroupwiseQuantMatmul"):
        group = int(attrs["group_size"])
        case = example(REGISTRY["WeightOnlyGroupwiseQuantMatmul"], attrs, dtype, lead=(20,), n=24, k=group * 10, seed=4)
        scale = np.tile(np.logspace(-7, 2, 10, dtype=np.float32), (24, 1))
        scale[1], scale[2], scale[3] = scale[1] * 1.9, -scale[2], 0
        x = given(case, "x")
        x[0] *= 0.01
        x[1:] = np.where(np.repeat(scale[0] <= 1.1e-3, group), x[1:], 0)
        case = changed(case, x=x, scale=scale)
        assert streamed(on_host, case, partial(parts_agree, case, parts=[np.s_[:1], np.s_[1:]])) == list(STREAMING)


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
def test_calls_after_the_first_only_launch(name: str, on_host: Library) -> None:
    """What does not change is asked of CUDA once: questions take longer than what else a call does on the CPU."""
    op = REGISTRY[name]
    call = OnGpu(on_host, example(op, list(signatures(op))[-1], DTYPES[0]))
    questions = ctypes.c_int.in_dll(ctypes.CDLL(str(on_host.path)), "emulated_questions")
    call.enqueue(0)
    assert questions.value
    asked = questions.value
    call.enqueue(0)
    assert questions.value == asked


WORKSPACES = """
import ctypes, sys
from pathlib import Path
import numpy as np
from qpass.ops import REGISTRY
from qpass.ops.examples import example, signatures
from qpass.plugins import DeviceTensor, Library
from qpass.plugins.cases import MATMULS
path, major = sys.argv[1:]
ctypes.c_int.in_dll(ctypes.CDLL(path), "emulated_major").value = int(major)
library = Library(Path(path))
for name in MATMULS:
    op, attrs = REGISTRY[name], list(signatures(REGISTRY[name]))[-1]
    case = example(op, attrs, np.dtype(np.float16), lead=(300,), n=512, k=1024, seed=0)
    inputs = [DeviceTensor(0, x.dtype, x.shape) for x in case.inputs if x is not None]
    outputs = [DeviceTensor(0, d, tuple(s)) for d, s in op.infer(case.kinds, attrs)]
    print(library.node(name, attrs).workspace(inputs, outputs))
"""


@pytest.mark.slow
def test_workspaces_are_the_same_on_every_gpu(emulated: Library) -> None:
    """An engine may run on another GPU than the one it was built on."""
    told = [
        subprocess.run(
            [sys.executable, "-c", WORKSPACES, str(emulated.path), major], capture_output=True, text=True, check=True
        ).stdout
        for major in ("8", "9")
    ]
    assert told[0] == told[1]
    assert all(int(size) > 0 for size in told[0].split())
