"""Author a rule of your own: find a subgraph, and emit what takes its place.

    python samples/02_own_rule.py

The same file works on the command line: qpass rewrite MODEL --rules samples/02_own_rule.py

The pattern below is a Linear followed by a multiplication with one number, as some exporters write attention's
1/sqrt(d) on the query. The rule folds the number into the weight, so that a single Linear is left to quantize. It runs
after lifting (its pattern holds an `ir.Linear`) and before qpass's own rules, which then see the folded Linear.
"""

from qpass import Const, Emit, Pattern, Quantizer, Value, const, ir, need, rule, scalar, val
from qpass.rewriter import derived
from qpass.testing import apply_rule, model


class ScaledLinear(Pattern):
    """(x · w) · factor: the fields are what the rule gets to see, `y` is the subgraph."""

    x: Value = val("... K")
    w: Const = const("K N")  # seen as [K, N], through Transpose, Cast, Identity and Reshape
    factor: float = scalar(1e-6, 1e6)
    y = ir.Linear(x, w) * factor  # Mul commutes: either order matches


@rule
def fold_factor(m: ScaledLinear, new: Emit, cfg: Quantizer) -> Value:
    """A Linear and the number its result is multiplied with become one WeightOnlyQuantMatmul."""
    need(m.w.dtype.kind == "f", f"the weight is {m.w.dtype}")  # declines, with a reason for the ledger
    folded = derived(m.w, m.w.array * m.factor)  # lazy: computed in blocks when the file is written
    q = cfg.int8(folded)
    return new.WeightOnlyQuantMatmul(m.x, q.weight, q.scale, weight_type_id=1)


def main() -> None:
    proto = model("""
        <ir_version: 10, opset_import: ["" : 18]>
        attention (float[B, S, 64] x) => (float[B, S, 32] q)
        <float[64, 32] w, float factor = {0.125}>
        {
            projected = MatMul(x, w)
            q = Mul(projected, factor)
        }
    """)
    done, result = apply_rule(fold_factor, proto)
    print("before:", *(n.op_type for n in proto.graph.node))
    print("after: ", *(f"{n.domain}.{n.op_type}" for n in result.graph.node))
    for site in done.ledger.sites:
        print(f"ledger: {site.kind} {site.nodes} {site.status} by {site.rule}")


if __name__ == "__main__":
    main()
