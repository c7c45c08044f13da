from __future__ import annotations

from pathlib import Path

import pytest

from spikelm import checkpoint
from spikelm.cli import main
from spikelm.corpus import builtin_documents


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(builtin_documents("validation")[0][:4000], encoding="utf-8")
    return str(path)


def test_converts_a_run(
    float_folder: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(float_folder), str(tmp_path / "out"), "--data", text]
    command += ["--calibration-tokens", "1024", "--silence", "ffn_input=0.5"]
    command += ["--bits", "4", "--bits", "head=8", "--rounding", "nearest"]
    assert main(command) == 0
    assert "ffn_input 5" in capsys.readouterr().out
    manifest = checkpoint.load(tmp_path / "out").manifest
    assert manifest is not None
    assert manifest["calibration_tokens"] == 1024
    assert {name for name, bits in manifest["bits"].items() if bits == 8} == {"head"}
    assert main(command) == 0, "an older conversion is replaced"


def test_small_projections_are_read_by_output_if_asked_to(
    float_folder: Path, tmp_path: Path, text: str
) -> None:
    for options in ([], ["--by-output-weights", "0"]):
        command = ["convert", str(float_folder), str(tmp_path / "out"), "--data", text]
        assert main([*command, "--silence", "ffn_input=0.01", *options]) == 0
        coding = checkpoint.read_config(tmp_path / "out")["spike_coding"]
        assert ("by_output" in coding) is bool(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{tmp}/out"], "no model folder at"),
        (["{model}", "{model}"], "OUT is RUN itself"),
        (["{model}", "{tmp}"], "exists and has no spikes.json to replace"),
        (["{model}", "{tmp}/out", "--silence", "ffn_input"], "takes CLASS=FRACTION"),
        (["{model}", "{tmp}/out", "--silence", "ffn_inputs=0.1"], "did you mean 'ffn_input'"),
        (["{model}", "{tmp}/out", "--calibration-tokens", "3"], "allowed: 512 or more"),
        (["{model}", "{tmp}/out", "--group-size", "0"], "allowed: 1 or more"),
        (["{model}", "{tmp}/out", "--bits", "ffn_input"], "takes BITS or CLASS=BITS"),
        (["{model}", "{tmp}/out", "--bits", "=4"], "takes BITS or CLASS=BITS"),
        (["{model}", "{tmp}/out", "--bits", "3"], "bits 3 given; allowed: 4, 8"),
        (["{model}", "{tmp}/out", "--by-output-weights", "-1"], "-1 given; allowed: 0 or more"),
        (["{model}", "{tmp}/out", "--data", "{tmp}/none.txt"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    float_folder: Path,
    tmp_path: Path,
    text: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    command = [a.format(model=float_folder, tmp=tmp_path) for a in arguments]
    assert main(["convert", *command]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
