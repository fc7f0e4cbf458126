"""The table of tile choices that is compiled in, from what `qpass plugins tune --json` printed on GPUs.

python -m benchmarks.tuning    # writes cuda_plugins/kernels/tuning_defaults.h from cuda_plugins/tuning/*.json
"""

from __future__ import annotations

import json
from pathlib import Path

from qpass.graph.commit import write
from qpass.plugins.compile import source_folder
from qpass.plugins.tune.choice import entries
from qpass.plugins.tune.report import rows_of
from qpass.plugins.tune.table import Tables, merged, to_text

HEADER = """// Made of tuning/*.json by `python -m benchmarks.tuning`; not to be edited.
#pragma once

namespace qpass {{

constexpr const char kMeasured[] =
{lines};

}}  // namespace qpass
"""


def header(folder: Path) -> str:
    """The C++ of a folder's records; several of one GPU are one table, of like products the last by name counts."""
    tables: Tables = {}
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        tables = merged(tables, told["device"], entries(rows_of(told)))
    return HEADER.format(lines="\n".join(f'    {json.dumps(line)[:-1]}\\n"' for line in to_text(tables).splitlines()))


def main() -> None:
    top = source_folder()
    write(top / "kernels" / "tuning_defaults.h", header(top / "tuning").encode())


if __name__ == "__main__":
    main()
