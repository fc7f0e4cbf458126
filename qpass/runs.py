"""What rules did in the last run, for `qpass rules`: a small file in the user's cache, never needed for anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qpass import cache


def _file() -> Path:
    return cache.folder() / "last-run.json"


def remember(stats: dict[str, dict[str, float]]) -> None:
    """Keep the rule statistics of a run; a cache that cannot be written is no error."""
    target = _file()
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stats))
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)


def last_run() -> dict[str, dict[str, float]]:
    """The statistics of the last run, empty where there was none."""
    try:
        kept = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
