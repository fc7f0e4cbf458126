"""From rewritten model to TensorRT engine, with proof that every plugin node is in it; and engines run through pycuda.

engine = qpass.engine.build("model.qpass.onnx")
outputs = engine.run({"input_ids": ids, …})

Several are built faster within `with qpass.engine.Worker() as worker:`, each with `worker=worker`.
"""

from __future__ import annotations

from typing import Any

from qpass.engine.builder import Finished, build_files
from qpass.engine.process import Worker
from qpass.engine.run import Engine

__all__ = ["Engine", "Finished", "Worker", "build", "build_files"]


def build(*args: Any, cuda_graph: bool = False, **keywords: Any) -> Engine:
    """Build an engine, and open it. Arguments and errors as `build_files`; `cuda_graph` as `Engine`."""
    return Engine(build_files(*args, **keywords).engine, cuda_graph)
