"""`spikelm eval`, `spikelm bench` and `spikelm inspect`."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.config import presets
from spikelm.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from spikelm.eval.budget import Budget

DATA_HELP = "text files, globs or datasets to measure on instead of the built-in corpus"
MODEL_HELP = "model folder, float or spike-coded"
SHAPE_HELP = "name, YAML file or model folder, whose shape is taken"
BACKEND_HELP = "event-driven implementation of spike-coded models (%(default)s)"
# More text than this per token wanted need not be read.
BYTES_PER_TOKEN = 64
XZ, XZ_AFTER = "xz_bits_per_byte", "xz_after_training_bits_per_byte"


def build_eval_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm eval",
        description="Bits per byte, perplexity and silence of models on held-out text, beside "
        "what xz needs for it. A model is a folder, or LABEL=FOLDER to name its column.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--twin",
        metavar="MODEL",
        action="append",
        default=[],
        help="another model for the same table, such as the dense twin; may be repeated",
    )
    parser.add_argument("--data", metavar="FILE", nargs="+", help=DATA_HELP)
    parser.add_argument("--max-bytes", type=int, metavar="N", help="use the first N bytes of text")
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)
    add_spike_budget(parser, "several with commas give a column each; of twins, those that spike")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw bits per byte against the budgets"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def add_spike_budget(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--spike-budget",
        metavar="BYTES",
        help="raise thresholds until a token reads no more weight bytes than this: 4MiB, or 60%% "
        "of what it reads now" + (f"; {more}" if more else ""),
    )
    parser.add_argument(
        "--budget-data",
        metavar="FILE",
        nargs="+",
        help="text to measure the budget on (default: built-in corpus)",
    )


def spike_budgets(args: argparse.Namespace) -> list[Budget]:
    """What `--spike-budget` asks for. Raises: ConfigError."""
    from spikelm.eval.budget import parse_budget

    if args.spike_budget is not None:
        return [parse_budget(text) for text in args.spike_budget.split(",")]
    if args.budget_data:
        raise ConfigError("--budget-data is for a budget; give --spike-budget")
    return []


def main_eval(argv: list[str]) -> int:
    args = build_eval_parser().parse_args(argv)
    models = labelled([args.model, *args.twin])
    from spikelm import checkpoint
    from spikelm.corpus import builtin_documents, read_documents
    from spikelm.eval.budget import Throttle, plot_curves, raisable
    from spikelm.eval.evaluate import evaluate, xz_bits_per_byte
    from spikelm.eval.length import require_matplotlib
    from spikelm.eval.tables import evaluation_table

    # A misspelt twin or report is told at once, not after the first model's minutes.
    for option, file in (("--report", args.report), ("--plot", args.plot)):
        nearest = file and next(folder for folder in file.resolve().parents if folder.exists())
        if file and (file.is_dir() or not nearest.is_dir()):
            raise ConfigError(f"{option} {file} is not a file's name; give one")
    budgets = spike_budgets(args)
    if args.plot:
        if not budgets:
            raise ConfigError("--plot draws a curve over budgets; give --spike-budget")
        require_matplotlib()
    for path in models.values():
        checkpoint.read_config(Path(path))
    texts = read_documents(args.data) if args.data else builtin_documents("test")
    documents = first_bytes(texts, args.max_bytes)
    xz = {XZ: xz_bits_per_byte(documents)}
    if not args.data:
        xz[XZ_AFTER] = xz_bits_per_byte(documents, builtin_documents("train"))
    curves: dict[str, list[dict[str, Any]]] = {}
    for label, path in models.items():
        loaded = checkpoint.load(path, backend=args.backend)
        if not budgets or (curves and not raisable(loaded.model)):
            curves[label] = [evaluate(loaded, documents)]
            continue
        throttle = Throttle(loaded, read_documents(args.budget_data) if args.budget_data else None)
        for budget in budgets:
            throttle.limit(budget)
        curves[label] = [
            {"spike_budget": throttle.spend(budget), **evaluate(loaded, documents)}
            for budget in budgets
        ]
    evaluations = {
        f"{label} {found['spike_budget']['asked']}" if "spike_budget" in found else label: found
        for label, curve in curves.items()
        for found in curve
    }
    report = {"models": evaluations, **xz}
    if args.report:
        flat = {label: {**found, XZ: xz[XZ]} for label, found in evaluations.items()}
        write_json(args.report, {**flat, **xz})
    if args.plot:
        plot_curves(curves, args.plot)
    print(json.dumps(report, indent=2) if args.json else evaluation_table(report))
    return 0


def build_bench_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spikelm bench", description="Time and memory.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join(BENCHES) + "}"
    )
    for name, (about, add_options, _) in BENCHES.items():
        command = commands.add_parser(name, help=about, description=about.capitalize() + ".")
        add_options(command)
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main_bench(argv: list[str]) -> int:
    args = build_bench_parser().parse_args(argv)
    _, _, run = BENCHES[args.command]
    return run(args)


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--lengths", default="256,1024,4096,16384", help="tokens before the first (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of which the median counts (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the plot (MODEL/length.png)")
    parser.add_argument("--no-full", action="store_true", help="measure the model alone")
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="tokens to decode (%(default)s)"
    )
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_contest(parser)
    parser.add_argument("--tokens", type=int, default=12, help="of each turn (%(default)s)")
    parser.add_argument(
        "--position", type=int, default=0, help="tokens that came before (%(default)s)"
    )
    parser.add_argument(
        "--peer-model",
        metavar="PRESET",
        help="the shape that other programs run, such as a Transformer's (default: the same)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences decoded at once (%(default)s)"
    )


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    _add_contest(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of each turn (%(default)s)")


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PRESET", nargs="?", default="rwkv7-0.4b", help=SHAPE_HELP)
    parser.add_argument(
        "--silence",
        default="0.7,0.8,0.9,0.95",
        metavar="Z,...",
        help="silent fractions of the vectors (%(default)s)",
    )
    parser.add_argument("--bits", type=int, default=8, help="of the weights, 8 or 4 (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of turns (%(default)s)")


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="spike-coded model folder")
    parser.add_argument("--data", metavar="FILE", nargs="+", help=DATA_HELP)
    parser.add_argument(
        "--tokens", type=int, default=512, help="of the text to measure on (%(default)s)"
    )


def _add_state(parser: argparse.ArgumentParser) -> None:
    for name, number, of in (
        ("heads", 16, "of the delta rule"),
        ("key-dim", 128, "key channels of a head"),
        ("value-dim", 128, "value channels of a head"),
        ("layers", 24, "with a state each"),
        ("tokens", 256, "to decode"),
        ("threads", 1, "of native code"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{of} (%(default)s)")
    parser.add_argument(
        "--spiking",
        default="0.1,0.2,0.3,1",
        metavar="SHARES",
        help="of the channels of queries and keys, each on its own (%(default)s)",
    )


def _add_block(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="PRESET", nargs="?", default="spikegpt-46m", help="name or YAML file"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence (%(default)s)")
    parser.add_argument(
        "--call-tokens", type=int, metavar="N", help="of the form called per token (--tokens)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of which the median counts (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the matrix products; bfloat16 is autocast (%(default)s)",
    )


def _add_recompute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="PRESET", nargs="?", default="spikelm-demo", help="name or YAML file"
    )
    parser.add_argument(
        "--vocab", default="1024,32768,131072", metavar="N,...", help="entries (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence (%(default)s)")
    parser.add_argument(
        "--chunk",
        type=int,
        default=256,
        help="tokens whose logits are in memory at a time (%(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of which the median counts (%(default)s)"
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder with spiking projections")
    parser.add_argument("--data", metavar="FILE", nargs="+", help=DATA_HELP)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the text to measure on (%(default)s)"
    )
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)


def _add_contest(parser: argparse.ArgumentParser) -> None:
    """What every race against other programs can be told."""
    parser.add_argument("model", metavar="PRESET", help=SHAPE_HELP)
    parser.add_argument(
        "--silence",
        default="0.8",
        metavar="Z[,HIDDEN]",
        help="silent fraction of what enters matrices, and of the FFN's hidden vector if it has "
        "another (%(default)s)",
    )
    parser.add_argument("--bits", type=int, default=8, help="of our weights, 8 or 4 (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of everybody (%(default)s)")
    parser.add_argument(
        "--against",
        default="dense",
        metavar="NAMES",
        help="dense, llama.cpp, transformers (a Transformer with as many parameters), rwkv; "
        "several with commas (%(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=4, help="of turns (%(default)s)")
    parser.add_argument(
        "--load",
        type=int,
        default=0,
        metavar="N",
        help="run each round again beside N processes that each keep a core busy (%(default)s)",
    )


def _contest(args: argparse.Namespace) -> dict[str, Any]:
    from spikelm.eval.decode import parse_silence

    silence, hidden = parse_silence(args.silence)
    return {
        "silence": silence,
        "hidden_silence": hidden,
        "bits": args.bits,
        "threads": args.threads,
        "against": [name for name in args.against.split(",") if name],
        "rounds": args.rounds,
        "load": args.load,
    }


def _bench_decode(args: argparse.Namespace) -> int:
    from spikelm.eval.decode import bench_decode
    from spikelm.eval.tables import decode_table

    options = _contest(args)
    report = bench_decode(
        args.model,
        **options,
        tokens=args.tokens,
        position=args.position,
        batch=args.batch,
        peer_model=args.peer_model,
    )
    print(json.dumps(report, indent=2) if args.json else decode_table(report))
    return 0


def _bench_prefill(args: argparse.Namespace) -> int:
    from spikelm.eval.prefill import bench_prefill
    from spikelm.eval.tables import prefill_table

    report = bench_prefill(args.model, **_contest(args), prompt_tokens=args.prompt_tokens)
    print(json.dumps(report, indent=2) if args.json else prefill_table(report))
    return 0


def _bench_kernel(args: argparse.Namespace) -> int:
    from spikelm.eval.kernel import bench_kernel, parse_fractions
    from spikelm.eval.tables import kernel_table

    report = bench_kernel(
        args.model,
        silence=parse_fractions(args.silence),
        bits=args.bits,
        threads=args.threads,
        rounds=args.rounds,
    )
    print(json.dumps(report, indent=2) if args.json else kernel_table(report))
    return 0


def _bench_state(args: argparse.Namespace) -> int:
    from spikelm.eval.state import bench_state
    from spikelm.eval.tables import state_table

    try:
        spiking = [float(share) for share in args.spiking.split(",")]
    except ValueError:
        raise ConfigError(f"--spiking takes numbers like 0.1,0.2, got '{args.spiking}'") from None
    report = bench_state(
        num_heads=args.heads,
        key_dim=args.key_dim,
        value_dim=args.value_dim,
        num_layers=args.layers,
        spiking=spiking,
        tokens=args.tokens,
        threads=args.threads,
    )
    print(json.dumps(report, indent=2) if args.json else state_table(report))
    return 0


def _bench_block(args: argparse.Namespace) -> int:
    from spikelm.eval.block import bench_block
    from spikelm.eval.tables import block_table

    report = bench_block(
        args.model,
        batch=args.batch,
        tokens=args.tokens,
        call_tokens=args.call_tokens,
        repeats=args.repeats,
        dtype=args.dtype,
    )
    print(json.dumps(report, indent=2) if args.json else block_table(report))
    return 0


def _bench_recompute(args: argparse.Namespace) -> int:
    from spikelm.eval.length import parse_lengths
    from spikelm.eval.recompute import bench_recompute
    from spikelm.eval.tables import recompute_table

    report = bench_recompute(
        args.model,
        vocabularies=parse_lengths(args.vocab, "--vocab"),
        batch=args.batch,
        tokens=args.tokens,
        chunk=args.chunk,
        repeats=args.repeats,
    )
    print(json.dumps(report, indent=2) if args.json else recompute_table(report))
    return 0


def _bench_head(args: argparse.Namespace) -> int:
    from spikelm.corpus import read_documents
    from spikelm.eval.head import bench_head
    from spikelm.eval.tables import head_table

    enough = BYTES_PER_TOKEN * max(1, args.tokens)
    documents = first_bytes(read_documents(args.data), enough) if args.data else None
    report = bench_head(args.model, documents, tokens=args.tokens)
    print(json.dumps(report, indent=2) if args.json else head_table(report))
    return 0


def _bench_steps(args: argparse.Namespace) -> int:
    from spikelm.corpus import read_documents
    from spikelm.eval.steps import bench_steps
    from spikelm.eval.tables import steps_table

    enough = BYTES_PER_TOKEN * max(1, args.tokens)
    documents = first_bytes(read_documents(args.data), enough) if args.data else None
    report = bench_steps(args.model, documents, tokens=args.tokens, backend=args.backend)
    print(json.dumps(report, indent=2) if args.json else steps_table(report))
    return 0


def _bench_memory(args: argparse.Namespace) -> int:
    from spikelm.eval.memory import bench_memory
    from spikelm.eval.tables import memory_table

    report = bench_memory(args.model, args.tokens, backend=args.backend)
    print(json.dumps(report, indent=2) if args.json else memory_table(report))
    return 0


def _bench_length(args: argparse.Namespace) -> int:
    from spikelm.eval.length import bench_length, parse_lengths, plot, require_matplotlib
    from spikelm.eval.tables import length_table

    lengths = parse_lengths(args.lengths)
    require_matplotlib()
    report = bench_length(
        args.model, lengths, repeats=args.repeats, full=not args.no_full, backend=args.backend
    )
    file = args.plot or Path(args.model) / "length.png"
    # First the numbers, which took minutes: a folder that takes no plot must not cost them.
    print(
        json.dumps({**report, "plot": str(file)}, indent=2) if args.json else length_table(report)
    )
    plot(report, file)
    if not args.json:
        print(f"plot: {file}")
    return 0


def _above(module: str, function: str) -> Callable[[Any], Any]:
    """A function of a benchmark whose package stands above this one."""
    return lambda given: getattr(importlib.import_module(module), function)(given)


# What a command is about, the options it adds to a parser, and what runs it.
BENCHES: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "length": (
        "time to first token, time per token, peak memory and state against length, beside the "
        "same model with full attention",
        _add_length,
        _bench_length,
    ),
    "memory": (
        "state, resident memory and time per token while one text grows",
        _add_memory,
        _bench_memory,
    ),
    "decode": (
        "time per token of a preset's shape at a chosen silence, beside other programs",
        _add_decode,
        _bench_decode,
    ),
    "prefill": (
        "time per token of a prompt on a preset's shape, beside other programs",
        _add_prefill,
        _bench_prefill,
    ),
    "kernel": (
        "speed of a preset's event-driven products alone, beside what memory allows",
        _add_kernel,
        _bench_kernel,
    ),
    "head": (
        "what reading a head in two stages saves, and the draws that it changes",
        _add_head,
        _bench_head,
    ),
    "state": (
        "bytes of state that spiking queries and keys touch, and the time of it, beside dense",
        _add_state,
        _bench_state,
    ),
    "block": (
        "training speed of one layer on the CPU, beside plain loops over the tokens",
        _add_block,
        _bench_block,
    ),
    "recompute": (
        "memory and time of a training step that computes logits or layers again",
        _add_recompute,
        _bench_recompute,
    ),
    "train": (
        "a training step beside the bare model's, the dense model's and a Transformer's",
        _above("spikelm_train.bench", "add_options"),
        _above("spikelm_train.bench", "run"),
    ),
    "serve": (
        "a server under load, late turns of a chat beside early ones, forks",
        _above("spikelm_serve.bench", "add_options"),
        _above("spikelm_serve.bench", "run"),
    ),
    "steps": (
        "what sending changes of counts, or stopping at a sure token, would save and cost",
        _add_steps,
        _bench_steps,
    ),
}


def build_inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spikelm inspect",
        description="Where the spikes are: what feeds every projection, its neuron, threshold, "
        "code and silence, and the weight bytes it reads.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model folder, float or spike-coded; or a preset, name or YAML file, for its sizes",
    )
    parser.add_argument("--data", metavar="FILE", nargs="+", help=DATA_HELP)
    parser.add_argument("--backend", default="auto", help=BACKEND_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main_inspect(argv: list[str]) -> int:
    args = build_inspect_parser().parse_args(argv)
    path = Path(args.model)
    if not path.is_dir() and (path.suffix == ".yaml" or args.model in presets()):
        from spikelm.eval.presets import describe_preset, preset_table

        described = describe_preset(args.model)
        print(json.dumps(described, indent=2) if args.json else preset_table([described]))
        return 0
    if not path.exists():
        near = did_you_mean(args.model, presets())
        raise ConfigError(f"no model folder and no preset: '{args.model}'; {near}")
    from spikelm.corpus import read_documents
    from spikelm.eval.inspect import MEASURED_BYTES, inspect
    from spikelm.eval.tables import inspection_table

    documents = first_bytes(read_documents(args.data), MEASURED_BYTES) if args.data else None
    report = inspect(args.model, documents, backend=args.backend)
    print(json.dumps(report, indent=2) if args.json else inspection_table(report))
    return 0


def labelled(models: Sequence[str]) -> dict[str, str]:
    """Label -> folder of LABEL=FOLDER or FOLDER, whose label is its name.

    Raises: ConfigError for a label given twice, or one that `--report` uses itself.
    """
    found: dict[str, str] = {}
    for model in models:
        label, separator, path = model.partition("=")
        if not separator or Path(model).exists():
            label, path = Path(model).resolve().name, model
        if label in found or label in (XZ, XZ_AFTER, ""):
            raise ConfigError(
                f"two models, or a model and a number, are called '{label}'; "
                f"name them, for example dense={path}"
            )
        found[label] = path
    return found


def first_bytes(documents: Iterable[str], max_bytes: int | None) -> list[str]:
    """Documents up to `max_bytes` of UTF-8, the last one cut between characters.

    Raises: ConfigError for a limit below 1.
    """
    if max_bytes is None:
        return list(documents)
    if max_bytes < 1:
        raise ConfigError(f"--max-bytes {max_bytes} given; allowed: 1 or more")
    kept: list[str] = []
    for text in documents:
        data = text.encode("utf-8", "surrogatepass")
        kept.append(text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore"))
        max_bytes -= len(data)
        if max_bytes <= 0:
            break
    return kept


def write_json(file: Path, data: dict[str, Any]) -> None:
    """The file appears complete or not at all."""
    if file.exists() and not file.is_file():  # /dev/stdout, a pipe
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
