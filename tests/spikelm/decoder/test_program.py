"""spikelm.decoder: what test_every_model.py does not ask of every model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import checkpoint
from spikelm.coding.meter import Meter
from spikelm.config import (
    FFNConfig,
    GLAConfig,
    ModelConfig,
    NeuronConfig,
    NeuronsConfig,
    RWKV7Config,
)
from spikelm.conversion.convert import convert
from spikelm.decoder import Watch, native_program
from spikelm.decoder.program import MIN_ROOM, TOKENS_AT_ONCE
from spikelm.errors import CheckpointError, DataError, SpikelmError
from spikelm.eval.traffic import weight_traffic
from spikelm.generate import Engine, run
from spikelm.kernels import rows
from spikelm.kernels.outputs import Halves
from spikelm.models.spikelm import LanguageModel
from spikelm.state import State
from spikelm.tokenizer import Tokenizer

GATED = ["layers.0.ffn.input", "layers.1.ffn.input"]

pytestmark = pytest.mark.skipif(rows.unavailable() is not None, reason="no native matrices")


@pytest.fixture(scope="module")
def engine(coded_folder: Path) -> Engine:
    return Engine(checkpoint.load(coded_folder, backend="native"))


def test_a_number_that_is_not_finite_is_an_error_that_names_the_neurons(engine: Engine) -> None:
    for broken in (torch.nan, torch.inf):
        state = engine.prefill([1, 2, 3])[1].clone()
        state.layers[1]["ffn.shift"][0, 0, 5] = broken
        with pytest.raises(SpikelmError, match=r"layers.1.ffn.input got numbers that are not fin"):
            engine.step(torch.tensor([4]), state)
    _, state = engine.prefill([1, 2, 3])
    logits, _ = engine.step(torch.tensor([4]), state)
    assert logits.isfinite().all(), "the program goes on with other states"


def test_threads_do_not_change_a_bit(engine: Engine) -> None:
    _, state = engine.prefill(list(range(20)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits, after = engine.step(torch.tensor([7]), state)
            found.append([logits, *(t for layer in after.layers for t in layer.values())])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_who_fired(engine: Engine, coded_folder: Path) -> None:
    assert engine.program is not None
    plain = Engine(checkpoint.load(coded_folder, backend="matmul"))
    states = [engine.prefill([1, 2, 3 + i])[1].clone() for i in range(3)]
    copies = [state.clone() for state in states]
    ids = torch.tensor([4, 5, 4])
    watch, other = Watch(bits=True), Watch(bits=True)
    logits, _ = engine.step_each(ids, states, watch=watch)
    plain.step_each(ids, copies, watch=other)
    assert watch.fired.keys() == other.fired.keys()
    assert any(bits.any() for bits in watch.fired.values())
    for name, bits in watch.fired.items():
        assert bits.shape == other.fired[name].shape
        # A rounding difference may flip a spike.
        assert (bits == other.fired[name]).mean() > 0.98, name
    for row, counts in enumerate(watch.counts):
        assert abs(counts.silent - other.counts[row].silent) < 0.02 * counts.total
        assert counts.total == other.counts[row].total
        silent = sum(int((~bits[row]).sum()) for bits in watch.fired.values())
        assert silent == counts.silent
        # Each row as if it were alone, and without being watched.
        state = engine.prefill([1, 2, 3 + row])[1].clone()
        alone = Watch(bits=True)
        again, total = engine.program.run(ids[row : row + 1], state, None, alone)
        assert torch.equal(again[0, : logits.shape[1]], logits[row])
        assert [total] == alone.counts == [counts]
        assert all((bits[row] == alone.fired[name]).all() for name, bits in watch.fired.items())
    counted = Watch()
    engine.step_each(ids, states, watch=counted)
    assert len(counted.counts) == 3
    assert not counted.fired


@pytest.mark.parametrize("by_output", ["", "reglu", "channel_mix"])
@pytest.mark.parametrize(
    "mixers", [("rwkv7", "delta"), ("gla", "wkv4"), ("window", "full")], ids="-".join
)
def test_a_prompt_leaves_what_its_tokens_one_by_one_leave(
    tiny_config: Callable[..., ModelConfig],
    tmp_path: Path,
    mixers: tuple[str, ...],
    by_output: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by_output:
        monkeypatch.setattr("spikelm.models.coded.TWO_STAGE_OUTPUTS", 1)
        monkeypatch.setattr("spikelm.conversion.convert._mostly_negative", lambda *_: GATED)
    model = LanguageModel(
        tiny_config(
            mixers=mixers,
            ffn=FFNConfig(kind=by_output or "channel_mix", hidden_dim=64),  # type: ignore[arg-type]
            rwkv7=RWKV7Config(head_dim=16, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4),
            gla=GLAConfig(num_heads=2, num_kv_heads=1, key_dim=8, value_dim=12),
        )
    ).initialise(0)
    checkpoint.save(tmp_path / "float", model, Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", torch.arange(96).view(2, 48))
    engine = Engine(checkpoint.load(tmp_path / "coded", backend="native"))
    program = engine.program
    assert program is not None
    assert program.reads_prompts == ("full" not in mixers)
    ids = (torch.arange(TOKENS_AT_ONCE + 21) * 37) % 250
    one_by_one = engine.model.initial_state(1).clone()
    silent = total = 0
    for token in ids:
        expected, counts = program.run(token[None], one_by_one)
        silent, total = silent + counts.silent, total + counts.total
    before = torch.get_num_threads()
    try:
        for threads, cut in ((1, 1), (3, 3), (2, 40)):
            torch.set_num_threads(threads)
            state = engine.model.initial_state(1).clone()
            _, first = program.read(ids[:cut], state)
            logits, rest = program.read(ids[cut:], state)
            assert torch.equal(logits, expected)
            # The head's spikes are counted, its product is done for the last token only.
            assert first.silent + rest.silent == silent
            assert first.total + rest.total == total
            assert state.position.item() == one_by_one.position.item() == len(ids)
            for x, y in zip(state.layers, one_by_one.layers, strict=True):
                for name, tensor in y.items():
                    seen = min(tensor.shape[1], x[name].shape[1])
                    assert torch.equal(x[name][:, :seen], tensor[:, :seen]), name
    finally:
        torch.set_num_threads(before)


def test_a_document_that_begins_in_a_prompt_forgets_what_came_before(engine: Engine) -> None:
    begin = engine.tokenizer.reset_id
    assert begin is not None
    assert engine.program is not None
    _, before = engine.prefill([5, 6, 7])
    found, state = engine.prefill([1, begin, 2, begin, 3, 4], before)
    expected, alone = engine.prefill([begin, 3, 4])
    assert torch.equal(found, expected)
    assert state.position.item() == alone.position.item()
    logits, _ = run(engine.model, torch.tensor([[1, begin, 2, begin, 3, 4]]), None, reset_id=begin)
    torch.testing.assert_close(found, logits[:, -1, : found.shape[1]], rtol=0, atol=1e-3)


@pytest.mark.parametrize("B", [2, 5, 8, 9, 20])
def test_a_sequence_does_not_depend_on_its_batch(engine: Engine, B: int) -> None:
    _, state = engine.prefill([1, 2, 3])
    alone = [engine.step(torch.tensor([10 * b]), state)[0] for b in range(B)]
    many = state.map(lambda tensor: tensor.expand(B, *tensor.shape[1:]))
    logits, _ = engine.step(10 * torch.arange(B), many)
    assert torch.equal(logits, torch.cat(alone))


def test_in_place_is_the_same_in_the_states_own_memory(engine: Engine) -> None:
    _, state = engine.prefill([1, 2, 3])
    expected, after = engine.step(torch.tensor([4]), state)
    addresses = [t.data_ptr() for layer in state.layers for t in layer.values()]
    logits, same = engine.step(torch.tensor([4]), state, in_place=True)
    assert same is state
    assert torch.equal(logits, expected)
    assert addresses == [t.data_ptr() for layer in state.layers for t in layer.values()]
    for x, y in zip(after.layers, state.layers, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_caches_that_grow_are_given_room_ahead(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = LanguageModel(tiny_config(mixers=("full", "delta"))).initialise(0)
    checkpoint.save(tmp_path / "float", model, Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", torch.arange(96).view(2, 48))
    engine = Engine(checkpoint.load(tmp_path / "coded", backend="native"))
    _, state = engine.prefill([1, 2, 3])
    sizes = []
    for token in range(2 * MIN_ROOM):
        _, state = engine.step(torch.tensor([token % 250]), state, in_place=True)
        sizes.append(state.layers[0]["mixer.k"].shape[1])
    second = 2 * (MIN_ROOM + 1)
    assert sorted(set(sizes)) == [MIN_ROOM, second, 2 * (second + 1)]
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3, *(t % 250 for t in range(2 * MIN_ROOM))]])
        _, whole = engine.model(ids)
    kept = state.layers[0]["mixer.k"][:, : ids.shape[1]]
    torch.testing.assert_close(kept, whole.layers[0]["mixer.k"], rtol=1e-3, atol=1e-3)


def test_why_a_model_decodes_in_torch(float_folder: Path, coded_folder: Path) -> None:
    for folder, backend, reason in (
        (float_folder, "auto", "its weights are floats"),
        (coded_folder, "matmul", "its products run in matmul"),
    ):
        model = checkpoint.load(folder, backend=backend).model
        assert native_program(model) == (None, reason)


def test_nothing_is_left_behind(engine: Engine) -> None:
    """Many steps, and many programs, without more memory."""
    from spikelm.eval.process import memory_bytes

    _, state = engine.prefill([1, 2, 3])

    def steps(count: int) -> int:
        for token in range(count):
            engine.step(torch.tensor([token % 250]), state, in_place=True)
        return memory_bytes("VmRSS")

    first = steps(500)
    assert steps(3000) < first + 2**20
    for _ in range(20):
        native_program(engine.model)
    before = memory_bytes("VmRSS")
    for _ in range(200):
        native_program(engine.model)
    assert memory_bytes("VmRSS") < before + 2**22


def test_python_threads_take_turns(engine: Engine) -> None:
    states = [engine.prefill([1, 2, n])[1] for n in range(4)]

    def walk(state: State) -> torch.Tensor:
        for token in range(60):
            logits, state = engine.step(torch.tensor([token]), state)
        return logits

    expected = [walk(state) for state in states]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(walk, states))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([-1], "token ids -1..-1 given; allowed: 0..256"),
        ([257], "token ids 257..257 given"),
        ([1, 2], "2 tokens given for a state of 1 sequences"),
    ],
)
def test_what_would_be_read_out_of_bounds(engine: Engine, ids: list[int], message: str) -> None:
    _, state = engine.prefill([1, 2, 3])
    with pytest.raises(DataError, match=message):
        engine.step(torch.tensor(ids), state)


def coded(model: LanguageModel, folder: Path, **options: Any) -> Path:
    checkpoint.save(folder / "float", model, Tokenizer.bytes())
    windows = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(0))
    convert(folder / "float", folder / "coded", windows, **options)
    return folder / "coded"


def walk(engine: Engine, within: float | None = None) -> torch.Tensor:
    """Logits of thirty tokens, one row each."""
    state, found = engine.model.initial_state(1).clone(), []
    for token in range(30):
        ids = torch.tensor([token * 7 % 250])
        logits, state = engine.step(ids, state, in_place=True, within=within)
        found.append(logits)
    return torch.cat(found)


def test_the_largest_logits_of_a_head_in_two_stages_are_exact(
    coded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = walk(Engine(checkpoint.load(coded_folder, backend="native")))
    monkeypatch.setattr("spikelm.models.coded.TWO_STAGE_OUTPUTS", 1)
    engine = Engine(checkpoint.load(coded_folder, backend="native"))
    assert isinstance(engine.model.head.linear.table, Halves)
    assert torch.equal(walk(engine), whole), "all logits asked for: all are exact"
    deviation = whole.std()
    exact = []
    for within in (0.0, 1.0):
        found = walk(engine, within)
        assert torch.equal(found.argmax(-1), whole.argmax(-1))
        near = whole >= whole.amax(-1, keepdim=True) - within
        assert torch.equal(found[near], whole[near])
        assert (found - whole).abs().max() < 0.5 * deviation
        exact.append(int((found == whole).sum()))
    assert whole.shape[0] <= exact[0] < exact[1] < whole.numel() / 2


@pytest.mark.parametrize("kind", ["reglu", "channel_mix"])
def test_what_a_relu_drops_is_not_read(
    tiny_config: Callable[..., ModelConfig],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits as by input, from fewer bytes."""
    monkeypatch.setattr("spikelm.conversion.convert.BY_OUTPUT_SHARE", 0.7)
    ffn = FFNConfig(kind=kind, hidden_dim=128)  # type: ignore[arg-type]
    fields = {"ffn": ffn, "width": 128}
    dense, quiet = NeuronConfig(), NeuronConfig(kind="integer", dead_zone=3.0, max_count=127)
    for neuron, gated in ((dense, True), (quiet, False)):
        neurons = NeuronsConfig(ffn_input=neuron)
        model = LanguageModel(tiny_config(**fields, neurons=neurons)).initialise(0)
        folder = coded(model, tmp_path / str(gated), by_output_weights=1)
        config = json.loads((folder / "config.json").read_text())
        assert config["spike_coding"].get("by_output", []) == (GATED if gated else [])
        found, read = [], []
        for listed in ([], GATED):
            config["spike_coding"]["by_output"] = listed
            (folder / "config.json").write_text(json.dumps(config))
            engine = Engine(checkpoint.load(folder, backend="native"))
            assert engine.program is not None
            found.append(walk(engine))
            _, counts = engine.program.run(torch.tensor([5]), engine.model.initial_state(1).clone())
            read.append(counts.weight_bytes)
        assert torch.equal(found[0], found[1])
        assert (read[1] < read[0]) is gated
        fallback = Engine(checkpoint.load(folder, backend="matmul"))
        torch.testing.assert_close(walk(fallback), found[0], rtol=1e-3, atol=1e-3)


