"""The Markdown report of a GPU check, and the summary that is printed, the most important first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rsengine.checks.gpu.device import Cpu
from rsengine.checks.gpu.parts import PARTS, Part, Row, outcome
from rsengine.output import counted

SUMMARY_LINES, SHOWN_WRONG, SHOWN_LEFT_OUT = 60, 15, 5
Results = dict[str, dict[str, dict[str, Any]]]  # by part and row


def summary(results: Results) -> list[str]:
    """What a call found, in at most :data:`SUMMARY_LINES` lines that can be read alone."""
    wrong, left = failures(results), missing(results)
    lines = [*story(results)]
    lines.append(f"wrong: {len(wrong)}" if wrong else "nothing is wrong in what was measured")
    lines += [f"  {line[:300]}" for line in wrong[:SHOWN_WRONG]]
    if len(wrong) > SHOWN_WRONG:
        lines.append(f"  and {len(wrong) - SHOWN_WRONG} more")
    lines += [f"left out: {line}"[:300] for line in left_out(results)[:SHOWN_LEFT_OUT]]
    if left:
        lines.append(f"not measured yet; call again to go on: {'; '.join(left)}")
    return [line[:1000] for line in lines[:SUMMARY_LINES]]


def failures(results: Results) -> list[str]:
    """What is wrong, a line each."""
    return [
        f"{part.name}, {name}: {line}"
        for part in PARTS
        for name, row in results.get(part.name, {}).items()
        for line in row.get("wrong", [])
    ]


def missing(results: Results) -> list[str]:
    """The parts with rows that have no result. A dry run has fewer rows."""
    lines = []
    for part in PARTS:
        rows = _possible(results, part)
        names = [row.name for row in rows if row.name not in results.get(part.name, {})]
        if names:
            lines.append(f"{part.name} ({' · '.join(names)})" if len(names) < len(rows) else part.name)
    return lines


def left_out(results: Results) -> list[str]:
    """What could not be measured here, and why."""
    return [
        f"{part.name}, {name}: {row['left_out']}"
        for part in PARTS
        for name, row in results.get(part.name, {}).items()
        if "left_out" in row
    ]


def _possible(results: Results, part: Part) -> list[Row]:
    is_dry_run = _card(results).get("name") == Cpu.name
    return [row for row in part.rows if row.on_cpu or not is_dry_run]


def _card(results: Results) -> dict[str, Any]:
    return results.get("card", {}).get("card", {}).get("device", {})


def story(results: Results) -> Iterator[str]:
    """The lines that matter most."""
    yield from _device_lines(results)
    yield from _baseline_lines(results)
    yield from _profile_lines(results)
    yield from _kernel_lines(results)
    yield from _proof_lines(results)
    yield from _training_lines(results)


def render(results: Results, calls: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    device = _card(results)
    lines = [f"# Measured on {device.get('name', 'a device that did not say its name')}", ""]
    for call in calls:
        lines.append(f"- `{call['command']}`, {call['date']}, {call['seconds']} s, source {call['source']}")
    if "host" in device:
        versions = ", ".join(f"{name} {version}" for name, version in device["host"].items() if version)
        lines.append(f"- {versions}; CUDA {device.get('cuda')}")
        lines.append(f"- clocks: {device.get('clocks')}")
    lines += ["", "## In short", "", *(f"- {line.strip()}" for line in story(results))]
    lines += [f"- **wrong**: {line}" for line in failures(results)]
    lines += [f"- left out: {line}" for line in left_out(results)]
    if left := missing(results):
        lines.append(f"- not measured: {'; '.join(left)}")
    for title, table in (
        ("The step, run in each way", _throughput_table(results)),
        ("Baselines", _baseline_table(results)),
        ("Where the time of a captured step goes", _profile_tables(results)),
        ("Kernels against their bytes and against eager", _kernel_table(results)),
        ("Whole runs", _training_table(results)),
        ("Op benchmarks", _bench_table(results)),
        ("Every row", _row_table(results)),
    ):
        if table:
            lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


# --- the story --------------------------------------------------------------------------------------------------------


def _good(results: Results, part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part that were measured: neither left out nor ended before they had a result."""
    return {
        name: row
        for name, row in results.get(part, {}).items()
        if row.keys() - {"wrong", "seconds", "left_out", "source"}
    }


def _device_lines(results: Results) -> Iterator[str]:
    device = _card(results)
    if device:
        yield (
            f"{device['name']}: a copy moves {device['copy_gb_per_s']:,.0f} GB/s (read and written), a bfloat16 matrix "
            f"product makes {device['product_tflop_per_s']:,.1f} TFLOP/s"
        )


def best_baselines(results: Results) -> dict[int, dict[str, Any]]:
    """The fastest baseline measured at each batch size."""
    best: dict[int, dict[str, Any]] = {}
    for row in _good(results, "baselines").values():
        known = best.get(row["batch_size"])
        if known is None or row["images_per_second"] > known["images_per_second"]:
            best[row["batch_size"]] = row
    return dict(sorted(best.items()))


