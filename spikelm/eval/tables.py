"""The reports of `eval`, `inspect` and `bench` as aligned text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spikelm.config import TENSOR_CLASSES


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart, the first `left` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes for people: 512 B, 1.5 KiB, 20.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def evaluation_table(report: Mapping[str, Any]) -> str:
    """What `spikelm eval` prints: a column per model, the four numbers apart."""
    models: Mapping[str, Mapping[str, Any]] = report["models"]
    rows = [["", *models]]

    def add(title: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        rows.append([title, *(cell(model) for model in models.values())])

    add("kind", lambda m: m["kind"])
    add("parameters", lambda m: f"{m['parameters']:,}")
    add("bits per byte", lambda m: f"{m['bits_per_byte']:.4f}")
    add("perplexity per token", lambda m: f"{m['perplexity']:.3f}")
    add("(a) silent fraction", lambda m: percent(m["silent_fraction"]["total"]))
    for name in TENSOR_CLASSES:
        if any(name in m["silent_fraction"] for m in models.values()):
            add(f"    {name}", lambda m, n=name: percent(m["silent_fraction"].get(n)))  # type: ignore[misc]
    for name in TENSOR_CLASSES:
        if any(name in m["slot_sparsity"] for m in models.values()):
            add(f"(b) slot sparsity, {name}", lambda m, n=name: _slots(m, n))  # type: ignore[misc]
    if any("spike_budget" in m for m in models.values()):
        add("budget of weight bytes", _budget)
    add("weight bytes per token", lambda m: size(m["weight_bytes_per_token"]))
    add("    not silent", lambda m: size(m["spike_bytes_per_token"]))
    add("(c) weight bytes skipped", lambda m: percent(m["weight_bytes_skipped_fraction"]))
    add("    silent, skipped or not", lambda m: percent(m["weight_bytes_skippable_fraction"]))
    add("(d) tensors that spike", lambda m: f"{len(m['spiking_tensors'])} of {m['tensors']}")
    add("state", lambda m: size(m["state_bytes"]) + (", grows" if m["state_grows"] else ""))
    add("tokens per second", lambda m: f"{m['tokens_per_second']:.1f}")
    any_model = next(iter(models.values()))
    lines = [
        aligned(rows),
        "",
        f"{any_model['bytes']:,} bytes of held-out text",
        f"xz -9e: {report['xz_bits_per_byte']:.4f} bits per byte",
    ]
    if "xz_after_training_bits_per_byte" in report:
        after = report["xz_after_training_bits_per_byte"]
        lines.append(f"xz -9e that has seen the training text: {after:.4f} bits per byte")
    return "\n".join(lines)


def _budget(model: Mapping[str, Any]) -> str:
    spent = model.get("spike_budget")
    return "-" if spent is None else size(spent["bytes_asked"])


def budget_line(spent: Mapping[str, Any]) -> str:
    """What a spike budget did, in one line."""
    reached, before = size(spent["bytes_reached"]), size(spent["bytes_before"])
    asked = f"spike budget {spent['asked']}"
    if spent["spikes_kept"] == 1:
        return f"{asked}: a token reads {before} of weights, so no threshold was raised"
    return (
        f"{asked}: {reached} of weights per token, {before} before; "
        f"{percent(spent['spikes_kept'])} of the spikes are kept"
        + ("" if spent["skips"] else ", but these products read the rows of silent neurons too")
    )


def _slots(model: Mapping[str, Any], name: str) -> str:
    found = model["slot_sparsity"].get(name)
    return "-" if found is None else f"{percent(found['value'])} (S={found['steps']})"


def inspection_table(report: Mapping[str, Any]) -> str:
    """What `spikelm inspect` prints: a row per neuron population, then totals."""
    head = ["name", "fed by", "neuron", "threshold", "code", "S", "silent"]
    rows = [[*head, "weights", "bits", "read per token", "of"]]
    for entry in report["populations"]:
        weights = entry["weights"]
        rows.append(
            [
                entry["name"],
                entry["fed_by"],
                entry["neuron"],
                _threshold(entry["threshold"]),
                entry["code"] or "-",
                str(entry["steps"] or "-"),
                percent(entry["silent_fraction"]),
                "{} x {}".format(*weights["shape"]) if weights else "-",
                str(weights["bits"]) if weights else "-",
                size(weights["bytes_read_per_token"]) if weights else "-",
                size(weights["bytes"]) if weights else "-",
            ]
        )
    total, read = report["weight_bytes_per_token"], report["weight_bytes_read_per_token"]
    other = report["other_bytes_per_token"]
    totals = [
        ["model", f"{report['name']}, {report['kind']}"],
        ["backend", report["backend"] or "float matrix products, which read everything"],
        ["silence measured on", report["silence_measured_on"]],
        ["parameters", f"{report['parameters']:,}"],
        ["weights in memory", size(report["weight_bytes"])],
        ["read per token", f"{size(read)} of {size(total)}, {percent(1 - read / total)} skipped"],
        ["  of it always", f"{size(other)}: norms, biases, thresholds, one embedding row"],
        *_state_rows(report["state"]),
        *([["chat template", rewrites]] if (rewrites := report["chat_template_rewrites"]) else []),
    ]
    return f"{aligned(rows, left=5)}\n\n{aligned(totals, left=2)}"


def _threshold(threshold: Mapping[str, Any] | None) -> str:
    if threshold is None:
        return "-"
    if "tau" in threshold:
        return f"{threshold['v_threshold']:g}, tau {threshold['tau']:g}"
    if "k" in threshold:
        parts = [f"mean|x|/{threshold['k']:.3g}", f"zone {threshold['dead_zone']:.2f}"]
    else:
        parts = [f"{threshold['v_threshold']:g}"]
    if threshold.get("max_count") is not None:
        low = 0 if threshold["unsigned"] else -threshold["max_count"]
        parts.append(f"{low} to {threshold['max_count']}")
    return ", ".join(parts) + (f" ({threshold['origin']})" if threshold["origin"] else "")


def _state_rows(state: Mapping[str, Any]) -> list[list[str]]:
    growth = state["bytes_per_token"]
    grows = f", and {size(growth)} more per token" if growth else ", the same for every length"
    rows = [["state", size(state["bytes"]) + grows]]
    for kind, layers in state["per_layer"].items():
        tensors = ", ".join(f"{name} {size(num)}" for name, num in layers["tensors"].items())
        rows.append([f"  {kind} x {len(layers['layers'])}", tensors])
    if state["head"]:
        tensors = ", ".join(f"{name} {size(num)}" for name, num in state["head"].items())
        rows.append(["  head", tensors])
    return rows


def length_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench length` prints: three rows per length."""
    rows = [["tokens", "", "first token", "per token", "peak memory", "state"]]
    for row in report["measurements"]:
        for key, label in (("ours", report["name"]), ("full", "full attention")):
            if key in row:
                rows.append([f"{row['length']:,}", label, *_costs(row[key])])
        if row.get("ratio"):
            ratios = ["-" if r is None else f"{r:.2f} x" for r in row["ratio"].values()]
            rows.append(["", "full / ours", *ratios])
    notes = ["peak memory is above the loaded model", report["note"] or ""]
    lines = [aligned(rows, left=2), "", *(note for note in notes if note)]
    return "\n".join(lines)


