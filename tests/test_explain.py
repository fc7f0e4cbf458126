"""`qpass explain` of spoilt models: whatever is broken, its first line must say so."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests import zoo
from tests.conftest import Run
from tests.rules.kit import Graph
from tests.rules.spelling import Spelling, dtypes, write

K = 64

RULES = Path(__file__).parent / "rewriter" / "only_linears.py"


@dataclass
class Case:
    build: Callable[[Graph], tuple[str, ...]]
    says: str
    """What the first line must say."""
    options: list[str] = field(default_factory=lambda: ["-p", "w8a8"])


def spelt(slip: str, **spelling: str) -> Callable[[Graph], tuple[str, ...]]:
    """A norm written out with a slip, before a Linear."""

    def build(g: Graph) -> tuple[str, ...]:
        s = Spelling(**spelling)
        before, after = dtypes(s)
        h = write(g, g.input("x", [4, 8, K], before), s, slip=slip, k=K)
        return (g.op("MatMul", h, g.weight(K, 8, dtype=np.float16 if after == TensorProto.FLOAT16 else np.float32)),)

    return build


def linear(form: str, weight: Callable[[Graph], str], k: int = K) -> Callable[[Graph], tuple[str, ...]]:
    """A Linear of a form, with a weight [k, 8] of the caller's."""

    def build(g: Graph) -> tuple[str, ...]:
        w = weight(g)
        if form == "gemm":
            return (g.op("Gemm", g.input("x", ["B", k]), w, g.weight(8)),)
        y = g.op("MatMul", g.input("x", ["B", 3, k]), w)
        return (g.op("Add", g.weight(8), y) if form == "biased" else y,)

    return build


def leaked(op: str, **spelling: str) -> Callable[[Graph], tuple[str, ...]]:
    def build(g: Graph) -> tuple[str, ...]:
        h = write(g, g.input("x", ["B", 3, K]), Spelling(**spelling), k=K)
        inner = next(n.output[0] for n in g.nodes if n.op_type == op)
        return (g.op("Add", g.op("MatMul", h, g.weight(K, 8)), inner),)

    return build


def mean_is_read(g: Graph) -> tuple[str, ...]:
    """A second output of a LayerNormalization node that something reads."""
    x = g.input("x", ["B", 3, K])
    g.nodes.append(helper.make_node("LayerNormalization", [x, g.gain(K)], ["h", "mean"], "ln"))
    return (g.op("Add", g.op("MatMul", "h", g.weight(K, 8)), "mean"),)


def fed_epsilon(kind: str) -> Callable[[Graph], tuple[str, ...]]:
    def build(g: Graph) -> tuple[str, ...]:
        y = g.op("MatMul", write(g, g.input("x", ["B", 3, K]), Spelling(kind=kind), k=K), g.weight(K, 8))
        eps = next(t.name for t in g.initializers if numpy_helper.to_array(t).shape == ())
        g.initializers = [t for t in g.initializers if t.name != eps]
        g.input(eps, [])
        return (y,)

    return build


def two_readers(g: Graph) -> tuple[str, ...]:
    h = g.op("LayerNormalization", g.input("x", ["B", 3, K]), g.gain(K))
    return (g.op("Mul", g.op("MatMul", h, g.weight(K, K)), g.op("Softmax", h)),)


def other_bias(g: Graph) -> tuple[str, ...]:
    return (g.op("Add", g.op("MatMul", g.input("x", ["B", 3, K]), g.weight(K, 8)), g.weight(3, 1)),)


def bias_of_rows(g: Graph) -> tuple[str, ...]:
    return (g.op("Gemm", g.input("x", [3, K]), g.weight(K, 8), g.weight(3, 8)),)


def other_gamma(g: Graph) -> tuple[str, ...]:
    return (g.op("LayerNormalization", g.input("x", ["B", 4, K]), g.weight(4, K), axis=-1),)


def gamma_of_rows(g: Graph) -> tuple[str, ...]:
    h = write(g, g.input("x", ["B", K, K]), Spelling(kind="rms"), slip="row_weight", k=K)
    return (g.op("MatMul", h, g.weight(K, 8)),)


def tied(g: Graph) -> tuple[str, ...]:
    table = g.weight(100, K, name="embedding.weight")
    x = g.op("Tanh", g.op("Gather", table, g.input("ids", ["B", 3], TensorProto.INT64)))
    return (g.op("MatMul", x, g.op("Transpose", table, perm=[1, 0])),)


def shared(g: Graph) -> tuple[str, ...]:
    """One weight behind two norms; either would want a smoother of its own."""
    x, w = g.input("x", [2, 5, K]), g.weight(K, 8)
    spread = g.const(np.where(np.arange(K) == 3, 50, 1))
    a = g.op("LayerNormalization", x, spread)
    b = g.op("LayerNormalization", g.op("Tanh", x), g.gain(K))
    return g.op("MatMul", a, w), g.op("MatMul", b, g.op("Identity", w))


