"""Puts a run of gpu_suite.sh into one file and prints what stands out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.rows import read_rows


def main(folder: Path) -> None:
    rows = read_rows(folder / "rows.jsonl")
    (folder / "suite.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for row in rows:
        print(shown(row))


def shown(row: dict[str, Any]) -> str:
    part = row.get("part", "first")
    if "unreadable" in row:
        return f"cut off: {row['unreadable']}"
    if "error" in row:
        return f"{part:9} {row.get('system', row.get('peer', ''))}: {row['error']}"
    if "left_out" in row:
        return f"{part:9} left out: {row['left_out']}"
    if "status" in row:
        return f"{part:9} {row['seconds']} s of {row['limit']}, exit status {row['status']}"
    if "environment" in row:
        return f"{part:9} {json.dumps(row['environment'])}"
    if "median" in row:
        return f"{part:9} {row['name']:60} {row['median']:>10} {row['unit']}  ({row['p20']}..{row['p80']})"
    if "same_tokens" in row:
        return (
            f"{part:9} {row['conditional']:10} {row['loop']:7} {'the same tokens' if row['same_tokens'] else 'OTHER'}"
        )
    if "us" in row:
        torch_ratio = f"  {row['speedup_vs_torch']:.2f}x torch" if row["speedup_vs_torch"] else ""
        if "format" in row:
            torch_ratio += f"  {row['format']}"
        if "neurons_kept" in row:
            torch_ratio += f"  {row['neurons_kept']:.0%} of the neurons"
        return (
            f"{part:9} {row['shapes']:14} x{row['batch_size']:<3} kv {row['kv_len']:<6} {row['op']:18} "
            f"{row['us']:9.2f} us {row['gb_per_s']:8.0f} GB/s {row['bandwidth_fraction']:5.2f} of copy{torch_ratio}"
        )
    if "ms_per_token" in row:
        peak = f", {row['peak_floor_ms'] * 1e3:.1f} at peak" if "peak_floor_ms" in row else ""
        return (
            f"{part:9} {row['shapes']:14} {row['system']:22} x{row['batch_size']:<3} at {row['prompt_tokens']:<5} "
            f"skip {row['ffn_skip_ratio']:.3f} {row['ms_per_token'] * 1e3:9.1f} us/token; floor "
            f"{row['floor_ms'] * 1e3:.1f} at the copy's bandwidth{peak}; "
            f"{row['speedup_vs_dense']:.3f}x (ideal {row['ideal_speedup']:.3f}) {row.get('format', '')}"
        )
    if "variant" in row:
        return f"{part:9} {row['shapes']:14} {row['policy']:32} {row['variant']:30} {row['us_per_step']:9.1f} us"
    if "us_from_begin" in row:
        return (
            f"{part:9} {row['shapes']:14} {row['policy']:32} {row['op']:18} {row['us_from_begin']:8.2f} us, "
            f"{row['us_after_previous_end']:8.2f} behind the one before"
        )
    return f"{part:9} {json.dumps(row)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