def test_what_is_read_by_output_stands_before_a_relu(coded_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(coded_folder, tmp_path / "coded")
    file = tmp_path / "coded" / "config.json"
    config = json.loads(file.read_text())
    for given in (["layers.0.ffn.output"], "all", [["layers.0.ffn.input"]]):
        config["spike_coding"]["by_output"] = given
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"projections? in front of a ReLU"):
            checkpoint.load(tmp_path / "coded")


def test_counted_bytes_are_those_of_the_spikes(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """What native code counts as read, and what evaluation makes of a probe's silence."""
    sparse = NeuronConfig(kind="integer", dead_zone=1.0, max_count=127)
    fields: dict[str, NeuronConfig] = dict.fromkeys(
        ("mixer_input", "mixer_output", "gate_input", "ffn_input", "ffn_hidden", "head_input"),
        sparse,
    )
    ffn = FFNConfig(kind="reglu", hidden_dim=128)
    config = tiny_config(ffn=ffn, width=64, neurons=NeuronsConfig(**fields))
    folder = coded(LanguageModel(config).initialise(0), tmp_path)
    config_json = json.loads((folder / "config.json").read_text())
    config_json["spike_coding"]["by_output"] = ["layers.0.ffn.input"]
    (folder / "config.json").write_text(json.dumps(config_json))
    engine = Engine(checkpoint.load(folder, backend="native"))
    assert engine.program is not None
    meter, ids = Meter(), torch.arange(40) * 7 % 250
    with torch.inference_mode():
        engine.model(ids[None], probe=meter)
    traffic = weight_traffic(engine.model)
    state, read = engine.model.initial_state(1).clone(), 0
    for token in ids:
        _, counts = engine.program.run(token[None], state)
        read += counts.weight_bytes
    expected = traffic.spike_bytes(traffic.silence(meter.tallies)) - traffic.other_bytes
    assert read / len(ids) == pytest.approx(expected, rel=0.01)


def test_pending_decays_survive_saving_and_forking(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """Single tokens, a file, a fork, and the rest in one call: as if it had been one call."""
    model = LanguageModel(tiny_config(mixers=("delta", "delta"))).initialise(0)
    checkpoint.save(tmp_path / "float", model, Tokenizer.bytes())
    convert(tmp_path / "float", tmp_path / "coded", torch.arange(96).view(2, 48))
    engine = Engine(checkpoint.load(tmp_path / "coded", backend="native"))
    assert engine.program is not None
    ids, touched, dense = [*range(40, 100)], 0, 0
    _, state = engine.prefill(ids[:3])
    state = state.clone()
    for token in ids[3:40]:
        _, counts = engine.program.run(torch.tensor([token]), state)
        touched, dense = touched + counts.state_bytes, dense + counts.dense_state_bytes
    assert (state.layers[0]["mixer.pending"] < 0).any()
    assert 0 < touched < dense
    rows = state.layers[0]["mixer.S"].nbytes
    assert dense == 37 * 2 * 2 * rows
    state.save(tmp_path / "state", "model")
    forked = State.load(tmp_path / "state", "model").take([0, 0])
    with torch.inference_mode():
        logits, _ = engine.model(torch.tensor([ids[40:]] * 2), forked, last_only=True)
        expected, _ = engine.model(torch.tensor([ids]), last_only=True)
    torch.testing.assert_close(logits, expected.expand_as(logits), rtol=1e-3, atol=1e-3)
