"""A plugin of one's own, from rule to engine: an op in Python, a kernel in CUDA, and a rule that emits it.

    qpass plugins build --with samples/softcap/softcap.cu       (once)
    python samples/06_own_plugin.py [--work FOLDER]

softcap/softcap.py declares the op, with its meaning as ONNX nodes and in NumPy, and the rule; softcap.cu declares it
again for TensorRT, with the kernel. The rewritten model runs in ONNX Runtime by the meaning, in TensorRT by the kernel.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import qpass
import qpass.engine
from qpass import plugins
from qpass.testing import model

HERE = Path(__file__).parent
TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
head (float[batch, 64] x) => (float[batch, 100] logits) <float[64, 100] w, float cap = {30.0}>
{
    [lm_head] y = MatMul(x, w)
    [divide] d = Div(y, cap)
    [tanh] t = Tanh(d)
    [multiply] logits = Mul(t, cap)
}
"""


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--work", type=Path, default=Path("build/softcap"))
    work = ap.parse_args().work
    work.mkdir(parents=True, exist_ok=True)

    path = work / "head.onnx"
    onnx.save(model(TEXT), path)
    rules = qpass.load_rules(HERE / "softcap" / "softcap.py")
    done = qpass.rewrite(path, spec="w8a16", rules=rules)
    print("nodes:", *(n.op_type for n in onnx.load(done.output).graph.node))

    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    before, after = (ort.InferenceSession(p).run(None, {"x": x})[0] for p in (path, done.output))
    print(f"relative error in ONNX Runtime: {np.linalg.norm(after - before) / np.linalg.norm(before):.4f}")

    library = plugins.find()
    if "Softcap" not in library.ops:
        print(f"{library.path} has no Softcap; compile it in: qpass plugins build --with samples/softcap/softcap.cu")
        return
    built = qpass.engine.build_files(done.output, library=library.path)
    print("plugin layers:", *built.facts["plugin_layers"].values())


if __name__ == "__main__":
    main()