def computed(g: Graph) -> str:
    return g.op("Tanh", g.weight(K, 8))


def fed(g: Graph) -> str:
    return g.input("w", [K, 8])


def plain(g: Graph) -> str:
    return g.weight(K, 8, name="proj.weight")


def odd(g: Graph) -> str:
    return g.weight(48, 8)


GROUPS = ["-p", "w4a16-g128"]
EXCLUDED = ["-s", "recipe.yaml"]
AXIS, COMPUTED, FED = "axes is [-2], wants the last axis of 3", "while the model runs", "'w' is a graph input"
CASES = {
    "wrong axis, LayerNorm": Case(spelt("variance_axis"), AXIS),
    "wrong axis, RMSNorm": Case(spelt("variance_axis", kind="rms"), AXIS),
    "wrong axis, Pow and Reciprocal": Case(spelt("variance_axis", square="pow", root="reciprocal"), AXIS),
    "wrong axis, casts": Case(spelt("variance_axis", kind="rms", casts="around"), AXIS),
    "wrong axis, mean": Case(spelt("mean_axis"), AXIS),
    "wrong axis, node": Case(
        lambda g: (g.op("LayerNormalization", g.input("x", [2, 4, K]), g.weight(4, K), axis=1),), "axis is 1, wants"
    ),
    "leaked value, LayerNorm": Case(leaked("Sqrt"), "is also used by Add"),
    "leaked value, RMSNorm": Case(leaked("Reciprocal", kind="rms", root="reciprocal"), "is also used by Add"),
    "leaked value, mean": Case(leaked("ReduceMean", kind="rms"), "is also used by Add"),
    "leaked value, node": Case(mean_is_read, "'mean' is also used by Add"),
    "computed weight, MatMul": Case(linear("matmul", computed), COMPUTED),
    "computed weight, MatMul and Add": Case(linear("biased", computed), COMPUTED),
    "computed weight, Gemm": Case(linear("gemm", computed), COMPUTED),
    "fed weight, MatMul": Case(linear("matmul", fed), FED),
    "fed weight, MatMul and Add": Case(linear("biased", fed), FED),
    "fed weight, Gemm": Case(linear("gemm", fed), FED),
    "fed epsilon, LayerNorm": Case(fed_epsilon("layer"), "eps wants a number in [0, 0.1], got 'c"),
    "fed epsilon, RMSNorm": Case(fed_epsilon("rms"), "eps wants a number in [0, 0.1], got 'c"),
    "unexpected consumer": Case(
        two_readers, "every use must be a Linear, but Softmax '", ["-p", "w8a8", "-r", "rules.py"]
    ),
    "dims of a bias": Case(other_bias, "b wants [N=8], got [3, 1]"),
    "dims of a bias, Gemm": Case(bias_of_rows, "the third input differs from row to row"),
    "dims of a norm, node": Case(other_gamma, "w wants [K=64], got [4, 64]"),
    "dims of a norm, written out": Case(gamma_of_rows, "w wants [K"),
    "shared weight": Case(shared, "unsmoothed: its weight is also used by '", ["-p", "w8a8", "-c", "stats.npz"]),
    "shared weight, tied": Case(tied, "its weight 'embedding.weight' is the embedding's own"),
    "K of no group, MatMul": Case(linear("matmul", odd, 48), "K=48 is not a multiple of the group size", GROUPS),
    "K of no group, Gemm": Case(linear("gemm", odd, 48), "K=48 is not a multiple of the group size", GROUPS),
    "excluded, MatMul": Case(linear("biased", plain), "excluded by exclude[0] 'proj.*'", EXCLUDED),
    "excluded, Gemm": Case(linear("gemm", plain), "excluded by exclude[0] 'proj.*'", EXCLUDED),
}


def _as_built(nodes: list[NodeProto]) -> None: ...


def _as_torchscript(nodes: list[NodeProto]) -> None:
    for i, n in enumerate(nodes):
        n.name = f"/m/layers.{i // 4}/part/{n.op_type}_{i}"


def _unnamed(nodes: list[NodeProto]) -> None:
    for n in nodes:
        n.name = ""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text(RULES.read_text())
    Path("recipe.yaml").write_text("preset: w8a16\nexclude: ['proj.*']\n")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("named", [_as_built, _as_torchscript, _unnamed])
@pytest.mark.parametrize("case", CASES)
def test_the_first_line_names_the_cause(run: Run, case: str, named: Callable[[list[NodeProto]], None]) -> None:
    c, g = CASES[case], Graph()
    results = c.build(g)
    named(g.nodes)
    onnx.save(g.model(*results), "model.onnx")
    if "-c" in c.options:
        np.savez("data.npz", x=np.random.default_rng(0).standard_normal((2, 5, K)).astype(np.float32))
        assert run("calibrate", "model.onnx", "--data", "data.npz", "-o", "stats.npz", "-q").code == 0
    r = run("explain", "model.onnx", *c.options)
    assert r.code == 0, r.err
    assert c.says in r.out.splitlines()[0], r.out


