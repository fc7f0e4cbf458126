"""Random graphs of what transformers are made of: lifting keeps every number, and the ledger names every site once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from qpass.testing import feeds
from tests.rules import activation_spelling
from tests.rules.kit import Graph, check_lift, outputs, run
from tests.rules.spelling import CHOICES, Spelling, write

K = 8
ACTIVATIONS = [s for s in activation_spelling.every() if s.casts == "none"]
Dims = list[int | str]


class Walk:
    """Adds random nodes behind random values. Every value's last dim is known."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.g = Graph(self.random.choice([17, 18, 20]), seed)
        shapes: list[Dims] = [[2, 3, K], ["B", 3, K], ["B", "S", K], [4, K], ["B", K], [2, 2, 3, K]]
        dims = self.random.choice(shapes)
        self.values: list[tuple[str, Dims]] = [(self.g.input("x", dims), dims)]
        self.weights: list[tuple[str, tuple[int, ...]]] = []

    def weight(self, *dims: int) -> str:
        """A weight, one of those before now and then, and sometimes behind a view."""
        old = [w for w, d in self.weights if d == dims]
        w = self.random.choice(old) if old and self.random.random() < 0.3 else self.g.weight(*dims)
        how = self.random.random()
        if how < 0.15:
            w = self.g.op("Identity", w)
        elif how < 0.3 and len(dims) == 2 and dims[0] == dims[1]:
            w = self.g.op("Transpose", w, perm=[1, 0])
        self.weights.append((w, dims))
        return w

    def model(self, length: int) -> onnx.ModelProto:
        steps: list[Callable[[str, Dims], tuple[str, Dims] | None]] = [
            self.matmul, self.matmul, self.gemm, self.norm, self.norm, self.conv1d, self.reshape, self.reshape,
            self.unary, self.add, self.by_shape, self.turn, self.attend, self.widen, self.activation, self.activation,
        ]  # fmt: skip
        for _ in range(length):
            made = self.random.choice(steps)(*self.random.choice(self.values[-4:]))
            if made is not None:
                self.values.append(made)
        used = {i for n in self.g.nodes for i in n.input}
        ends = [v for v, _ in self.values if v not in used or self.random.random() < 0.1]
        return self.g.model(*(self.g.op("Identity", v) for v in ends))

    def matmul(self, x: str, d: Dims) -> tuple[str, Dims]:
        k, n = int(d[-1]), self.random.choice([K, K, 4, 16])
        y = self.g.op(
            "MatMul", x, self.weight(1, k, n) if len(d) > 2 and self.random.random() < 0.1 else self.weight(k, n)
        )
        if self.random.random() < 0.5:
            bias = self.weight(*self.random.choice([(n,), (1, n), (1,)]))
            y = self.g.op("Add", *self.random.sample([y, bias], 2))
        return y, [*d[:-1], n]

    def gemm(self, x: str, d: Dims) -> tuple[str, Dims] | None:
        if len(d) != 2:
            return None
        k, n, transposed = int(d[-1]), self.random.choice([K, 4]), self.random.randint(0, 1)
        inputs = [x, self.weight(*((n, k) if transposed else (k, n)))]
        inputs += [self.weight(n)] if self.random.random() < 0.6 else []
        alpha = self.random.choice([1.0, 0.5])
        return self.g.op("Gemm", *inputs, transB=transposed, alpha=alpha), [d[0], n]

    def norm(self, x: str, d: Dims) -> tuple[str, Dims]:
        k = int(d[-1])
        if self.random.random() < 0.4:
            bias = [self.g.gain(k)] if self.random.random() < 0.5 else []
            return self.g.op("LayerNormalization", x, self.g.gain(k), *bias), d
        ways = {part: self.random.choice(ways) for part, ways in CHOICES.items() if part not in ("casts", "lead")}
        return write(self.g, x, Spelling(**ways), rank=len(d), k=k), d

    def conv1d(self, x: str, d: Dims) -> tuple[str, Dims]:
        k, n = int(d[-1]), self.random.choice([K, 4])
        flat = self.g.op("Reshape", x, self.g.const([-1, k], np.int64))
        y = self.g.op("Gemm", flat, self.weight(k, n), self.weight(n))
        if sum(not isinstance(i, int) for i in d) <= 1:
            full = self.g.const([i if isinstance(i, int) else -1 for i in d[:-1]] + [n], np.int64)
        else:
            shape = self.g.op("Shape", x)
            lead = [self.g.op("Gather", shape, self.g.const([i], np.int64)) for i in range(len(d) - 1)]
            full = self.g.op("Concat", *lead, self.g.const([n], np.int64), axis=0)
        return self.g.op("Reshape", y, full), [*d[:-1], n]

    def reshape(self, x: str, d: Dims) -> tuple[str, Dims]:
        """To rows, or among groups of rows."""
        k = int(d[-1])
        new: Dims = ["rows", k]
        if all(isinstance(i, int) for i in d):
            rows = int(np.prod([int(i) for i in d[:-1]]))
            new = self.random.choice([[rows, k], d, [1, *d], [rows, 1, k]])
        return self.g.op("Reshape", x, self.g.const([i if isinstance(i, int) else -1 for i in new], np.int64)), new

    def unary(self, x: str, d: Dims) -> tuple[str, Dims]:
        op = self.random.choice(["Relu", "Tanh", "Identity", "Dropout", "Cast", "Slice"])
        if op == "Slice":
            return self.g.op("Slice", x, *(self.g.const(v, np.int64) for v in ([0], [2**63 - 1], [-1], [1]))), d
        return (self.g.op("Cast", x, to=1) if op == "Cast" else self.g.op(op, x)), d

    def activation(self, x: str, d: Dims) -> tuple[str, Dims]:
        s = self.random.choice(ACTIVATIONS)
        up = self.random.choice([v for v, e in self.values if e == d])
        if self.random.random() < 0.5:
            gate, up = (self.g.op("MatMul", x, self.weight(int(d[-1]), K)) for _ in range(2))
            return activation_spelling.write(self.g, gate, up, s), [*d[:-1], K]
        return activation_spelling.write(self.g, x, up, s), d

    def add(self, x: str, d: Dims) -> tuple[str, Dims]:
        return self.g.op("Add", x, self.random.choice([v for v, e in self.values if e == d])), d

    def by_shape(self, x: str, d: Dims) -> tuple[str, Dims]:
        return self.g.op(self.random.choice(["Expand", "Reshape"]), x, self.g.op("Shape", x)), d

    def turn(self, x: str, d: Dims) -> tuple[str, Dims] | None:
        if len(d) < 3:
            return None
        perm = [1, 0, *range(2, len(d))]
        return self.g.op("Transpose", x, perm=perm), [d[i] for i in perm]

    def attend(self, x: str, d: Dims) -> tuple[str, Dims]:
        perm = [*range(len(d) - 2), len(d) - 1, len(d) - 2]
        scores = self.g.op("MatMul", x, self.g.op("Transpose", x, perm=perm))
        return self.g.op("MatMul", self.g.op("Softmax", scores), x), d

    def widen(self, x: str, d: Dims) -> tuple[str, Dims]:
        return self.g.op("Concat", x, x, axis=-1), [*d[:-1], 2 * int(d[-1])]


