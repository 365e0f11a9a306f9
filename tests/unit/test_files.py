"""Folders are found, and files are written whole or not at all."""

import errno
import io
import os
import pickle

import pytest
import torch
from conftest import Payload

import patrec.files
from patrec.errors import InputError
from patrec.files import cache_dir, find_data, load_torch, make_folder, save_torch, write_text


def test_data_folder_of_one_level_too_high_or_low_is_taken(own_data, tmp_path, monkeypatch):
    data = own_data.rename(tmp_path / "data")
    for place in (data, tmp_path, data / "fma_genre_spectrograms", data / "multitask_dataset_beat"):
        assert find_data(place) == data.resolve()
    monkeypatch.chdir(data / "multitask_dataset")
    assert find_data(".") == data.resolve()
    monkeypatch.setenv("PATREC_DATA", str(data))
    assert find_data() == data.resolve()
    monkeypatch.setenv("PATREC_DATA", str(tmp_path / "elsewhere"))
    assert find_data(data) == data.resolve()  # what the command line names comes first


def test_a_folder_without_data_is_named_with_the_cure(own_data):
    (own_data / "songs").mkdir()
    (own_data / "file").write_text("")
    # data/song, mistyped for data/songs, must not fall back on what its parent folder holds.
    for name in ("song", "songs", "file", "fma_genre_spectrograms/train"):
        place = own_data / name
        with pytest.raises(InputError, match=f"no fma_genre_.* folder in {place}.*--data"):
            find_data(place)


def test_on_kaggle_the_labs_own_data_come_before_other_inputs(tmp_path, monkeypatch):
    monkeypatch.delenv("PATREC_DATA", raising=False)
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    labs_own = patrec.files.KAGGLE_NAME
    for name in ("a set of my own", labs_own, "songs"):
        (tmp_path / "input" / name / "fma_genre_spectrograms").mkdir(parents=True)
    assert find_data() == (tmp_path / "input" / labs_own).resolve()


def test_folders_that_cannot_be_made_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"{folder}: no output folder.*--out-dir"):
            make_folder(folder)
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"below: no cache folder.*\$PATREC_CACHE"):
        cache_dir()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [write_text, lambda path, text: save_torch(path, {"text": text})])
def test_on_a_full_disk_the_old_file_stays(tmp_path, monkeypatch, write):
    """The disk is full when the file is half written."""

    class Full(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write(path, "old")
    before = path.read_bytes()
    monkeypatch.setattr(patrec.files, "open", lambda path, mode: Full(path, "w"), raising=False)
    with pytest.raises(InputError, match="file: cannot be written.*No space left.*--out-dir"):
        write(path, "new")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path, proof = tmp_path / "best.pt", tmp_path / "the code was run"
    path.write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(InputError, match="best.pt: no readable checkpoint.*train again"):
        load_torch(path)
    torch.save({"spec": Payload(proof)}, path)
    with pytest.raises(InputError, match="best.pt: no readable checkpoint.*train again"):
        load_torch(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the payload works, so the test above tells something"


def test_checkpoints_that_cannot_be_read(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(InputError, match="best.pt: no such checkpoint; run the step"):
        load_torch(path)
    save_torch(path, {"weights": torch.arange(3)})
    assert load_torch(path)["weights"].tolist() == [0, 1, 2]
    for content in (b"", path.read_bytes()[:300], b"hello"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no readable checkpoint"):
            load_torch(path)


def test_what_killed_processes_left_half_written_goes(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".best.pt.0123.tmp", "run/.last.pt.0123.tmp", "run/mine.tmp"):
        (tmp_path / name).write_text("half")
    patrec.files.lock_folder(tmp_path).release()
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["mine.tmp"]
