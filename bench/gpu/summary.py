"""Puts the parts of a run of gpu_suite.sh into one file and prints what stands out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    parts: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == "suite.json":
            continue
        try:
            parts[path.stem] = json.loads(path.read_text())
        except ValueError as error:  # cut off by the time limit
            parts[path.stem] = {"unreadable": str(error)}
    (folder / "suite.json").write_text(json.dumps(parts, indent=1) + "\n")
    for name, entry in parts.get("first", {}).items():
        if isinstance(entry, dict):
            print(f"{name:60} {entry['median']:>10} {entry['unit']}  ({entry['p20']}..{entry['p80']})")
    for stem, part in parts.items():
        for row in part.get("rows", []) if isinstance(part, dict) else []:
            _print_row(stem, row)
    for name in ("build", "test", "sanitizer"):
        log = folder / f"{name}.log"
        if log.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            print(f"{name}: {lines[-1] if lines else 'no output'}")


def _print_row(stem: str, row: dict[str, Any]) -> None:
    if "op" in row:
        print(
            f"{stem:24} {row['shapes']:14} x{row['batch_size']:<3} kv {row['kv_len']:<6} {row['op']:18} "
            f"{row['us']:9.2f} us {row['gb_per_s']:8.0f} GB/s {row['bandwidth_fraction']:5.2f} of copy"
            + (f"  {row['speedup_vs_torch']:.2f}x torch" if row["speedup_vs_torch"] else "")
        )
    elif "ms_per_token" in row:
        print(
            f"{stem:24} {row['system']:22} x{row['batch_size']:<3} skip {row['ffn_skip_ratio']:.3f} "
            f"{row['ms_per_token'] * 1e3:9.1f} us/token {row['bandwidth_fraction']:5.2f} of copy "
            f"{row['speedup_vs_dense']:.3f}x (ideal {row['ideal_speedup']:.3f})"
        )
    elif "prefetch_mb" in row:
        print(
            f"{stem:24} {row['shapes']:14} {row['policy']:40} {row['prefetch_mb']:>4} MB {row['us_per_step']:9.1f} us"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
