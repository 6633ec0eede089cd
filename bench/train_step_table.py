"""`python -m bench.train_step_table RESULTS.json`: the comparison of training steps as Markdown, in a file for each
kind of processor: ``bench/results/train-step-KIND.md``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(results: dict) -> str:
    """``results``: what pytest-benchmark saved of bench/test_train_step.py."""
    cases = [b["extra_info"] for b in results["benchmarks"] if "rows" in b["extra_info"]]
    processor = results["machine_info"]["cpu"]
    lines = ["# Training steps side by side", ""]
    if cases:
        packages = ", ".join(f"{name} {version}" for name, version in cases[0]["versions"].items())
        lines += [
            f"`make bench-train` on {results['datetime'][:10]}: {processor.get('brand_raw', 'unknown processor')}, "
            f"{cases[0]['threads']} threads; {packages}.",
            "",
            "Each step has a process of its own and runs once a round, in turn. Images/s are medians over the "
            'rounds; "rsengine is" is the median of the ratios taken within each round, with their quartiles. "Of '
            "bf16\" is the rate of the network's multiply-adds (three times the forward pass) over that of a "
            "2048x2048x2048 bfloat16 matrix product measured in the same rounds, the best of ten in a row. The first "
            "step includes compiling and tuning.",
        ]
    for case in cases:
        lines += [
            "",
            f"## {case['case']}",
            "",
            f"{case['multiply_adds'] / 1e6:,.1f} M multiply-adds an image forward; bf16 matrix product "
            f"{case['bf16_matmul_GFLOP/s']} GFLOP/s; {case['rounds']} rounds.",
            "",
            "| step | images/s | of bf16 | rsengine is | first step, s |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, row in case["rows"].items():
            low, middle, high = row["rsengine_is_times_faster"]
            faster = "" if name == "rsengine" else f"{middle}x ({low} to {high})"
            lines.append(
                f"| {name} | {row['images/s']} | {row['of_bf16_matmul']:.1%} | {faster} | {row['first_step_s']} |"
            )
    return "\n".join(lines) + "\n"


def kind(processor: dict) -> str:
    """Vendor and instructions for bfloat16 of a processor as pytest-benchmark describes it, for a file's name."""
    flags = set(processor.get("flags", ()))
    vendor = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(processor.get("vendor_id_raw", ""), "other")
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16")
    return "-".join([vendor, next((name for name in known if name in flags), "plain").replace("_", "-")])


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path = RESULTS / f"train-step-{kind(results['machine_info']['cpu'])}.md"
    path.write_text(table(results), encoding="utf-8")
    print(path)
