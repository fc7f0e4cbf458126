"""Mixture of experts: stacks behind a Gather are quantized per expert and channel; near twins stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qpass.graph import Model, rows_of
from qpass.pipeline import rewrite
from qpass.quant_mode import QuantMode
from qpass.quantize import weight as numbers
from qpass.quantize.pack import unpack_int4
from qpass.rules import Lifted
from qpass.spec import QuantSpec
from tests.rules.kit import Array, Graph, error, ops, recipe, run, site

E, N, K, S = 6, 10, 64, 7

SPELLINGS = {
    "weight on the left": "W[ids] [S, N, K] · x [S, K, 1]",
    "transposed on the right": "x [S, 1, K] · W[ids]ᵀ",
    "stored [E, K, N]": "x [S, 1, K] · W[ids] [S, K, N]",
    "stored [E, K, N], on the left": "W[ids]ᵀ · x [S, K, 1]",
    "einsum": "sk,snk->sn",
    "einsum, stored [E, K, N]": "skn,sk->sn",
    "GatherND": "W[ids] by indices [S, 1]",
    "two chosen for each token": "ids [S, 2]",
    "one expert for all": "ids []",
    "transposed stack": "the constant is behind a Transpose",
}
PRESETS = ("w8a16", "w4a16", "w4a16-g128", "w4a16-g128-zp", "w8a8")


def spec_of(preset: str) -> QuantSpec:
    return QuantSpec.preset(preset, 32 if "g128" in preset else None)


def product(spelling: str, dtype: Any = np.float32, opset: int = 18, k: int = K) -> onnx.ModelProto:
    """A model with one product of chosen experts, W as w [E, N, K] or [E, K, N]."""
    g = Graph(opset)
    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    stored_kn = "[E, K, N]" in spelling
    w = g.const(g.random.standard_normal((E, k, N) if stored_kn else (E, N, k)) / 8, dtype, "w")
    if spelling == "transposed stack":
        w = g.op("Transpose", g.const(g.random.standard_normal((E, k, N)) / 8, dtype, "w_kn"), perm=[0, 2, 1])
        g.initializers.pop(0)
    shape = {"two chosen for each token": [S, 2], "one expert for all": [], "GatherND": [S, 1]}.get(spelling, [S])
    ids = g.op("Cast", g.input("ids", shape, TensorProto.INT32), to=TensorProto.INT64)
    if spelling == "GatherND":
        chosen = g.op("GatherND", w, ids, name="choose")
    else:
        chosen = g.op("Gather", w, ids, name="choose", axis=0)
    if spelling.startswith("einsum"):
        x = g.input("x", [S, k], kind)
        terms = (chosen, x) if stored_kn else (x, chosen)
        return g.model(g.op("Einsum", *terms, out="y", equation=SPELLINGS[spelling].partition(" ")[0]))
    if spelling == "one expert for all":
        turned = g.op("Transpose", chosen, perm=[1, 0])
        return g.model(g.op("MatMul", g.input("x", [S, k], kind), turned, out="y"))
    if spelling == "two chosen for each token":
        turned = g.op("Transpose", chosen, perm=[0, 1, 3, 2])
        return g.model(g.op("MatMul", g.input("x", [S, 1, 1, k], kind), turned, out="y"))
    if spelling == "weight on the left":
        return g.model(g.op("MatMul", chosen, g.input("x", [S, k, 1], kind), out="y"))
    if spelling == "stored [E, K, N], on the left":
        turned = g.op("Transpose", chosen, perm=[0, 2, 1])
        return g.model(g.op("MatMul", turned, g.input("x", [S, k, 1], kind), out="y"))
    if spelling == "stored [E, K, N]":
        return g.model(g.op("MatMul", g.input("x", [S, 1, k], kind), chosen, out="y"))
    turned = g.op("Transpose", chosen, perm=[0, 2, 1])
    return g.model(g.op("MatMul", g.input("x", [S, 1, k], kind), turned, out="y"))


def feed(proto: onnx.ModelProto) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    made: dict[str, Array] = {}
    for i in proto.graph.input:
        dims = [d.dim_value for d in i.type.tensor_type.shape.dim]
        if i.name == "ids":
            made[i.name] = rng.integers(-E, E, dims).astype(np.int32)
        else:
            f16 = i.type.tensor_type.elem_type == TensorProto.FLOAT16
            made[i.name] = rng.standard_normal(dims).astype(np.float16 if f16 else np.float32)
    return made


def fake_quantized(w: Array, preset: str) -> Array:
    """The stack [E, N, K] quantized and back, expert by expert."""
    out = np.empty(w.shape, np.float32)
    for e, matrix in enumerate(w):
        if preset in ("w8a16", "w8a8"):
            q, scale = numbers.int8_per_channel(matrix)
            out[e] = q * scale[:, None]
        elif preset == "w4a16":
            packed, scale = numbers.int4_per_channel(matrix)
            out[e] = unpack_int4(packed) * scale[:, None]
        else:
            packed, scale, *zero = numbers.int4_groupwise(matrix, 32, "mse", preset.endswith("zp"))
            codes = unpack_int4(packed).astype(np.float32).reshape(*scale.shape, -1)
            codes = codes - (zero[0][..., None] if zero else 0)
            out[e] = (codes * scale[..., None]).reshape(matrix.shape)
    return out


def with_fake_weights(proto: onnx.ModelProto, preset: str) -> onnx.ModelProto:
    """The model with its stack replaced by what it is after quantization."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    (stored,) = (t for t in out.graph.initializer if len(t.dims) == 3)
    w = numpy_helper.to_array(stored)
    kn = w.shape[1] != N
    fake = fake_quantized(w.transpose(0, 2, 1) if kn else w, preset)
    stored.CopyFrom(numpy_helper.from_array((fake.transpose(0, 2, 1) if kn else fake).astype(w.dtype), stored.name))
    return out


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_equals_fake_quantization(spelling: str, preset: str) -> None:
    proto = product(spelling)
    done, result = run(proto, spec_of(preset))
    s = site(done, "experts")
    assert (s.status, s.rule, s.op) == ("rewritten", "quantize_experts", "DequantizeWeight"), s.reason
    assert error(with_fake_weights(proto, preset), result, feed(proto)) < 1e-6
    assert not done.ledger.of("linear")
    assert "w" not in {t.name for t in result.graph.initializer}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("preset", PRESETS)
