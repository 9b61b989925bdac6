"""Write the tables of docs/performance.md and README's lines on speed from the records in results/benchmarks.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.figures import save
from analysis.pages import write_part

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "benchmarks"
FIGURE = RESULTS / "training_step.png"
PART, SPEED_PART = "benchmarks", "speed"
#: The compiled models beside ours, by the names of their arms.
PEERS = {
    "transformers": "transformers' GPT2LMHeadModel",
    "litgpt": "litgpt's GPT",
    "plain": "a plain GPT-2 as in nanoGPT",
}


def main() -> int:
    write_part(PAGE, PART, tables(RESULTS))
    record, larger = (
        json.loads((RESULTS / f"training_step_{size}.json").read_text(encoding="utf-8")) for size in ("30m", "124m")
    )
    write_part(README, SPEED_PART, speed(record, larger))
    draw_speed(record, FIGURE)
    return 0


def peers(record: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a step by label, ours first, all with the default allocator; without arms not installed."""
    group = next(group for group in record["groups"] if "plain" in group)
    seconds = {label: group[name]["median_seconds"] for name, label in PEERS.items() if name in group}
    return {"this framework": group["here, default allocator"]["median_seconds"], **seconds}


def as_trained(record: dict[str, Any]) -> float:
    """Return the seconds of our step as training makes it, which keeps memory mapped between steps."""
    return float(next(group for group in record["groups"] if "plain" in group)["here"]["median_seconds"])


def at_124m(record: dict[str, Any]) -> str:
    """Return how many times as long a step of the others takes at 124M parameters, each beside ours with its allocator."""
    times = []
    for name, ours, label in (
        ("transformers", "here, default allocator", "transformers"),
        ("plain, memory kept", "here", "the plain model"),
    ):
        group = next(group for group in record["groups"] if name in group)
        times.append(f"{label} takes {group[name]['median_seconds'] / group[ours]['median_seconds']:.1f}")
    return f"At 124M parameters, where large products take more of the time, {' and '.join(times)} times as long."


def speed(record: dict[str, Any], larger: dict[str, Any]) -> str:
    """README's lines: how many times as long a step of the others takes."""
    (_, here), (first, seconds), *others = peers(record).items()
    listed = [f"{first} takes {seconds / here:.1f}", *(f"{label} {seconds / here:.1f}" for label, seconds in others)]
    times = ", ".join(listed[:-1]) + f" and {listed[-1]}" if others else listed[0]
    return (
        f"A training step of a GPT-2 of 30M parameters takes {here:.2f} s here ({where(record)}, bf16, AdamW). Compiled as well, "
        f"and measured in turn on the same machine, {times} times as long. {at_124m(larger)} "
        "Training also keeps memory mapped between steps, "
        f"which shortens the step of 30M to {as_trained(record):.2f} s ([how it is measured](docs/performance.md)).\n\n"
        f"![Tokens per second of a training step, here and with others' models]({FIGURE.relative_to(ROOT)})"
    )


def draw_speed(record: dict[str, Any], path: Path) -> None:
    """Write bars of tokens per second."""
    import matplotlib.pyplot as plt

    from benchmarks.training_step import SHAPES

    seconds, tokens = (
        {"this framework, memory kept": as_trained(record), **peers(record)},
        SHAPES[record["size"]].tokens,
    )
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.4 * len(seconds)), layout="constrained")
    rates = [tokens / value for value in seconds.values()]
    colours = ["#c2342b", "#c2342b", *["#8a8f98"] * (len(rates) - 2)]
    bars = axis.barh(list(seconds), rates, color=colours, height=0.65)
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(rates))
    axis.set_xlabel("tokens per second, 30M parameters, compiled, bf16")
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    plt.close(figure)


def tables(results: Path) -> str:
    """The Markdown of all existing records."""
    parts: list[str] = []
    for name, write in (
        ("optimizer_step", optimizer_step),
        ("training_step_30m", training_step),
        ("training_step_124m", training_step),
        ("small_models", small_models),
        ("data", data),
        ("scaling", scaling),
        ("reading", reading),
    ):
        path = results / f"{name}.json"
        if path.exists():
            parts.append("\n".join(write(json.loads(path.read_text(encoding="utf-8")))))
    return "\n\n".join(parts)


def verdict(passed: bool) -> str:
    return "pass" if passed else "**falls short**"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "| " + " | ".join(["---", *["---:"] * (len(header) - 1)]) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def optimizer_step(record: dict[str, Any]) -> Iterator[str]:
    yield f"### Optimizer step, {record['parameters'] / 1e6:.0f}M parameters, fp32 ({where(record)})"
    yield ""
    rows = []
    for name, row in record["steps"].items():
        target = record["targets"].get(name)
        judged = ("", "") if target is None else (f"≤ {target:.2f}", verdict(row["ratio"] <= target))
        rows.append((name, f"{1e3 * row['median_seconds']:.1f}", f"{row['ratio']:.2f}", *judged))
    yield from table(("", "median ms", "ratio", "target", ""), rows)
    if "cold_start" not in record:
        return
    cold, target = record["cold_start"], record["targets"]["cold start, seconds"]
    yield ""
    yield (
        f"First refresh and step of a process: {cold['empty_cache_seconds']:.0f} s with an empty compiler cache "
        f"(≤ {target:.0f} s: {verdict(cold['empty_cache_seconds'] <= target)}), {cold['full_cache_seconds']:.1f} s "
        "with a full one."
    )


