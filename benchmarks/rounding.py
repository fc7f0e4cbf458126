"""What float16 alone does to models with int8 activations: every model of a zoo in w8a8, on the CPU.

    python -m benchmarks.rounding ZOO -o benchmarks/results/rounding.json

Errors are ‖a − b‖ / ‖a‖ of the worst output, of the rewritten model in ONNX Runtime from itself with some activations
rounded to float16: `all` of them, as an engine in float16 has them; `plugins`, what plugins make; `others`, what all
other nodes make, as if plugins handed float32 to each other.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from onnx import NodeProto

import qpass
from benchmarks.record import Record, Row, command
from benchmarks.zoo import Feeds, inputs_of, models_of
from qpass.engine.rounding import rounded
from qpass.ops import DOMAIN
from qpass.runtime import Runner, load
from qpass.verify import Difference

PARTS: dict[str, Callable[[NodeProto], bool]] = {
    "all": lambda _: True,
    "plugins": lambda node: node.domain == DOMAIN,
    "others": lambda node: node.domain != DOMAIN,
}


def measure(model: Path) -> Row:
    """The errors of one model, which has its inputs beside it."""
    feeds = inputs_of(model)
    with tempfile.TemporaryDirectory() as folder:
        spec = qpass.QuantSpec.preset("w8a8")
        path = qpass.rewrite(model, Path(folder) / model.name, spec=spec).output
        exact = load(path)
        names = [[o.name for o in exact.graph.output]]

        def run(part: Callable[[NodeProto], bool] | None) -> Feeds:
            proto = exact if part is None else rounded(path, exact, part)
            return next(iter(Runner(path, proto, names, optimize=False).run(feeds, model.name)))

        wanted = run(None)
        found = {name: run(part) for name, part in PARTS.items()}
    return {"model": model.stem} | {
        name: max(Difference.of(wanted[o], y).relative_error for o, y in outputs.items())
        for name, outputs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="folder of NAME.onnx and NAME.npz with inputs as in:NAME")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--models", default="*_ts*.onnx", help="which of them")
    a = parser.parse_args()
    models = models_of(a.zoo, a.models)
    about = {"command": command("benchmarks.rounding")}
    record = Record(a.output, about, ["model"], [(m.stem,) for m in models], resume=False)
    for model in models:
        record.add(measure(model))


if __name__ == "__main__":
    main()