def _costs(cost: Mapping[str, float] | None) -> list[str]:
    if cost is None:
        return ["killed", "-", "-", "-"]
    times = [f"{cost[name]:,.2f} ms" for name in ("first_token_ms", "ms_per_token")]
    return [*times, size(cost["peak_bytes"]), size(cost["state_bytes"])]


def memory_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench memory` prints."""
    rows = [["tokens", "state", "resident", "ms per token"]]
    for row in report["measurements"]:
        sizes = [size(row["state_bytes"]), size(row["resident_bytes"])]
        rows.append([f"{row['tokens']:,}", *sizes, f"{row['ms_per_token']:.2f}"])
    return aligned(rows, left=0)


FORM_TITLES = {
    "shipped": "as shipped",
    "torch": "without native code",
    "token_loop": "recurrences token by token",
    "one_token_calls": "one token per call",
    "no_neurons": "without neurons",
}


def block_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench block` prints: a row per form."""
    rows = [["forward + backward", "tokens", "tokens per second", "slowest", "fastest", "shipped"]]
    for row in report["measurements"]:
        seen = report["batch"] * row["tokens"]
        rates = [seen / max(row["seconds"]), seen / min(row["seconds"])]
        rows.append(
            [
                FORM_TITLES[row["form"]],
                f"{report['batch']} x {row['tokens']:,}",
                *(f"{rate:,.0f}" for rate in (row["tokens_per_second"], *rates)),
                f"{row['shipped_over_this']:.2f} x",
            ]
        )
    native = report["native"]
    found = "in use" if native["in_layer"] else "has none for this layer"
    lines = [
        aligned(rows),
        "",
        f"{report['model']}, layer {report['layer']}: {report['mixer']}, width {report['width']}, "
        f"{report['parameters']:,} parameters",
        f"CPU, {report['threads']} threads, {report['dtype']}, medians of {report['repeats']}",
        f"native code: {native['unavailable'] or found}",
        "outputs and gradients in float64 differ by "
        f"{report['largest_difference']:.1e} of a tensor's largest entry at most",
    ]
    return "\n".join(lines)


def recompute_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench recompute` prints: a row per vocabulary and form."""
    rows = [["vocabulary", "computed again", "peak memory", "CPU time", "time"]]
    whole = None
    for row in report["measurements"]:
        if row["again"] == "nothing":
            whole = row["seconds"]
        killed = row["seconds"] is None
        ratio = "-" if killed or whole is None else f"{row['seconds'] / whole:.2f} x"
        cells = ["killed", "-"] if killed else [size(row["peak_bytes"]), f"{row['seconds']:.2f} s"]
        rows.append([f"{row['vocabulary']:,}", row["again"], *cells, ratio])
    lines = [
        aligned(rows, left=2),
        "",
        f"{report['model']}, width {report['width']}, {report['layers']} layers, "
        f"{report['batch']} x {report['tokens']} tokens, logits of {report['chunk']} at a time",
        f"CPU, {report['threads']} threads, float32, medians of {report['repeats']}; memory above "
        "the model and its gradients",
    ]
    return "\n".join(lines)