def _baseline_lines(results: Results) -> Iterator[str]:
    for batch, row in best_baselines(results).items():
        measured = sum(other["batch_size"] == batch for other in _good(results, "baselines").values())
        yield (
            f"batch {batch}: {row['rsengine_images_per_second']:,.0f} images/s, {row['times_faster']:.2f} times "
            f"{row['baseline']} ({row['images_per_second']:,.0f}), the best of {measured} baselines; median of "
            f"{row['rounds']} rounds in turn"
        )


def _profile_lines(results: Results) -> Iterator[str]:
    for name, row in _good(results, "profile").items():
        parts = ", ".join(f"{part['part']} {part['share']:.0%}" for part in row["parts"][:4])
        yield (
            f"{name}: {row['kernels']} kernels a captured step, {row['kernel_us'] / 1e3:.2f} ms of them, idle "
            f"{row['idle_share']:.0%}; {parts}"
        )
        for kernel in row["largest"][:3]:
            of = f" ({', '.join(kernel['parts'])})"
            yield f"  {kernel['share']:.0%} {kernel['count']} × {short(kernel['name'])}, {_rate(kernel, row)}{of}"


def short(name: str, length: int = 80) -> str:
    """A kernel's name without common prefixes; a long one is cut to its beginning and what it computes."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    if len(name) <= length:
        return name
    functors = re.findall(r"\w*(?:[Ff]unctor|_kernel|Ops?\b)\w*", name)
    head = re.match(r"\w*", name)[0]
    inner = [functor for functor in dict.fromkeys(functors) if functor != head]
    return f"{head}<… {' '.join(inner[-2:])} …>"[:length] if inner else name[: length - 1] + "…"


def _rate(kernel: dict[str, Any], row: dict[str, Any]) -> str:
    of_copy = kernel["gb_per_s"] / row["copy_gb_per_s"]
    of_product = kernel["tflop_per_s"] / row["product_tflop_per_s"]
    if of_product > of_copy:
        return f"{kernel['tflop_per_s']:,.1f} TFLOP/s ({of_product:.0%} of the product)"
    return f"{kernel['gb_per_s']:,.0f} GB/s ({of_copy:.0%} of the copy)"


def _cases(results: Results) -> list[dict[str, Any]]:
    return [case for row in _good(results, "kernels").values() for case in row["cases"]]


def _kernel_lines(results: Results) -> Iterator[str]:
    measured = [case for case in _cases(results) if "error" not in case]
    slower = [case for case in measured if case["ours_us"] > case["eager_us"]]
    if measured:
        yield f"kernels: {len(measured) - len(slower)} of {len(measured)} cases are no slower than eager"
    for case in sorted(slower, key=lambda case: case["eager_us"] / case["ours_us"])[:6]:
        yield f"  slower than eager: {case['case']}: {case['ours_us']:.1f} µs, eager {case['eager_us']:.1f}"


def _proof_lines(results: Results) -> Iterator[str]:
    for name, row in _good(results, "equality").items():
        first = row["first_difference"]
        where = "to the bit" if first is None else f"until step {first['step']} ({first['largest']} differs first)"
        yield (
            f"captured against plain, {name}: {counted(row['steps'], 'step')}, equal {where}; "
            "largest difference of a loss "
            f"{row['loss_difference']:.2g}, of a tensor {row['weight_difference']:.2g}"
        )
    for row in _good(results, "processes").values():
        equal = "equal to the bit" if row["difference"] == 0 else f"which differ by {row['difference']:.2g}"
        yield (
            f"two GPUs through {row['backend']}: {row['steps']} captured steps and plain ones, {equal}; batch "
            f"{row['batch_size']} on one {row['images_per_second']:,.0f} images/s, {2 * row['batch_size']} on both "
            f"{row['images_per_second_together']:,.0f}, an efficiency of {row['efficiency']:.0%} with "
            f"{row['all_reduce_mbytes']:.1f} MB of gradients"
        )
    for row in _good(results, "tests").values():
        yield f"kernel tests, natively: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
    for row in _good(results, "overlap").values():
        yield f"{row['overlap']:.0%} of the time of the batches' copies lies under kernels"


def _training_lines(results: Results) -> Iterator[str]:
    for name, row in {**_good(results, "train"), **_good(results, "speedrun")}.items():
        if not row["epochs"]:
            continue
        took = f" in {row['run_seconds']:.1f} s" if row.get("run_seconds") else ""  # the first results lack it
        goal = f", {row['goal']:.2%} after {row['seconds_to_goal']:.1f} s" if row["seconds_to_goal"] is not None else ""
        yield (
            f"{name}, {row['data']}: {row['accuracy'][-1]:.2%} after {counted(row['epochs'][-1], 'epoch')}"
            f"{took}{goal}; {row['images_per_second'][-1]:,.0f} images/s in the last; first step after "
            f"{row['first_step_s']:.1f} s"
        )


# --- the tables -------------------------------------------------------------------------------------------------------


def _table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """``head``: the columns, separated by ``|``; a column of numbers ends in a colon."""
    columns = [column.strip() for column in head.split("|")]
    marks = ["---:" if column.endswith(":") else "---" for column in columns]
    titles = [column.removesuffix(":") for column in columns]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (titles, marks, *escaped)] if rows else []


def _throughput_table(results: Results) -> list[str]:
    rows = []
    for name, row in _good(results, "throughput").items():
        for way, found in row["ways"].items():
            if "images_per_second" not in found:
                rows.append([name, way, found.get("error") or found.get("left_out") or "", "", "", "", "", ""])
                continue
            low, high = found["step_ms_range"]
            idle = f"{found['idle_share']:.0%}" if "idle_share" in found else found.get("profile_error", "")
            numbers = [f"{found['images_per_second']:,.0f}", f"{found['step_ms']:.3f}", f"{low:.3f} to {high:.3f}"]
            numbers += [f"{found['host_ms']:.3f}", str(found.get("kernels", "")), idle, found["host_waits"] or "no"]
            rows.append([name, way, *numbers])
    head = "row | step | images/s: | ms: | range, ms: | host, ms: | kernels: | idle: | host waits"
    rows = [row + [""] * (9 - len(row)) for row in rows]
    return _table(head, rows)


def _baseline_table(results: Results) -> list[str]:
    rows = []
    for row in sorted(_good(results, "baselines").values(), key=lambda r: (r["batch_size"], r["images_per_second"])):
        low, high = row["times_faster_range"]
        rates = f"{row['images_per_second']:,.0f}", f"{row['rsengine_images_per_second']:,.0f}"
        faster = f"{row['times_faster']:.2f} ({low:.2f} to {high:.2f})"
        rows.append([row["baseline"], str(row["batch_size"]), *rates, faster])
    return _table("baseline | batch: | images/s: | rsengine, captured: | rsengine is times faster:", rows)


def _profile_tables(results: Results) -> list[str]:
    lines = []
    for name, row in _good(results, "profile").items():
        lines += [
            f"**{name}**: {row['operators']} operators, {row['kernels']} kernels and copies a step; "
            f"{row['step_ms']:.3f} ms under the profiler, {row['kernel_us'] / 1e3:.3f} ms of kernels, idle "
            f"{row['idle_share']:.1%}. Rates are of an operator's operands and results, each once, shared among its "
            "kernels by their times.",
            "",
        ]
        parts = [[p["part"], f"{p['us']:.1f}", f"{p['share']:.1%}", str(p["kernels"])] for p in row["parts"]]
        lines += [*_table("part of the step | µs: | share: | kernels:", parts), ""]
        kernels = []
        for kernel in row["largest"]:
            numbers = str(kernel["count"]), f"{kernel['us']:.1f}", f"{kernel['share']:.1%}"
            kernels.append(
                [f"`{short(kernel['name'], 100)}`", *numbers, _rate(kernel, row), ", ".join(kernel["parts"])]
            )
        lines += [*_table("kernel | count: | µs: | share: | rate | part", kernels), ""]
    return lines[:-1]


def _kernel_table(results: Results) -> list[str]:
    rows = []
    for case in _cases(results):
        if "error" in case:
            rows.append([case["case"], case["error"], "", "", "", ""])
            continue
        ours, eager, bound = case["ours_us"], case["eager_us"], case["bound_us"]
        ratios = f"{ours / bound:.2f}", f"{eager / ours:.2f}"
        rows.append([case["case"], f"{case['bytes']:,}", f"{bound:.1f}", f"{ours:.1f}", *ratios])
    return _table("case | bytes: | bound, µs: | ours, µs: | ours / bound: | eager / ours:", rows)


def _training_table(results: Results) -> list[str]:
    rows = []
    for name, row in {**_good(results, "train"), **_good(results, "speedrun")}.items():
        for epoch, accuracy, rate, seconds in zip(
            row["epochs"], row["accuracy"], row["images_per_second"], row["evaluation_s"], strict=True
        ):
            rows.append([name, row["data"], str(epoch), f"{accuracy:.2%}", f"{rate:,.0f}", f"{seconds:.2f}"])
    return _table("run | data | epoch: | accuracy (EMA): | images/s: | evaluation, s:", rows)


def _bench_table(results: Results) -> list[str]:
    rows = []
    for part in _good(results, "bench").values():
        for row in part["rows"]:
            faster = [
                f"{name.removeprefix('times_faster_than_')} {value}"
                for name, value in row.items()
                if name.startswith("times_faster_than_")
            ]
            rate = f"{row.get('GB/s', '')}", f"{row.get('of_copy_bandwidth', '')}"
            rows.append([f"`{row['name']}`", f"{row['median_us']:.1f}", str(row["rounds"]), *rate, ", ".join(faster)])
    return _table("benchmark | median, µs: | rounds: | GB/s: | of the copy: | times faster than", rows)


def _row_table(results: Results) -> list[str]:
    rows = []
    for part in PARTS:
        for row in part.rows:
            found = results.get(part.name, {}).get(row.name)
            if found is not None:
                rows.append(
                    [
                        part.name,
                        row.name,
                        outcome(found)[:200],
                        f"{found.get('seconds', 0):.0f}",
                        f"{row.seconds:.0f}",
                        found.get("source", ""),
                    ]
                )
    return _table("part | row | result | s: | predicted, s: | source", rows)