def _norm_axis(p: onnx.ModelProto, pick: random.Random) -> tuple[str, str]:
    n = pick.choice([n for n in p.graph.node if n.op_type in ("ReduceMean", "LayerNormalization")])
    axes = next((a for a in n.attribute if a.name in ("axes", "axis")), None)
    if axes is not None:
        axes.CopyFrom(helper.make_attribute(axes.name, 1 if axes.name == "axis" else [1]))
    elif n.op_type == "ReduceMean":
        p.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis_one"))
        n.input[1] = "axis_one"
    else:
        n.attribute.append(helper.make_attribute("axis", 1))
    return n.name, "wants the last axis of 3"


def _fed_weight(p: onnx.ModelProto, pick: random.Random) -> tuple[str, str]:
    tensors = {t.name: t for t in p.graph.initializer}
    used = [i for n in p.graph.node for i in n.input]
    found = [n for n in p.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in tensors]
    t = tensors[pick.choice([n.input[1] for n in found if used.count(n.input[1]) == 1])]
    p.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    p.graph.initializer.remove(t)
    return t.name, "is a graph input that callers may change"


def _read_inside(p: onnx.ModelProto, pick: random.Random) -> tuple[str, str]:
    v = pick.choice([n.output[0] for n in p.graph.node if n.op_type == "Sqrt"])
    p.graph.output.append(helper.make_tensor_value_info(v, TensorProto.FLOAT, None))
    return v, "is also used by a graph output"


def _cubed(p: onnx.ModelProto, pick: random.Random) -> tuple[str, str]:
    roots = [n.input[0] for n in p.graph.node if n.op_type == "ReduceMean"]
    n = pick.choice([n for n in p.graph.node if n.op_type == "Pow" and n.output[0] in roots])
    p.graph.initializer.append(numpy_helper.from_array(np.array(3, np.float32), "three"))
    n.input[1] = "three"
    return n.name, "wants 2, got 3"


EDITS = {
    "bert_ts": (_norm_axis, _fed_weight),
    "gpt2_ts14": (_norm_axis, _fed_weight, _read_inside, _cubed),
    "llama_dynamo": (_norm_axis, _fed_weight, _read_inside, _cubed),
    "t5_dynamo": (_norm_axis, _fed_weight, _read_inside, _cubed),
}


@zoo.each(*EDITS)
@pytest.mark.parametrize("seed", range(4))
def test_a_real_model_with_one_edit(run: Run, path: Path, seed: int, tmp_path: Path) -> None:
    """Models that nobody prepared, one thing broken at random: the first line names the node and the cause."""
    for edit in EDITS[path.stem]:
        proto = onnx.load(path)
        name, says = edit(proto, random.Random(seed))
        onnx.save(proto, tmp_path / "spoilt.onnx")
        r = run("explain", tmp_path / "spoilt.onnx", "-p", "w8a8")
        first = r.out.splitlines()[0]
        assert says in first, r.out
        assert name in first, r.out


def test_sites_alike_are_told_once(run: Run, tmp_path: Path) -> None:
    g = Graph()
    x = g.input("x", ["B", 3, 48])
    results = [g.op("MatMul", x, g.weight(48, 8), name=f"fc{i}") for i in range(9)]
    onnx.save(g.model(*results), tmp_path / "model.onnx")
    lines = run("explain", tmp_path / "model.onnx", *GROUPS).out.splitlines()
    assert lines[0] == "linear 'fc0' declined: K=48 is not a multiple of the group size 128"
    assert lines[2] == "    and 8 more like it: 'fc1', 'fc2', 'fc3', 'fc4', 'fc5' …"
    assert len(lines) == 3


def test_unnamed_nodes_in_a_branch_are_named_as_in_the_ledger(run: Run, tmp_path: Path) -> None:
    g = Graph()
    g.input("x", ["B", 48])

    def branch(result: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((48, 48), np.float32), f"w_{result}")
        out = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["B", 48])
        node = helper.make_node("MatMul", ["x", weight.name], [result])
        return helper.make_graph([node], result, [], [out], [weight])

    flag = g.input("flag", [], TensorProto.BOOL)
    y = g.op("If", flag, name="", out="y", then_branch=branch("a"), else_branch=branch("b"))
    onnx.save(g.model(y, dims=["B", 48]), tmp_path / "model.onnx")
    lines = run("explain", tmp_path / "model.onnx", *GROUPS).out.splitlines()
    assert "'If@y/then_branch/MatMul@a'" in "".join(lines)
    assert "'If@y/else_branch/MatMul@b'" in "".join(lines)
    assert lines[1].startswith("    weight_only declined at weight_only.py:")
