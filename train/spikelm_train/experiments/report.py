"""What came out of a study: means over seeds, differences to the twins, the Pareto fronts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikelm.config import TENSOR_CLASSES
from spikelm.eval.cli import write_json
from spikelm.eval.kernel import spread
from spikelm.eval.length import require_matplotlib
from spikelm.eval.tables import aligned, percent, size
from spikelm_train.experiments.runner import Runner
from spikelm_train.experiments.study import Run

Records = Mapping[int, Mapping[str, Any]]
"""The finished results of one variant, by seed."""

AXES = {
    "bytes_read_per_token": "weight bytes read per token",
    "ms_per_token": "milliseconds per token, measured",
}


def summarise(runner: Runner) -> dict[str, Any]:
    """Everything the table and the plots show, as JSON types; a row for every variant."""
    variants: dict[str, dict[int, dict[str, Any]]] = {}
    planned = {run.variant: run for run in runner.runs}
    failed: dict[str, str] = {}
    for run in runner.runs:
        found = runner.result(run)
        results = variants.setdefault(run.variant, {})
        if found is not None and found["error"] is None:
            results[run.seed] = found
        elif found is not None:
            failed[str(run)] = found["error"]
    twins = {
        name: best
        for name in runner.study.twins
        if (best := _best(name, planned, variants)) is not None
    }
    decoding = runner.decoding()
    rows = [
        _row(name, planned[name].family, records, {t: (n, variants[n]) for t, n in twins.items()})
        | _timing(name, decoding, twins)
        for name, records in variants.items()
    ]
    for quantity in AXES:
        front = pareto(
            {
                row["variant"]: (row[quantity]["mean"], row["bits_per_byte"]["mean"])
                for row in rows
                if row.get(quantity) and row.get("bits_per_byte")
            }
        )
        for row in rows:
            row.setdefault("on_front", {})[quantity] = row["variant"] in front
    return {
        "study": runner.name,
        "about": runner.study.about,
        "finished": sum(len(records) for records in variants.values()),
        "runs": len(runner.runs),
        "failed": failed,
        "twins": twins,
        "commits": _commits(variants),
        "test_reads": len(runner.test_reads()),
        "decoding_missing": {} if decoding is None else decoding["missing"],
        "rows": rows,
    }


def _row(
    name: str, family: str, records: Records, twins: Mapping[str, tuple[str, Records]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "family": family, "seeds": sorted(records)}
    if not records:
        return row

    def over(value: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
        return mean(map(value, records.values()))

    first = next(iter(records.values()))
    row |= {
        "parameters": first["training"]["parameters"],
        "training_tokens": first["training"]["tokens"],
        "training_flops": first["training"]["flops"],
        "training_seconds": over(lambda r: r["training"]["seconds"]),
        "training_cpu_seconds": over(lambda r: r["training"]["cpu_seconds"]),
        "bits_per_byte": over(lambda r: r["validation"]["bits_per_byte"]),
        "perplexity": over(lambda r: r["validation"]["perplexity"]),
        "weight_bytes_per_token": first["validation"]["weight_bytes_per_token"],
        "bytes_read_per_token": over(lambda r: bytes_read(r["validation"])),
        "skipped_fraction": over(lambda r: r["validation"]["weight_bytes_skipped_fraction"]),
        "silent_fraction": {
            c: over(lambda r, c=c: r["validation"]["silent_fraction"][c])  # type: ignore[misc]
            for c in first["validation"]["silent_fraction"]
        },
        "deltas": {
            title: found
            for title, (twin, theirs) in twins.items()
            if twin != name and (found := delta(records, theirs)) is not None
        },
    }
    tested = [r for r in records.values() if r["test"] is not None]
    if tested:
        row["test_bits_per_byte"] = mean(r["test"]["bits_per_byte"] for r in tested)
    return row


def bytes_read(evaluation: Mapping[str, Any]) -> float:
    """Weight bytes that a token reads on average."""
    total: float = evaluation["weight_bytes_per_token"]
    return total * (1 - float(evaluation["weight_bytes_skipped_fraction"]))


def mean(values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {"mean": statistics.fmean(found), "lowest": min(found), "highest": max(found)}


def delta(ours: Records, theirs: Records) -> dict[str, Any] | None:
    """Our bits per byte and perplexity beside a twin's, seed by seed, as the same seed draws the
    same data; None without a common seed. Perplexities compare for the same tokens alone.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    pairs = [(ours[seed]["validation"], theirs[seed]["validation"]) for seed in seeds]
    same_tokens = all(a["tokens"] == b["tokens"] for a, b in pairs)
    flops = [r[seeds[0]]["training"]["flops"] for r in (ours, theirs)]
    return {
        "seeds": seeds,
        "bits_per_byte": mean(a["bits_per_byte"] - b["bits_per_byte"] for a, b in pairs),
        "perplexity_percent": mean(100 * (a["perplexity"] / b["perplexity"] - 1) for a, b in pairs)
        if same_tokens
        else None,
        "training_flops": flops[0] / flops[1],
    }


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (x, y) that no other beats in one without losing in the other; less
    is better, in the order of x.
    """
    front: list[str] = []
    lowest = float("inf")
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < lowest:
            front.append(name)
            lowest = y
    return front


def _best(twin: str, planned: Mapping[str, Run], variants: Mapping[str, Records]) -> str | None:
    """The point of the twin's sweep with the lowest mean on validation, or the twin; points of
    another conversion do not count.
    """
    means = {
        name: statistics.fmean(r["validation"]["bits_per_byte"] for r in records.values())
        for name, records in variants.items()
        if planned[name].family == twin
        and planned[name].conversion == planned[twin].conversion
        and records
    }
    return min(means, key=means.__getitem__) if means else None


def _timing(
    name: str, decoding: Mapping[str, Any] | None, twins: Mapping[str, str]
) -> dict[str, Any]:
    models: Mapping[str, Any] = {} if decoding is None else decoding["models"]
    if name not in models:
        return {}
    ours: Sequence[float] = models[name]["ms"]
    return {
        "ms_per_token": {"mean": statistics.median(ours), **spread(ours)},
        "cpu_ms_per_token": statistics.median(models[name]["cpu_ms"]),
        # Twin / ours within a round: above 1 we are faster.
        "speedup": {
            title: spread([b / a for a, b in zip(ours, models[twin]["ms"], strict=True)])
            for title, twin in twins.items()
            if twin in models and twin != name
        },
    }


def _commits(variants: Mapping[str, Records]) -> list[str]:
    found = {
        f"{str(session['commit'])[:10]}{' and changes' if session['dirty'] else ''}"
        for records in variants.values()
        for record in records.values()
        for session in record["training"]["sessions"]
    }
    return sorted(found)


def headed(summary: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the main table, its head first."""
    twins: Mapping[str, str] = summary["twins"]
    tested = any("test_bits_per_byte" in row for row in summary["rows"])
    head = ["variant", "seeds", "bits/byte", "spread"]
    for title in twins:
        head += [f"to {title}", "perplexity", "speed", "FLOPs"]
    head += ["silent", "hidden", "read", "of", "skipped", "ms/token", "parameters", "trained"]
    rows = [head + (["test"] if tested else [])]
    for row in summary["rows"]:
        if not row["seeds"]:
            rows.append([row["variant"], "0", *["-"] * (len(rows[0]) - 2)])
            continue
        bits = row["bits_per_byte"]
        spread_of = bits["highest"] - bits["lowest"] if len(row["seeds"]) > 1 else None
        cells = [
            row["variant"] + _stars(row["on_front"]),
            str(len(row["seeds"])),
            f"{bits['mean']:.4f}",
            "-" if spread_of is None else f"{spread_of:.4f}",
        ]
        for title in twins:
            cells += _beside(row, title)
        silent = row["silent_fraction"]
        timed = row.get("ms_per_token")
        cells += [
            percent(silent["total"]["mean"]),
            percent(silent["ffn_hidden"]["mean"] if "ffn_hidden" in silent else None),
            size(row["bytes_read_per_token"]["mean"]),
            size(row["weight_bytes_per_token"]),
            percent(row["skipped_fraction"]["mean"]),
            f"{timed['median']:.3f}" if timed else "-",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['training_tokens'] / 1e6:.2f} M, {row['training_seconds']['mean']:.0f} s",
        ]
        if tested:
            test = row.get("test_bits_per_byte")
            cells.append(f"{test['mean']:.4f}" if test else "-")
        rows.append(cells)
    return rows


