"""Read a ledger: what became of every norm and Linear, as data.

    python samples/04_ledger.py [--work FOLDER]

The ledger is JSON (schema version 1) beside the rewritten model; `Ledger.from_json` reads it back.
"""

import argparse
from pathlib import Path

from minilm import prepare

import qpass


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ap.add_argument("--work", type=Path, default=Path("build/minilm"))
    work = ap.parse_args().work

    done = qpass.rewrite(prepare(work), work / "ledger_sample.onnx", spec="w8a8")
    ledger = qpass.Ledger.from_json(done.ledger_path.read_text())

    print(f"coverage {ledger.coverage():.0%}, weights {ledger.bytes_before:,} → {ledger.bytes_after:,} bytes")
    for site in ledger.of("linear"):
        if site.fed_by is not None and site.weight is not None:
            norm = ledger.sites[site.fed_by]
            print(f"{site.weight.name} {site.weight.shape} reads the int8 of {norm.op} '{norm.new_nodes[0]}'")
    for site in ledger.sites:
        if site.status != "rewritten":
            print(f"{site.kind} {site.name}: {site.status}, {site.reason}")


if __name__ == "__main__":
    main()
