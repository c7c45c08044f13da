from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import pytest

from spikelm.errors import MissingExtraError
from spikelm_train.report import Reporter
from spikelm_train.trackers import RUN_ID, Hosted, open_trackers


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, steps in ((0, (1, 2, 3)), (2, (3,))):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, begun, {})
        for step in steps:
            tracker.record(step, {"loss": 10.0 * begun + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_names_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    extra = "train" if name == "tensorboard" else name
    with pytest.raises(MissingExtraError, match=rf"spikelm\[{extra}\]"):
        Reporter(tmp_path, io.StringIO(), 0, [name])
    assert not (tmp_path / RUN_ID).exists()


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        ids = []
        for _ in range(2):
            tracker = Hosted("wandb", tmp_path, {"seed": 3})
            ids.append(tracker._run.id)
            tracker.record(1, {"loss": 1.5, "silent/ffn_hidden": 0.9})
            tracker.close()
    assert ids[0] == ids[1] == json.loads((tmp_path / RUN_ID).read_text())["id"]
    folders = [p for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run-")]
    written = b"".join(p.read_bytes() for folder in folders for p in folder.glob("*.wandb"))
    for part in (b"silent/ffn_hidden", b"seed"):
        assert part in written


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trackio")
        names = []
        for step in (1, 2):
            tracker = Hosted("trackio", tmp_path, {"seed": 3})
            names.append(tracker._run.name)
            tracker.record(step, {"loss": 1.5})
            tracker.close()
    assert names[0] == names[1]
    assert any((tmp_path / "store").rglob("*.db"))