def check(seed: int) -> None:
    proto = Walk(seed).model(length=6 + seed % 9)
    given = feeds(proto)
    if not all(np.isfinite(x).all() for x in outputs(proto, given)):
        return
    check_lift(proto, rtol=1e-4, inputs=given)
    done, result = run(proto, "w8a8" if seed % 2 else "w8a16")
    before, after = (outputs(m, given) for m in (proto, result))
    assert [x.shape for x in before] == [x.shape for x in after]

    named = Counter(name for s in done.ledger.sites for name in s.nodes)
    known = {t.name for t in proto.graph.initializer}
    for n in proto.graph.node:
        if n.op_type in ("Identity", "Transpose") and n.input[0] in known:
            known.update(n.output)
        if n.op_type == "LayerNormalization" or (n.op_type in ("MatMul", "Gemm") and n.input[1] in known):
            assert named[n.name] == 1, n.name
    assert [s.nodes for s in done.ledger.of("linear") if s.status == "near_miss"] == []
    for s in (*done.ledger.of("mlp"), *done.ledger.of("activation")):
        assert [n for n in s.nodes if named[n] != 1] == []
        assert {done.ledger.sites[i].kind for i in s.parts} <= {"linear"}


@pytest.mark.parametrize("start", range(0, 120, 10))
def test_some(start: int) -> None:
    for seed in range(start, start + 10):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 4000, 100))
def test_many(start: int) -> None:
    for seed in range(start, start + 100):
        check(seed)