def head_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench head` prints."""
    columns = ["exact logits", "weights read", "ms per token", "total variation"]
    rows = [["", *columns, "draws that differ"]]
    whole = report["all_exact"]
    exact = [percent(1.0), size(whole["weight_bytes"]), f"{whole['ms_per_token']:.2f}"]
    rows.append(["all", *exact, "-", "-"])
    for name, found in report["draws"].items():
        rows.append(
            [
                name,
                percent(found["exact_fraction"]),
                size(found["weight_bytes"]),
                f"{found['ms_per_token']:.2f}",
                f"{found['total_variation']:.1e}",
                f"{found['draws_that_differ']} of {found['draws']:,}",
            ]
        )
    return "\n".join(
        [
            f"{report['name']}, {report['tokens']:,} tokens, {report['vocabulary']:,} logits",
            "",
            aligned(rows),
        ]
    )


def steps_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench steps` prints."""
    delta, confident = report["delta"], report["confidence"]
    least = delta["changes"]
    changes = [f"|d| >= {change}" for change in least]
    rows = [["silent", "counts", "fixed step", *changes, "their error", "a dead zone's"]]
    for name, found in delta["classes"].items():
        silent = [found["silent"], found["silent_fixed_step"], *found["silent_changes"]]
        errors = [found["error"][-1], found["error_dead_zone"][-1]]
        rows.append([name, *map(percent, [*silent, *errors])])
    read = [delta["bytes"], delta["bytes_fixed_step"], *delta["bytes_changes"]]
    rows.append(["weight bytes per token", *map(size, read), "", ""])
    lines = [
        f"{report['name']}, {report['tokens']:,} tokens",
        "",
        aligned(rows),
        "",
        "d: change of a count since it was last sent; error: its energy that is lost where "
        f"changes below {least[-1]} are not sent, and in a dead zone that fires as often",
        f"without silence {size(delta['bytes_without_silence'])} per token; changes need "
        f"{size(delta['state_bytes'])} of state more",
        "",
    ]
    if confident is None:
        return "\n".join([*lines, f"dynamic confidence: none, {report['confidence_missing']}"])
    head = ["stop at", f"planes of {confident['planes']}", "rows", "same token", "bits/token"]
    rows = [["dynamic confidence", *head[1:], "rows, each once", "dead zone: same", "bits/token"]]
    for stop in confident["stops"]:
        zone = stop["dead_zone"]
        rows.append(
            [
                f"{stop['confidence']:g}",
                f"{stop['planes']:.2f}",
                percent(stop["rows"]),
                percent(stop["same_token"]),
                f"{stop['bits_per_token']:.3f}",
                percent(stop["rows_once"]),
                percent(zone["same_token"]),
                f"{zone['bits_per_token']:.3f}",
            ]
        )
    rows.append(
        [
            "never",
            f"{confident['planes']:.2f}",
            percent(confident["rows"]),
            percent(1.0),
            f"{confident['bits_per_token']:.3f}",
            percent(1.0),
            percent(1.0),
            f"{confident['bits_per_token']:.3f}",
        ]
    )
    return "\n".join(
        [*lines, aligned(rows), "", "rows of the head, 100 %: the plain event product"]
    )


def decode_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench decode` prints: a row per contestant."""
    ours = report["contestants"][0]
    lines = [
        _contest_table(report),
        f"{size(ours['bytes_per_token'])} of {size(ours['weight_bytes'])} of weights per token, "
        f"{size(ours['state_bytes'])} of state",
        f"{report['threads']} threads, medians of {report['tokens']} tokens in "
        f"{report['rounds']} rounds, behind {report['position']:,} tokens",
    ]
    if report["peer_model"] != report["preset"]:
        lines.append(f"other programs run {report['peer_model']}")
    if report["batch"] > 1:
        lines.append(f"{report['batch']} sequences at once; a token's time is its share of a step")
    if report["limit"]:
        lines += _limit_lines(report["limit"])
    lines += _slowdown_lines(report)
    return "\n".join(lines)