def _stars(on_front: Mapping[str, bool]) -> str:
    return "".join(
        mark
        for mark, name in (("*", "bytes_read_per_token"), ("+", "ms_per_token"))
        if on_front[name]
    )


def _beside(row: Mapping[str, Any], title: str) -> list[str]:
    found = row["deltas"].get(title)
    if found is None:
        return ["-"] * 4
    perplexity = found["perplexity_percent"]
    speed = row.get("speedup", {}).get(title)
    return [
        f"{found['bits_per_byte']['mean']:+.4f}",
        "-" if perplexity is None else f"{perplexity['mean']:+.1f} %",
        f"{speed['median']:.2f} x" if speed else "-",
        f"{found['training_flops']:.2f} x",
    ]


def silences(summary: Mapping[str, Any]) -> list[list[str]]:
    """Silent fraction by tensor class, a row per variant, the head first."""
    rows = [row for row in summary["rows"] if row["seeds"]]
    classes = [c for c in TENSOR_CLASSES if any(c in row["silent_fraction"] for row in rows)]
    cells = [
        [
            row["variant"],
            *(
                percent(row["silent_fraction"][c]["mean"] if c in row["silent_fraction"] else None)
                for c in classes
            ),
        ]
        for row in rows
    ]
    return [["silent fraction", *classes], *cells]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    found = [
        f"{summary['finished']} of {summary['runs']} runs finished; means over seeds, spread: "
        "highest - lowest; bits per byte on validation text, of the converted models",
        "* on the Pareto front of bits per byte and bytes read per token, + of bits per byte and "
        "measured time",
    ]
    for title, best in summary["twins"].items():
        if title != best:
            found.append(f"twin {title}: its best point on validation, {best}")
    found += [f"failed: {run}: {error}" for run, error in summary["failed"].items()]
    found += [f"not timed: {n}: {reason}" for n, reason in summary["decoding_missing"].items()]
    if summary["commits"]:
        found.append("trained by commit " + ", ".join(summary["commits"]))
    if summary["test_reads"]:
        found.append(f"the test text was read {summary['test_reads']} time(s)")
    return found