def training_step(record: dict[str, Any]) -> Iterator[str]:
    yield f"### Training step, {record['size'].upper()} ({where(record)})"
    yield ""
    rates, targets = record["matrix_product_rate"], record["targets"]
    seen: set[str] = set()
    rows = []
    for group in record["groups"]:
        here = group["here"]["median_seconds"]
        for name, row in group.items():
            if name in seen:
                continue
            seen.add(name)
            ratio, target = row["median_seconds"] / here, targets["throughput"].get(name)
            rate = rates["fp32" if "fp32" in name else "bf16"]
            judged = ("", "") if target is None else (f"≥ {target:.1f}", verdict(ratio >= target))
            used = f"{record['flops'] / row['median_seconds'] / rate:.0%}"
            peak = f"{row['peak_bytes'] / 1e9:.2f}"
            rows.append((name, f"{row['median_seconds']:.2f}", f"{ratio:.2f}", *judged, used, peak))
    yield from table(("", "median s", "here is faster by", "target", "", "utilisation", "peak GB"), rows)
    plain = record["groups"][0]["plain"]["median_seconds"]
    yield ""
    yield (
        f"Utilisation is relative to the measured rate of large products: bf16 {rates['bf16'] / 1e12:.2f}, fp32 "
        f"{rates['fp32'] / 1e12:.2f} TFLOP/s. At that rate the products alone take "
        f"{record['products_alone_seconds']:.2f} s, so the largest possible speed-up over the plain model is "
        f"{plain / record['products_alone_seconds']:.2f}."
    )
    yield ""
    memory = record["memory"]
    kinds = []
    for kind, plain_bytes in memory["plain"].items():
        ratio = memory["here"][kind] / plain_bytes if plain_bytes else float("nan")
        judged = (f"≤ {targets['memory']}", verdict(ratio <= targets["memory"])) if kind == "peak" else ("", "")
        kinds.append((kind, f"{plain_bytes / 1e6:.0f}", f"{memory['here'][kind] / 1e6:.0f}", f"{ratio:.2f}", *judged))
    yield from table(("memory, MB", "plain", "here", "ratio", "target", ""), kinds)
    yield ""
    passes = [
        (name, f"{row['share_of_step']:.1%}", f"≤ {limit:.1%}", verdict(row["share_of_step"] <= limit))
        for name, row in record["curvature"].items()
        for limit in [targets["curvature"][name]]
    ]
    yield from table(("curvature pass, every 10 steps", "share of a step", "target", ""), passes)


def small_models(record: dict[str, Any]) -> Iterator[str]:
    yield f"### Whole runs of small models, {record['steps']} steps with evaluations ({where(record)})"
    yield ""
    targets = record["targets"]
    rows = [
        (
            *(model, f"{row['before']:.1f}", f"{row['here']:.1f}", f"{row['start']:.1f}", f"{row['speed_up']:.2f}"),
            *(verdict(row["speed_up"] >= targets["speed_up"]), f"{row['overhead']:.1%}"),
            verdict(row["overhead"] < targets["overhead"]),
        )
        for model, row in record["models"].items()
    ]
    header = [f"{record['against']}, s", "here, s", "of these start-up, s", "faster by", f"≥ {targets['speed_up']}"]
    yield from table(["", *header, "the framework's own share", f"< {targets['overhead']:.0%}"], rows)


def data(record: dict[str, Any]) -> Iterator[str]:
    preparation = record["preparation"]
    rate = preparation["tokens_per_second"]
    ratio = rate["here"] / rate["plain"]
    yield f"### Data ({where(record)})"
    yield ""
    rows = [
        (
            f"preparation of {preparation['megabytes']:.0f} MB, against `datasets.map` and a loop",
            f"{ratio:.2f}",
            "≥ 2.0",
            verdict(ratio >= 2.0),
        )
    ]
    for row in record["reading"]:
        name = f"reading {row['batch_size']} × {row['sequence_length']}, against memcpy from the page cache"
        rows.append((name, f"{row['ratio']:.2f}", f"≥ {row['target']}", verdict(row["ratio"] >= row["target"])))
        share, most = row["share_of_step"], row["share_target"]
        rows.append(("… its share of a fast rank's step", f"{share:.2%}", f"< {most:.0%}", verdict(share < most)))
    yield from table(("", "ratio", "target", ""), rows)
    peaks = ", ".join(f"{size}: {peak / 2**20:.0f} MiB" for size, peak in preparation["workers_peak_bytes"].items())
    yield ""
    yield f"Peak memory of all workers of a preparation together, by size of the corpus: {peaks}."


def scaling(record: dict[str, Any]) -> Iterator[str]:
    yield f"### How cost grows ({where(record)})"
    yield ""
    rows = []
    for name, row in record["families"].items():
        sizes = f"{row['labels'][0]} to {row['labels'][-1]}"
        found = "**super-linear**" if row["super_linear"] else "linear or less"
        rows.append((name, sizes, f"{row['slope']:.2f}", f"{row['slope_at_the_end']:.2f}", found))
    yield from table(("", "sizes", "slope", "at the end", ""), rows)


def reading(record: dict[str, Any]) -> Iterator[str]:
    yield f"### A report of many runs ({where(record)})"
    yield ""
    target = record["target_seconds"]
    yield (
        f"`scripts/report.py` on {record['runs']:,} runs of {record['lines']:,} lines "
        f"({record['metrics_bytes'] / 1e9:.1f} GB): {record['seconds']:.1f} s (≤ {target:.0f} s: "
        f"{verdict(record['seconds'] <= target)}), peak memory {record['peak_memory_bytes'] / 2**20:,.0f} MiB."
    )


def where(record: dict[str, Any]) -> str:
    described = record["hardware"]
    if described["device"] != "cpu":
        return str(described["gpu"])
    return f"{described['cpu']}, {described['threads']} threads"


if __name__ == "__main__":
    sys.exit(main())