def prefill_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench prefill` prints: a row per contestant."""
    rates = ", ".join(f"{c['name']} {c['tokens_per_second']:.0f}" for c in report["contestants"])
    return "\n".join(
        [
            _contest_table(report),
            f"tokens per second: {rates}",
            f"{report['threads']} threads, medians of {report['rounds']} prompts of "
            f"{report['tokens']} tokens",
            *_slowdown_lines(report),
        ]
    )


def _contest_table(report: Mapping[str, Any]) -> str:
    head = ["ms per token", "by CPU time", "over ours", "by CPU time", "lowest", "highest"]
    rows = [[f"{report['preset']}, {report['bits']} bits", *head, "resident"]]
    for found in report["contestants"]:
        times = [f"{found[key]:.2f}" for key in ("ms_per_token", "cpu_ms_per_token")]
        ratios = report["ratios"].get(found["name"])
        if ratios is None:
            cells = ["1.00 x", "1.00 x", "", ""]
        else:
            wall, cpu = ratios["wall"], ratios["cpu"]
            cells = [
                f"{ratio:.2f} x"
                for ratio in (wall["median"], cpu["median"], cpu["lowest"], cpu["highest"])
            ]
        rows.append([found["name"], *times, *cells, size(found["resident_bytes"])])
    asked = report["silence_asked_for"]
    silent = report["contestants"][0]["silent_fraction"]
    silence = (
        f"{silent:.1%} silent (asked for: {asked['inputs']:.0%}, hidden {asked['ffn_hidden']:.0%})"
    )
    return "\n".join([aligned(rows), "", silence])


def _limit_lines(limit: Mapping[str, Any]) -> list[str]:
    ours, touch, stream = (
        limit[f"{name}_gb_per_s"]["median"] for name in ("weights", "touch", "stream")
    )
    over, over_stream = (limit[name]["median"] for name in ("ours_over", "ours_over_at_stream"))
    return [
        f"weights read at {ours:.1f} GB/s; the same rows without arithmetic come at {touch:.1f}, "
        f"all rows in order at {stream:.1f} GB/s (eta {touch / stream:.2f})",
        f"memory allows {limit['ms_per_token']:.2f} ms per token, "
        f"{limit['ms_per_token_at_stream']:.2f} if rows came as fast as a stream; ours takes "
        f"{over:.2f} and {over_stream:.2f} times that, by CPU time",
    ]


def _slowdown_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["slowdown"]:
        return []
    rows = [[f"beside {report['load']} busy processes", "slower by", "lowest", "highest"]]
    for name, ratios in report["slowdown"].items():
        rows.append(
            [name, *(f"{ratios['wall'][k]:.2f} x" for k in ("median", "lowest", "highest"))]
        )
    return ["", aligned(rows)]


def kernel_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench kernel` prints: a row per silence."""
    head = ["rows, GB/s", "touch", "dense", "stream", "over touch", "lowest", "highest"]
    rows = [["silent", *head, "dense / event", "lowest", "highest"]]
    for row in report["measurements"]:
        rates = [
            f"{row['passes'][name]['gb_per_s']['median']:.1f}"
            for name in ("event", "touch", "dense", "stream")
        ]
        ratios = [
            f"{row[name][key]:.2f}"
            for name in ("event_over_touch", "dense_over_event")
            for key in ("median", "lowest", "highest")
        ]
        rows.append([f"{row['silence']:.0%}", *rates, *ratios])
    lines = [
        aligned(rows),
        "",
        f"{report['preset']}: {report['matrices']} matrices of {report['bits']} bits, "
        f"{size(report['bytes'])}; {report['isa']}, {report['threads']} threads, "
        f"medians of {report['rounds']} rounds, by CPU time per thread",
        "touch: the same rows without arithmetic; stream: all rows in order without arithmetic",
    ]
    return "\n".join(lines)


def state_table(report: Mapping[str, Any]) -> str:
    """What `spikelm bench state` prints: a row per share of spiking channels."""
    head = ["q, k spike", "q or k", "state per token", "of dense", "ms", "dense ms", "dense / ours"]
    rows = [[*head, "by CPU time", "deviation", "dense's"]]
    for row in report["measurements"]:
        lazy, dense = row["lazy"], row["dense"]
        rows.append(
            [
                f"{percent(row['query_fraction'])}, {percent(row['key_fraction'])}",
                percent(row["union_fraction"]),
                size(row["bytes_per_token"]),
                percent(row["bytes_per_token"] / row["dense_bytes_per_token"]),
                *(f"{form['ms_per_token']:.3f}" for form in (lazy, dense)),
                *(f"{dense[t] / lazy[t]:.2f} x" for t in ("ms_per_token", "cpu_ms_per_token")),
                *(f"{max(form['deviation'].values()):.1e}" for form in (lazy, dense)),
            ]
        )
    first = report["measurements"][0]
    lines = [
        aligned(rows),
        "",
        f"{report['num_layers']} layers of {report['num_heads']} heads of {report['key_dim']} x "
        f"{report['value_dim']}: {size(first['state_bytes'])} of state; a dense update reads and "
        f"writes {size(first['dense_bytes_per_token'])} per token",
        f"{report['threads']} threads, medians of {report['tokens']} tokens, the forms in turns; "
        "deviation from float64, outputs and state, in units of the largest entry",
    ]
    return "\n".join(lines)
