"""Build a TensorRT engine from a recipe, with proof that every plugin is in it, and run it where there is a GPU.

    qpass plugins build                                  (once)
    python samples/05_engine.py [--work FOLDER]

Needs `pip install 'qpass[plugins,rtx]'`, and qpass[gpu] to run the engine. TensorRT-RTX builds without a GPU, for
Ampere, Ada and Blackwell; for another GPU build on it with TensorRT itself (`backend="tensorrt"`).
"""

import argparse
from pathlib import Path

import numpy as np
from minilm import prepare

import qpass
import qpass.engine

RECIPE = Path(__file__).with_name("recipe.yaml")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--work", type=Path, default=Path("build/minilm"))
    work = ap.parse_args().work

    spec = qpass.QuantSpec.from_yaml(RECIPE)
    done = qpass.rewrite(prepare(work), work / "recipe.onnx", spec=spec)
    ids = "input_ids"  # what is said of one input's dims holds for the others'
    built = qpass.engine.build_files(
        done.output, min_shapes={ids: (1, 1)}, opt_shapes={ids: (1, 128)}, max_shapes={ids: (32, 256)}
    )
    facts = built.facts
    print(f"{built.engine}: {facts['engine']['bytes'] / 1e6:.1f} MB, built in {facts['seconds']} s")
    print(f"{len(facts['plugin_layers'])} plugin nodes were promised, and all are plugin layers of the engine")
    print(facts["commands"]["load"])

    engine = qpass.engine.Engine(built.engine, cuda_graph=True)
    feeds = {name: np.ones((1, 128), dtype) for name, (dtype, _) in engine.inputs.items()}
    try:
        for name, y in engine.run(feeds).items():
            print(name, y.shape, float(np.linalg.norm(y)))
    except qpass.QpassError as error:
        print(f"not run: {error}")


if __name__ == "__main__":
    main()
