"""qpass: a declarative pass that quantizes ONNX transformers into plugin nodes."""
