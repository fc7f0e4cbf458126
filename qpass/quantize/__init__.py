"""Numbers only: scales, rounding, packing, smoothing. No graph, no ONNX."""
