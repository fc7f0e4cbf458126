"""A model as TensorRT 8.6's parser reads it: opset 17 at most, no local functions, integers that it can see.

There is no table of versions: onnx's schemas say whether a node means the same at the older opset, and have functions
for most operators that it lacks.
"""

from qpass.engine.opset.lowering import lower
from qpass.engine.opset.scope import infer_types

__all__ = ["infer_types", "lower"]
