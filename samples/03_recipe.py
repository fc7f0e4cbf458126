"""Use a YAML recipe: a preset, overrides for some layers, and exclusions.

    python samples/03_recipe.py [--work FOLDER]

The same on the command line: qpass rewrite build/minilm/minilm.onnx --spec samples/recipe.yaml
"""

import argparse
from collections import Counter
from pathlib import Path

from minilm import prepare

import qpass

RECIPE = Path(__file__).with_name("recipe.yaml")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--work", type=Path, default=Path("build/minilm"))
    work = ap.parse_args().work

    spec = qpass.QuantSpec.from_yaml(RECIPE)  # a wrong key or value is an error that names its line
    print(spec.describe())
    done = qpass.rewrite(prepare(work), work / "recipe.onnx", spec=spec)
    for (status, what), n in Counter((s.status, s.op or s.reason) for s in done.ledger.of("linear")).items():
        print(f"{n:3} Linears {status}: {what}")


if __name__ == "__main__":
    main()