def test_fp16(preset: str, opset: int) -> None:
    proto = product("weight on the left", np.float16, opset)
    done, result = run(proto, spec_of(preset))
    assert site(done, "experts").status == "rewritten"
    assert error(with_fake_weights(proto, preset), result, feed(proto)) < 1e-3


def test_structure_and_ledger() -> None:
    proto = product("transposed on the right")
    done, result = run(proto, "w4a16")
    assert ops(result) == ["Cast", "Gather", "Gather", "DequantizeWeight", "Transpose", "MatMul"]
    s = site(done, "experts")
    assert s.nodes == ["choose", "n_transpose_3", "n_y"]
    assert (s.weight.name, s.weight.shape, s.weight.bytes_before) == ("w", [E, N, K], 4 * E * N * K)
    assert s.weight.bytes_after == E * N * K // 2 + 4 * E * N
    assert (done.ledger.bytes_before, done.ledger.bytes_after) == (s.weight.bytes_before, s.weight.bytes_after)
    assert [(t.name, list(t.dims)) for t in result.graph.initializer] == [
        ("n_y.weight", [E, N, K // 2]),
        ("n_y.scale", [E, N]),
    ]
    assert done.ledger.totals()["experts"] == {"sites": 1, "rewritten": 1}
    assert done.ledger.totals()["linear"] == {"sites": 0, "rewritten": 0}


def test_no_transpose_where_the_weight_lies_as_it_is_read() -> None:
    _, result = run(product("weight on the left"))
    assert ops(result) == ["Cast", "Gather", "Gather", "DequantizeWeight", "MatMul"]
    _, result = run(product("weight on the left"), spec_of("w4a16-g128-zp"))
    assert ops(result) == ["Cast", "Gather", "Gather", "Gather", "DequantizeWeight", "MatMul"]


def test_activation_specs_quantize_experts_weight_only() -> None:
    for preset in ("w8a8", "w8a8-static"):
        done, _ = run(product("weight on the left"), preset)  # needs no statistics: there is no other site
        s = site(done, "experts")
        assert s.status == "rewritten"
        assert s.reason.startswith("weights alone, int8 per output channel")


def test_casts_of_the_chosen_weights() -> None:
    """Stored in float16, computed in float32."""
    g = Graph()
    w = g.weight(E, N, K, dtype=np.float16, name="w")
    chosen = g.op("Cast", g.op("Gather", w, g.input("ids", [S], TensorProto.INT32)), to=TensorProto.FLOAT)
    proto = g.model(g.op("MatMul", chosen, g.input("x", [S, K, 1]), out="y"))
    done, result = run(proto)
    assert ops(result) == ["Gather", "Gather", "DequantizeWeight", "MatMul"]
    assert len(site(done, "experts").nodes) == 3
    assert error(proto, result, feed(proto)) < 0.01


class TestFilters:
    @pytest.mark.parametrize("pattern", ["w", "n_y", "choose"])
    def test_exclude(self, pattern: str) -> None:
        proto = product("weight on the left")
        done, result = run(proto, recipe(QuantMode.use_weight_only(), exclude=[pattern]))
        assert site(done, "experts").status == "excluded"
        assert list(result.graph.node) == list(proto.graph.node)

    def test_an_override_of_the_mode(self) -> None:
        overrides = [{"match": "w", "preset": "w4a16-g128", "group_size": 32}]
        _, result = run(product("weight on the left"), recipe(QuantMode.use_weight_only(), overrides=overrides))
        node = next(n for n in result.graph.node if n.op_type == "DequantizeWeight")
        assert {a.name: a.i for a in node.attribute}["group_size"] == 32

    def test_kept(self) -> None:
        overrides = [{"match": "w", "mode": "none"}]
        done, _ = run(product("weight on the left"), recipe(QuantMode.use_weight_only(), overrides=overrides))
        assert site(done, "experts").status == "kept"


def declined(g: Graph, *results: str, spec: Any = "w8a16", kind: str = "experts") -> str:
    """The reason of the only site of a kind; the nodes come out as they went in."""
    proto = g.model(*results)
    done, result = run(proto, spec)
    assert list(result.graph.node) == list(proto.graph.node)
    (s,) = done.ledger.of(kind)
    assert s.status == "declined"
    return str(s.reason)


class TestDeclines:
    def gathered(self, *dims: int, axis: int = 0, dtype: Any = np.float32) -> tuple[Graph, str]:
        g = Graph()
        w = g.weight(*dims, dtype=dtype, name="w")
        return g, g.op("Gather", w, g.input("ids", [S], TensorProto.INT32), axis=axis, out="chosen")

    def test_another_axis(self) -> None:
        g, chosen = self.gathered(E, N, K, axis=1)
        why = declined(g, g.op("MatMul", chosen, g.input("x", [E, K, 1]), out="y"))
        assert why == "the Gather is along axis 1: it takes parts of every expert, not experts"

    def test_a_transpose_of_other_axes(self) -> None:
        g, chosen = self.gathered(E, N, K)
        turned = g.op("Transpose", chosen, perm=[1, 0, 2])
        why = declined(g, g.op("MatMul", turned, g.input("x", [N, K, 1]), out="y"))
        assert why == "the Transpose moves more than the last two dims: [1, 0, 2]"

    def test_both_operands_gathered(self) -> None:
        g, chosen = self.gathered(E, N, K)
        other = g.op("Gather", g.weight(E, K, N), "ids")
        assert declined(g, g.op("MatMul", chosen, other, out="y")).startswith("both operands are gathered")

    def test_the_stack_is_read_elsewhere(self) -> None:
        g, chosen = self.gathered(E, N, K)
        g.op("MatMul", chosen, g.input("x", [S, K, 1]), out="y")
        why = declined(g, "y", g.op("ReduceSum", "w", name="sum", out="z"))
        assert why == "'w' is also read by ReduceSum 'sum', which needs it as it is"

    def test_the_chosen_weights_are_read_elsewhere(self) -> None:
        g, chosen = self.gathered(E, N, K)
        g.op("MatMul", chosen, g.input("x", [S, K, 1]), out="y")
        assert declined(g, "y", g.op("Neg", chosen, out="z")) == "Gather's result 'chosen' is also used by Neg 'n_z'"

    def test_a_reshape_between(self) -> None:
        g, chosen = self.gathered(E, N, K)
        flat = g.op("Reshape", chosen, g.const([-1, K], np.int64), out="flat")
        why = declined(g, g.op("MatMul", flat, g.input("x", [K, 1]), out="y"))
        assert why == f"no pattern takes experts [{E}, {N}, {K}] by way of Reshape 'n_flat'"

    def test_k_that_does_not_fit(self) -> None:
        g, chosen = self.gathered(E, N, 33)
        g.op("MatMul", chosen, g.input("x", [S, 33, 1]), out="y")
        assert declined(g, "y", spec="w4a16").startswith("K=33 is odd")
        g, chosen = self.gathered(E, N, 48)
        g.op("MatMul", chosen, g.input("x", [S, 48, 1]), out="y")
        assert declined(g, "y", spec=spec_of("w4a16-g128")) == "K=48 is not a multiple of the group size 32"

    @pytest.mark.parametrize("equation", ["snk,snk->sn", "snk,sk->snk", "snk,sk->s", "snk,sn->sn"])
    def test_an_einsum_that_is_no_product_with_the_matrix(self, equation: str) -> None:
        g, chosen = self.gathered(E, N, K)
        dims = {"s": S, "n": N, "k": K}
        x = g.input("x", [dims[d] for d in equation.partition("->")[0].split(",")[1]])
        why = declined(g, g.op("Einsum", chosen, x, out="y", equation=equation))
        assert why == f"the Einsum '{equation}' does not sum over one of the experts' dims and give the other"

    def test_a_dense_batch_of_weights_is_no_site_of_experts(self) -> None:
        g = Graph()
        y = g.op("MatMul", g.input("x", [E, S, K]), g.weight(E, K, N, name="w"), out="y")
        assert f"a batch of {E} weights" in declined(g, y, kind="linear")


class TestTwins:
    """What looks alike and is no site."""

    def untouched(self, proto: onnx.ModelProto) -> None:
        done, result = run(proto)
        assert list(result.graph.node) == list(proto.graph.node)
        assert not done.ledger.sites

    def test_an_embedding_table(self) -> None:
        g = Graph()
        h = g.op("Gather", g.weight(20, K), g.input("ids", ["B", S], TensorProto.INT32))
        self.untouched(g.model(g.op("MatMul", h, g.input("x", ["B", K, N]), out="y")))

    def test_chosen_matrices_that_scale(self) -> None:
        g = Graph()
        h = g.op("Gather", g.weight(E, N, K), g.input("ids", [S], TensorProto.INT32))
        self.untouched(g.model(g.op("Mul", h, g.input("x", [S, 1, K]), out="y")))

    def test_a_computed_stack(self) -> None:
        g = Graph()
        h = g.op("Gather", g.input("w", [E, N, K]), g.input("ids", [S], TensorProto.INT32))
        self.untouched(g.model(g.op("MatMul", h, g.input("x", [S, K, 1]), out="y")))


def test_a_stack_shared_by_two_products_is_quantized_once() -> None:
    g = Graph()
    w = g.weight(E, K, K, name="w")
    x = g.input("x", [S, K, 1])
    for name in ("ids", "more"):
        x = g.op("MatMul", g.op("Gather", w, g.input(name, [S], TensorProto.INT32)), x)
    proto = g.model(x)
    done, result = run(proto)
    assert [s.status for s in done.ledger.of("experts")] == ["rewritten"] * 2
    assert [t.data_type for t in result.graph.initializer] == [TensorProto.INT8, TensorProto.FLOAT]
    assert done.ledger.bytes_before == 4 * E * K * K
    assert done.ledger.bytes_after == E * K * K + 4 * E * K
    given = feed(proto) | {"more": np.arange(S, dtype=np.int32) % E}
    assert error(proto, result, given) < 0.02


class TestLoopsOverExperts:
    """Exporters unroll the loop: each expert is a constant row of the stack, hence an ordinary Linear."""

    def unrolled(self, select: str) -> onnx.ModelProto:
        g = Graph()
        w = g.const(g.random.standard_normal((3, K, N)) / 8, name="w")
        x, parts = g.input("x", ["B", K]), []
        if select == "Split":
            g.nodes.append(onnx.helper.make_node("Split", [w], ["p0", "p1", "p2"], "split", axis=0, num_outputs=3))
        for i in range(3):
            if select == "Gather":
                parts.append(g.op("Gather", w, g.const(i, np.int64), axis=0))
                continue
            if select == "Slice":
                bounds = (g.const([v], np.int64) for v in (i, i + 1, 0))
                part = g.op("Slice", w, *bounds)
            else:
                part = f"p{i}"
            parts.append(g.op("Squeeze", part, g.const([0], np.int64)))
        y = g.op("MatMul", x, parts[0])
        for p in parts[1:]:
            y = g.op("Add", y, g.op("MatMul", x, p))
        return g.model(y)

    @pytest.mark.parametrize("select", ["Gather", "Slice", "Split"])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_each_is_a_linear(self, preset: str, select: str) -> None:
        proto = self.unrolled(select)
        done, result = run(proto, spec_of(preset))
        sites = done.ledger.of("linear")
        assert [s.status for s in sites] == ["rewritten"] * 3
        weights = [s.weight for s in sites if s.weight is not None]
        assert {w.name for w in weights} == {"w[0]", "w[1]", "w[2]"}
        assert {w.bytes_before for w in weights} == {4 * K * N}
        assert done.ledger.bytes_after == sum(w.bytes_after for w in weights)
        assert "w" not in {t.name for t in result.graph.initializer}
        assert not {"Gather", "Slice", "Split", "Squeeze"} & set(ops(result))
        assert error(proto, result) < (0.02 if "8" in preset[:2] else 0.2)

    def test_neighbours_may_be_smoothed_each_for_itself(self, tmp_path: Path) -> None:
        """Other rows of one tensor are another weight."""
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            onnx.save(self.unrolled("Gather"), path)
            survey = Lifted(Model.load(path)).survey
        (users,) = survey.sharers.values()
        assert sorted(rows_of(f.weight) for f in users if f.weight is not None) == [(0, 1), (1, 2), (2, 3)]


def moe_block(dtype: Any = np.float32) -> onnx.ModelProto:
    """Router, the two best experts of each token, gate and up in one stack, SiLU, down; weighted and summed."""
    g = Graph()
    hidden, inner = 32, 64
    x = g.input("x", [S, hidden])
    probabilities = g.op("Softmax", g.op("MatMul", x, g.weight(hidden, E, name="router")), axis=-1)
    best = onnx.helper.make_node("TopK", [probabilities, g.const([2], np.int64)], ["share", "expert"], "topk")
    g.nodes.append(best)
    ids = g.op("Reshape", "expert", g.const([-1], np.int64))
    repeated = g.op("Expand", g.op("Unsqueeze", x, g.const([1], np.int64)), g.const([S, 2, hidden], np.int64))
    column = g.op("Reshape", repeated, g.const([2 * S, hidden, 1], np.int64))
    chosen = g.op("Gather", g.weight(E, 2 * inner, hidden, name="gate_up"), ids)
    gate_up = g.op("MatMul", chosen, column, name="gate_up")
    halves = onnx.helper.make_node("Split", [gate_up], ["gate", "up"], "halves", axis=1, num_outputs=2)
    g.nodes.append(halves)
    h = g.op("Mul", g.op("Mul", "gate", g.op("Sigmoid", "gate")), "up")
    down = g.op("MatMul", g.op("Gather", g.weight(E, hidden, inner, name="down"), ids), h, name="down")
    each = g.op("Reshape", down, g.const([S, 2, hidden], np.int64))
    weighted = g.op("Mul", each, g.op("Unsqueeze", "share", g.const([2], np.int64)))
    return g.model(g.op("ReduceSum", weighted, g.const([1], np.int64), keepdims=0, out="y"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_block(preset: str) -> None:
    """A token may meet another expert once the router is quantized; here it stays as it is."""
    proto = moe_block()
    spec = recipe(spec_of(preset).mode, **({"group_size": 32} if "g128" in preset else {}), exclude=["router"])
    done, result = run(proto, spec)
    assert [(s.kind, s.status, s.name) for s in done.ledger.sites] == [
        ("linear", "excluded", "n_matmul_1"),
        ("experts", "rewritten", "gate_up"),
        ("experts", "rewritten", "down"),
    ]
    assert done.ledger.coverage() == 1
    assert error(proto, result) < (0.03 if "8" in preset[:2] else 0.3)


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_in_a_data_file(preset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are streamed, expert by expert, to the same bytes as inside the graph's file."""
    proto, spec = product("stored [E, K, N]", opset=21), spec_of(preset)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, size_threshold=0, location="model.data")
    inside = onnx.load(rewrite(path, spec=spec).output)
    monkeypatch.setattr("qpass.graph.save.INSIDE", 0)
    monkeypatch.setattr("qpass.graph.save.INSIDE_AS_BEFORE", 0)
    monkeypatch.setattr("qpass.graph.save.SMALL", 0)
    monkeypatch.setattr("qpass.graph.stream.BLOCK", 1 << 10)
    outside = rewrite(path, tmp_path / "out.onnx", spec=spec)
    assert outside.saved is not None
    assert any(f.suffix == ".data" for f in outside.saved.files)
    result = onnx.load(outside.output)
    for a, b in zip(inside.graph.initializer, result.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
