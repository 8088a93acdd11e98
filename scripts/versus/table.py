"""Tables in Markdown of what `compare.py` measured: medians, spread, ratios, and why something is missing.

Pure: records in, text out.
"""

import platform
import statistics
import subprocess
import time

PEERS = {
    "vllm": "vLLM CPU",
    "openvino": "OpenVINO GenAI",
    "transformers": "transformers",
    "llama": "llama.cpp",
}
# Of all flags of a processor, those that decide which kernels can run.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def processor():
    """What `lscpu` says, by name."""
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    parts = (line.partition(":") for line in lines.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts}


def has_bf16():
    """Whether the processor multiplies bf16 itself."""
    flags = processor().get("Flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def render(records, failures, options, minutes):
    parts = [heading(records, options, minutes), engines(records, failures)]
    parts += [ratios(records), served(records), reasons(failures)]
    return "\n\n".join(part for part in parts if part)


def heading(records, options, minutes):
    cpu = processor()
    has = set(cpu.get("Flags", "").split())
    flags = ", ".join(flag for flag in FLAGS if flag in has)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {cpu.get('Model name', platform.machine())} (family "
        f"{cpu.get('CPU family')}, model {cpu.get('Model')}), {cpu.get('CPU(s)')} cores: {flags}.",
        f"Model {options.model.name} (random weights), {options.threads} threads for everyone, "
        f"{options.rounds} rounds in {minutes:.0f} minutes; medians (least–most).",
    ]
    chosen = {line["device"] for line in records if line.get("what") == "load"}
    versions = {line["version"] for line in records if "version" in line}
    lines += [f"Chosen by the cluster: {name}." for name in sorted(chosen)]
    for bound in [line for line in records if line.get("what") == "bounds"][:1]:
        of = select(records, "machine", "", what="bounds")
        read = [line["read_gb_per_s"] for line in of]
        multiply = [line["gflop_per_s"] for line in of]
        lines.append(f"Bounds: {cell(read)} GB/s read, {cell(multiply)} GFLOP/s f32 FMA.")
    lines += ["Peers: " + "; ".join(sorted(versions)) + "."] if versions else []
    return "\n".join(lines)


def select(records, server, weights, **want):
    return [
        line
        for line in records
        if line["server"] == server
        and line["weights"] == weights
        and all(line.get(key) == value for key, value in want.items())
    ]


def cell(values, digits=None):
    """`median (least–most)`."""
    if not values:
        return "—"
    show = lambda value: number(value, digits)  # noqa: E731
    if len(values) == 1:
        return show(values[0])
    middle = show(statistics.median(values))
    return f"{middle} ({show(min(values))}–{show(max(values))})"


def number(value, digits=None):
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def rows_of(records):
    seen = {}
    for line in records:
        if line["server"] != "machine" and not line["server"].endswith("HTTP"):
            seen[(line["server"], line["weights"])] = None
    return list(seen)


def columns_of(records):
    decode = sorted({line["batch"] for line in records if line.get("what") == "decode"})
    columns = [("prefill 512", {"what": "prefill", "tokens": 512}, "tokens_per_s")]
    columns += [
        (f"decode, batch {batch}", {"what": "decode", "batch": batch}, "tokens_per_s")
        for batch in decode
    ]
    return columns + [("start to first token (s)", {"what": "start"}, "seconds")]


def values(records, row, column):
    _, want, key = column
    return [line[key] for line in select(records, *row, **want)]


def grid(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def engines(records, failures):
    columns = columns_of(records)
    rows = [
        [*row, *(cell(values(records, row, column)) for column in columns)]
        for row in rows_of(records)
    ]
    known = set(rows_of(records))
    rows += [
        [server, weights or "—", f"not measured: {why}", *[""] * (len(columns) - 1)]
        for (server, weights), why in failures.items()
        if (server, weights) not in known and not server.endswith("HTTP") and server != "machine"
    ]
    heads = ["tokens/s", "weights", *(name for name, _, _ in columns)]
    return grid(heads, rows)


def ratios(records):
    """Of our rows to every peer's with weights of about as many bits; time the other way round."""
    bits = {"bf16": 16, "f16": 16, "int8": 8, "fp8": 8, "q8_0": 8, "int4": 4, "q4_0": 4, "f32": 32}
    columns = columns_of(records)
    ours = [row for row in rows_of(records) if row[0].startswith("cluster")]
    theirs = [row for row in rows_of(records) if not row[0].startswith("cluster")]
    rows = []
    for mine in ours:
        for other in theirs:
            # Whoever computes in f32 here would take 16 bits where the processor can.
            if bits.get(mine[1]) != min(bits.get(other[1], 0), 16):
                continue
            cells = []
            for column in columns:
                pair = [values(records, row, column) for row in (mine, other)]
                if not all(pair):
                    cells.append("—")
                    continue
                of_mine, of_other = (statistics.median(values) for values in pair)
                ratio = of_mine / of_other if column[2] != "seconds" else of_other / of_mine
                cells.append(f"{ratio:.2f}")
            rows.append([f"{mine[0]} {mine[1]} / {other[0]} {other[1]}", *cells])
    if not rows:
        return ""
    return grid(["times as fast", *(name for name, _, _ in columns)], rows)


def served(records):
    """Through HTTP: a row for each server and load."""
    sweeps = [line for line in records if line.get("what") == "sweep"]
    servers = sorted({(line["server"], line["weights"]) for line in sweeps})
    rows = []
    for server, weights in servers:
        sweeps = [line["points"] for line in select(records, server, weights, what="sweep")]
        alone = [1e3 * line["seconds"] for line in select(records, server, weights, what="ttft_512")]
        memory = [line["bytes"] / 1e9 for line in select(records, server, weights, what="memory")]
        for points in zip(*sweeps):
            of = lambda name: [point[name] for point in points if point["completed"]]  # noqa: E731, B023
            keys = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms")
            cells = [cell(of(name)) for name in (*keys, "p99_itl_ms")]
            failed = sum(point["failed"] for point in points)
            name = f"{server}, {weights}"
            cells.insert(1, part_of_engine(records, (server, weights), points))
            rows.append([name, str(points[0]["max_concurrency"]), *cells, str(failed)])
        alone = ["a prompt of 512 alone: TTFT (ms), memory (GB)", cell(alone), cell(memory)]
        rows.append([f"{server}, {weights}", *alone, *[""] * 5])
    if not rows:
        return ""
    heads = ["64 in, 64 out", "at once", "output tokens/s", "of the engine's", "TTFT p50 (ms)", "TTFT p99"]
    return grid([*heads, "ITL p50 (ms)", "ITL p99", "failed"], rows)


def part_of_engine(records, row, points):
    """Output tokens per second through HTTP, as a part of what the same engine does without.

    That is so many decode steps of this batch, and the prompts at the rate of a long one, one after the other: a step that
    holds both can be better.
    """
    engine = (row[0].removesuffix(", HTTP"), row[1])
    streams, done = points[0]["max_concurrency"], [point for point in points if point["completed"]]
    decode = [line["tokens_per_s"] for line in select(records, *engine, what="decode", batch=streams)]
    prefill = [line["tokens_per_s"] for line in select(records, *engine, what="prefill")]
    if not (decode and prefill and done):
        return "—"
    prompt, output = (done[0][f"total_{kind}_tokens"] / done[0]["completed"] for kind in ("input", "output"))
    # The first token comes with the prompt.
    seconds = (output - 1) / statistics.median(decode) + prompt / statistics.median(prefill)
    reached = statistics.median(point["output_throughput"] for point in done)
    return f"{100 * reached * seconds / output:.0f} %"


def reasons(failures):
    lines = [f"- {' '.join(filter(None, row))}: {why}" for row, why in failures.items()]
    return "Not measured, or not to the end:\n\n" + "\n".join(lines) if lines else ""
