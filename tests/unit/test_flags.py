"""The command line that the steps share."""

import dataclasses
from pathlib import Path

import pytest
import torch

import patrec.flags


@pytest.mark.parametrize("flags, word", [
    (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"),
    (["--workers", "1.5"], "1.5 is not a whole number of at least 1 and at most 1024"),
    (["--epoch", "3"], "--epoch"),  # not guessed
])  # fmt: skip
def test_flags_out_of_range_exit_with_2(flags, word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step", *flags])
    with pytest.raises(SystemExit) as stop:
        patrec.flags.parse_flags("x", training=True)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--data-dir=~/lab"])
    assert patrec.flags.parse_flags("x").data_dir == Path.home() / "lab"


def test_what_vanishes_is_zero_in_a_step():
    """Numbers below 1e-38 made an LSTM's backward pass four times as long on a Xeon."""
    torch.set_flush_denormal(False)
    assert torch.tensor(1e-30) * 1e-10 > 0
    patrec.flags.prepare_process(0)
    assert torch.tensor(1e-30) * 1e-10 == 0


@pytest.mark.parametrize("flags, changed", [
    (["--seed", "7"], {"seed": 7}), (["--no-merge"], {"merge": False}),
    (["--skip-bad"], {"skip_bad": True}), (["--allow-leak"], {"allow_leak": True}),
    (["--subset", "9"], {"subset": 9}), (["--lr", "0.004"], {"lr": 0.004}),
    (["--smoke", "--subset", "9"], {"smoke": True, "subset": 9}),
    (["--recipe", "lab"], {"recipe": "lab"}), (["--resume"], {"resume": True}),
])  # fmt: skip
def test_a_flag_changes_what_it_says_and_nothing_else(tmp_path, flags, changed):
    (tmp_path / "fma_genre_spectrograms").mkdir()

    def options(*flags):
        parser = patrec.flags.make_parser("", training=True)
        args = parser.parse_args(["--data-dir", str(tmp_path), "--device", "cpu", *flags])
        source = patrec.flags.source_from(args)
        facts = dataclasses.asdict(patrec.flags.options_from(args, source, tmp_path, tmp_path))
        return facts | facts.pop("source")

    assert options(*flags) == options() | changed