def table(summary: Mapping[str, Any]) -> str:
    """What `spikelm experiment` prints."""
    return "\n".join(
        [aligned(headed(summary)), "", aligned(silences(summary)), "", *notes(summary)]
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """The same as a page."""
    parts = [f"# {summary['study']}", summary["about"].strip()]
    for head, *rows in (headed(summary), silences(summary)):
        lines = [head, ["---"] * len(head), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("\n".join(f"- {note}" for note in notes(summary)))
    return "\n\n".join(parts) + "\n"


def write_report(summary: dict[str, Any], out: Path) -> None:
    """Writes summary.json, table.md and the plots into `out`. Raises: MissingExtraError."""
    write_json(out / "summary.json", summary)
    (out / "table.md").write_text(markdown(summary), encoding="utf-8")
    for quantity, title in AXES.items():
        rows = [row for row in summary["rows"] if row.get(quantity)]
        if rows:
            plot(rows, quantity, title, out / f"bits-{quantity.partition('_')[0]}.png")


def plot(rows: Sequence[Mapping[str, Any]], quantity: str, title: str, file: Path) -> None:
    """Draws bits per byte against `quantity`: a point per variant with its spread over seeds, those
    of the Pareto front filled and joined. Raises: MissingExtraError.
    """
    figure = require_matplotlib()(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    scale = 1024 if quantity.startswith("bytes") else 1
    front = []
    for row in rows:
        x, bits = row[quantity]["mean"] / scale, row["bits_per_byte"]
        y = bits["mean"]
        on_front = row["on_front"][quantity]
        errors = [[y - bits["lowest"]], [bits["highest"] - y]]
        fill = "C0" if on_front else "white"
        axes.errorbar(x, y, errors, fmt="o", color="C0", markerfacecolor=fill, capsize=3)
        axes.annotate(row["variant"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
        if on_front:
            front.append((x, y))
    axes.plot(*zip(*sorted(front), strict=True), color="C0", alpha=0.4, label="Pareto front")
    axes.set_xlabel(f"{title} (KiB)" if scale > 1 else title)
    axes.set_ylabel("bits per byte, validation")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
