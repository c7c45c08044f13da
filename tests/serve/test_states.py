"""States are found again, also after a restart and by other servers, or refused with a reason."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from spikelm.errors import ConfigError, RequestError
from spikelm.state import State
from spikelm_serve import shelf
from spikelm_serve.shelf import CACHE, SAVED, Folder
from spikelm_serve.states import Kept, StateStore, describe

Make = Callable[..., StateStore]
VOCAB = 300
KILLS = int(os.environ.get("SPIKELM_KILLS", "6"))
"""100 in `make soak`."""


@pytest.fixture(autouse=True)
def _looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LOOK_SECONDS", 0.0)


def state(value: float = 0.0) -> State:
    return State(({"S": torch.full((1, 2, 3, 4), value)},), torch.tensor([3]))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def store(**options: Any) -> StateStore:
        disk = Folder(tmp_path / "states") if options.pop("disk", True) else None
        return StateStore("model", state(), VOCAB, shelf=disk, **options)

    return store


def kept(store: StateStore, ids: list[int], owner: str = "", **more: Any) -> Kept:
    chain = store.chain(store.root(owner), ids)
    return Kept(
        id=chain[-1],
        parent=None,
        tokens=len(ids),
        owner=owner,
        delta=np.array(ids, np.int32),
        state=state(float(len(ids))),
        logits=torch.arange(float(VOCAB)),
        **more,
    )


def find(store: StateStore, ids: list[int], owner: str = "") -> tuple[int, str | None]:
    found = store.find(store.chain(store.root(owner), ids), owner)
    return found.tokens, found.reason


def test_ids_follow_the_tokens_the_model_and_the_owner(make: Make) -> None:
    store = make()
    chain = store.chain(store.root("a"), [1, 2, 3])
    assert store.chain(chain[0], [2, 3]) == chain[1:]
    assert store.chain(store.root("a"), [1, 2, 4])[:2] == chain[:2]
    others = [store.root("b"), store.root("a", "salt"), StateStore("other").root("a")]
    assert len({store.root("a"), *others}) == 4
    # No two splits of the same numbers are the same tokens.
    assert store.chain(store.root("a"), [258])[-1] != store.chain(store.root("a"), [2, 1])[-1]


def test_the_longest_beginning_is_found(make: Make) -> None:
    store = make(disk=False)
    store.keep(kept(store, [1, 2]))
    store.keep(kept(store, [1, 2, 3, 4]))
    assert find(store, [1, 2, 3, 4, 5]) == (4, None)
    assert find(store, [1, 2, 3]) == (2, None)
    assert find(store, [2, 1]) == (0, "no_prefix")
    assert find(store, [1, 2, 3], "somebody") == (0, "no_prefix")


def test_memory_has_a_budget_and_saved_states_stay(make: Make) -> None:
    store = make(disk=False)
    one = kept(store, [1])
    store.memory_bytes = 3 * one.nbytes + 20
    for i in range(1, 7):
        store.keep(kept(store, [i]))
    assert (store.num_kept, store.evictions) == (3, 3)
    assert store.used == 3 * one.nbytes
    assert find(store, [1]) == (0, "evicted")
    store.save(kept(store, [4]).id, "")
    for i in range(7, 12):
        store.keep(kept(store, [i]))
    assert find(store, [4]) == (1, None)
    for i in (11, 10):
        store.save(kept(store, [i]).id, "")
    store.keep(kept(store, [20]))
    with pytest.raises(RequestError, match="no room on the memory") as full:
        store.save(kept(store, [20]).id, "")
    assert full.value.status == 507


def test_what_is_kept_survives_a_restart(make: Make) -> None:
    store = make()
    one, other = kept(store, [1, 2], messages=2, role="user"), kept(store, [3], "me")
    store.keep(one)
    store.keep(other)
    store.close()
    again = make()
    assert find(again, [1, 2, 3]) == (2, None)
    found = again.get(one.id, "")
    assert describe(found, "model") == describe(one, "model")
    assert torch.equal(found.state.layers[0]["S"], one.state.layers[0]["S"])
    assert torch.equal(found.logits, one.logits)
    assert found.delta.tolist() == [1, 2]
    assert again.restored == 1
    for wrong in ("you", ""):
        with pytest.raises(RequestError, match="no state") as refused:
            again.get(other.id, wrong)
        assert (refused.value.status, refused.value.code) == (404, "state_not_found")
    assert [entry["id"] for entry in again.listed("me")] == [other.id]
    again.delete(one.id, "")
    assert find(make(), [1, 2]) == (0, "no_prefix")


@pytest.mark.parametrize("evicted", [False, True])
def test_a_state_is_the_one_that_was_there_first(make: Make, evicted: bool) -> None:
    store = make()
    first = replace(kept(store, [1, 2]), created=1)
    assert store.keep(first) is first
    store.save(first.id, "")
    if evicted:
        store = make(memory_bytes=1)
        assert find(store, [9]) == (0, "no_prefix")
    again = store.keep(kept(store, [1, 2]))
    assert (again.created, again.saved) == (1, True)
    assert describe(store.get(first.id, ""), "model") == describe(again, "model")


def test_two_servers_share_a_folder(make: Make) -> None:
    one, other = make(), make()
    assert find(other, [1]) == (0, "no_prefix")
    one.keep(kept(one, [1]))
    one.flush()
    assert find(other, [1]) == (1, None)
    saved = one.save(kept(one, [1]).id, "", "mine")
    assert saved.saved
    third = make()
    assert third.get(saved.id, "").name == "mine"
    assert third.get(saved.id, "").saved
    third.delete(saved.id, "")
    assert find(make(), [1]) == (0, "no_prefix")


def test_the_disk_has_a_budget(make: Make, tmp_path: Path) -> None:
    store = make()
    one = kept(store, [1])
    size = len(one.pack("model"))
    assert store.shelf is not None
    store.shelf.max_bytes = 4 * size
    store.keep(one)
    store.flush()
    store.save(one.id, "")
    for i in range(2, 9):
        store.keep(kept(store, [i]))
        store.flush()
        time.sleep(0.01)
    folder = tmp_path / "states"
    assert len(list((folder / CACHE).iterdir())) == 3
    assert len(list((folder / SAVED).iterdir())) == 1
    for i in (8, 7, 6):
        store.save(kept(store, [i]).id, "")
    with pytest.raises(RequestError, match="no room on the disk"):
        store.save(kept(store, [5]).id, "")
    assert find(make(), [8]) == (1, None)


def test_forks_are_apart(make: Make) -> None:
    store = make()
    one = kept(store, [1, 2], messages=1, role="assistant")
    store.keep(one)
    fork = store.fork(one.id, "", "b")
    assert (fork.parent, fork.tokens, fork.role) == (one.id, 2, "assistant")
    assert fork.state is one.state
    store.delete(one.id, "")
    assert store.get(fork.id, "").name == "b"
    assert list(store.ancestors(fork)) == []


def damaged(data: bytes) -> list[tuple[str, bytes]]:
    """A file, broken in every way that somebody thought of."""
    header = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + header])
    body = data[8 + header :]

    def with_header(**changes: Any) -> bytes:
        text = json.dumps({**about, **changes}).encode()
        return struct.pack("<Q", len(text)) + text + body

    def about_with(**changes: Any) -> bytes:
        told = json.loads(about["__metadata__"]["conversation"])
        text = json.dumps({**told, **changes})
        return with_header(__metadata__={**about["__metadata__"], "conversation": text})

    def meta(**changes: Any) -> bytes:
        return with_header(__metadata__={**about["__metadata__"], **changes})

    first = about["layers.0.S"]
    cases = [(f"cut {i}", data[: len(data) * i // 64]) for i in range(64)]
    cases += [
        ("header length", struct.pack("<Q", 2**63) + data[8:]),
        ("header length 0", struct.pack("<Q", 0) + data[8:]),
        ("overlapping", with_header(logits={**about["logits"], "data_offsets": [0, 20]})),
        ("beyond", with_header(**{"layers.0.S": {**first, "data_offsets": [0, 2**40]}})),
        ("huge shape", with_header(**{"layers.0.S": {**first, "shape": [2**40, 2**40]}})),
        ("other dtype", with_header(**{"layers.0.S": {**first, "dtype": "I32"}})),
        ("other shape", with_header(**{"layers.0.S": {**first, "shape": [1, 4, 3, 2]}})),
        ("many layers", meta(num_layers=str(10**15))),
        ("no layers", meta(num_layers="0")),
        ("other model", meta(fingerprint="b" * 64)),
        ("other version", meta(format="spikelm-state-99")),
        ("no header", meta(conversation="null")),
        ("a list", meta(conversation="[1]")),
        ("nested", meta(conversation="[" * 5000)),
        ("a path", about_with(id="../../etc/passwd")),
        ("an absolute path", about_with(id="/etc/passwd")),
        ("NUL", about_with(id="st_\0" + "0" * 31)),
        ("long", about_with(id="st_" + "0" * 300)),
        ("device", about_with(id="CON")),
        ("case", about_with(id="st_" + "A" * 32)),
        ("tokens", about_with(tokens=-1)),
        ("tokens text", about_with(tokens="3")),
        ("more about", about_with(extra=1)),
    ]
    tensors = {
        "layers.0.S": torch.zeros(1, 2, 3, 4),
        "position": torch.tensor([3]),
        "logits": torch.zeros(VOCAB),
        "delta": torch.zeros(2, dtype=torch.int32),
    }
    for name, change in (
        ("NaN", {"layers.0.S": torch.full((1, 2, 3, 4), torch.nan)}),
        ("infinite logits", {"logits": torch.full((VOCAB,), torch.inf)}),
        ("another tensor", {"more": torch.zeros(1)}),
        ("another state", {"layers.0.T": torch.zeros(1)}),
        ("more logits", {"logits": torch.zeros(VOCAB + 1)}),
        ("no such token", {"delta": torch.tensor([1, VOCAB], dtype=torch.int32)}),
        ("more tokens than it has read", {"delta": torch.zeros(3, dtype=torch.int32)}),
        ("logits of int", {"logits": torch.zeros(VOCAB, dtype=torch.int32)}),
        ("two positions", {"position": torch.tensor([3, 4])}),
        ("negative position", {"position": torch.tensor([-3])}),
    ):
        cases.append((name, save({**tensors, **change}, about["__metadata__"])))
    return cases


def test_files_that_are_not_right_are_refused(make: Make, tmp_path: Path) -> None:
    store = make(disk=False)
    one = kept(store, [1, 2])
    data = one.pack("model")
    assert store.take_in(data, "me").tokens == 2
    before = store.num_kept
    for name, bad in damaged(data):
        with pytest.raises(RequestError) as refused:
            store.take_in(bad, "me")
        assert (refused.value.status, refused.value.code) == (400, "state_refused"), name
        assert str(tmp_path) not in str(refused.value), name
    assert store.num_kept == before
    folder = tmp_path / "states"
    store = make()
    for _, bad in damaged(data):
        (folder / CACHE / f"{one.id}.safetensors").write_bytes(bad)
        (folder / CACHE / "x.safetensors").write_bytes(bad)
        assert find(make(), [1, 2, 3]) == (0, "no_prefix")
        with pytest.raises(RequestError):
            make().get(one.id, "")
    (folder / CACHE / f"{one.id}.safetensors").unlink()
    (folder / CACHE / f"{one.id}.safetensors").symlink_to("/etc/passwd")
    assert find(make(), [1, 2]) == (0, "no_prefix")


def test_an_uploaded_state_is_its_owners(make: Make) -> None:
    store = make()
    one = replace(kept(store, [1, 2], "me"), saved=True, name="theirs")
    store.keep(one)
    taken = store.take_in(one.pack("model"), "you")
    assert taken.id != one.id
    assert (taken.owner, taken.parent, taken.saved, taken.name) == ("you", None, False, "theirs")
    with pytest.raises(RequestError, match="no state"):
        store.get(one.id, "you")


@pytest.mark.parametrize("name", ["", "st_", "../st_" + "0" * 32, "st_" + "g" * 32, "st_\0"])
def test_names_that_are_none(make: Make, name: str) -> None:
    with pytest.raises(RequestError, match="no state"):
        make().get(name, "")


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep states in"):
        Folder(tmp_path / "file" / "states")


def test_a_disk_that_is_full(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    one = kept(store, [1])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.keep(one)
    store.flush()
    with pytest.raises(RequestError, match="could not be saved: No space left") as failed:
        store.save(one.id, "")
    assert failed.value.status == 507
    assert find(store, [1]) == (1, None)
    assert not store.get(one.id, "").saved
    assert list((tmp_path / "states" / SAVED).iterdir()) == []


SAVING = """
import sys, itertools
import numpy as np, torch
from pathlib import Path
from spikelm.state import State
from spikelm_serve.shelf import Folder
from spikelm_serve.states import Kept, StateStore
S = torch.zeros(1, 64, 64, 16)
store = StateStore("model", State(({"S": S},), torch.tensor([1])), shelf=Folder(Path(sys.argv[1])))
print("ready", flush=True)
for i in itertools.count():
    chain = store.chain(store.root(""), [i])
    state = State(({"S": S + i},), torch.tensor([1]))
    store.keep(Kept(chain[0], None, 1, "", np.array([i], np.int32), state, torch.zeros(4096)))
    store.save(chain[0], "")
    print(i, flush=True)
"""


def test_killed_while_saving_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    like = State(({"S": torch.zeros(1, 64, 64, 16)},), torch.tensor([1]))
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", SAVING, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.02 + 0.013 * (attempt % 20))
            process.send_signal(signal.SIGKILL)
            told = [int(line) for line in process.stdout.read().split()]
        store = StateStore("model", like, shelf=Folder(folder))
        for i in told:
            found = store.get(store.chain(store.root(""), [i])[0], "")
            assert bool((found.state.layers[0]["S"] == i).all())
        # What was being written is whole or not there.
        for entry in store.listed(""):
            store.get(entry["id"], "")
