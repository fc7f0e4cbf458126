"""Engines measured side by side: latency, throughput, memory and layers of quantized engines beside their baseline.

report = bench("model.onnx", Building(presets=["w8a16", "w8a8"]), shapes=[{"input_ids": (1, 128)}])
report.points[0].times_baseline(1)
"""

from qpass.engine.bench.entries import Building
from qpass.engine.bench.job import bench
from qpass.engine.bench.report import Report
from qpass.engine.bench.timing import Method

__all__ = ["Building", "Method", "Report", "bench"]
