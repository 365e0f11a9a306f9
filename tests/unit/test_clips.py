"""Arrays of clips: checked one by one, cached in their order, compared between splits."""

import ast
import errno
import io
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from conftest import GENRES, fake_clip, patch_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from common import load_data
from patrec.clips import find_emotion_leak, find_leak, load_clips, read_array, sample_clips
from patrec.errors import InputError
from patrec.flags import Source
from patrec.labels import Entry, read_entries


def npy(array, save=np.save, **options):
    file = io.BytesIO()
    save(file, array, **options)
    return file.getvalue()


def with_header(shape):
    """A file that says it holds an array of this shape, and holds a few numbers."""
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(64)


CLIP = fake_clip(np.random.default_rng(0), 0.5, 20)


def spoiled(value, row=5):
    array = CLIP.copy()
    array[row, 3] = value
    return npy(array)


ARRAY_FAULTS = {
    "missing": (None, "missing, though the label file names it"),
    "empty": (b"", "not a readable .npy"),
    "truncated": (npy(CLIP)[:-1000], "not a readable .npy"),
    "a version yet unknown": (npy(CLIP)[:6] + b"\7" + npy(CLIP)[7:], "not (7, 0)"),
    "text": (b"<html>404</html>\n" * 9, "not a readable .npy"),
    "an archive": (npy(CLIP, np.savez), "not a readable .npy"),
    "a header of 9 TB": (with_header((140, 2**33)), "not a readable .npy"),
    "wrong shape": (npy(CLIP[:128]), "shape (128, 20), expected (140, T)"),
    "transposed": (npy(CLIP.T.copy()), "transposed"),
    "integers": (npy(CLIP.astype(int)), "type int64"),
    "objects": (npy(CLIP.astype(object), allow_pickle=True), "not a readable .npy"),
    "NaN": (spoiled(np.nan), "NaN"),
    "NaN in chroma": (spoiled(np.nan, row=130), "NaN"),
    "infinite": (spoiled(-np.inf), "infinite"),
    "too large for 32 bits": (spoiled(1e300), "infinite"),
    "power and not dB": (spoiled(12.0), "mel rows span"),
    "chroma of 3": (spoiled(3.0, row=130), "chroma rows span"),
    "constant": (npy(np.full((140, 20), -80.0)), "silence"),
    "no frames": (npy(CLIP[:, :0]), "no frames"),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
@pytest.mark.filterwarnings("error")
def test_bad_arrays_are_named(tmp_path, fault):
    content, words = ARRAY_FAULTS[fault]
    path = tmp_path / "1.fused.full.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        read_array(path)
    assert str(path) in str(error.value) and "--skip-bad" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_compressed_array_is_named_with_the_cure(tmp_path):
    path = tmp_path / "1.fused.full.npy"
    path.with_name(f"{path.name}.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(InputError, match=r"1.fused.full.npy: missing, only .*\.npy\.gz.*gunzip"):
        read_array(path)


def assert_own_frames(store):
    """Every clip of the store has the frames of its own file."""
    assert len(store.frames) == int(store.lengths.sum()) and store.frames.dtype == torch.float16
    parts = store.frames.split(store.lengths.tolist())
    assert store.starts.tolist() == [0, *store.lengths.cumsum(0)[:-1]]
    for entry, frames, _ in zip(store.entries, parts, store.digests, strict=True):
        np.testing.assert_allclose(frames.T.float(), np.load(entry.path), atol=0.04)


FILE_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1)
FILE_NAMES = FILE_NAMES.filter(lambda name: len(name.encode()) < 200)


@settings(derandomize=True, max_examples=15, deadline=None, database=None)
@given(names=st.lists(FILE_NAMES, unique=True, min_size=1, max_size=6), draw=st.data())
def test_clips_keep_frames_in_any_order_any_subset_under_any_names(tmp_path_factory, names, draw):
    """Through the cache, too: frames under the ids of other clips would train and score well."""
    folder = tmp_path_factory.mktemp("any")
    entries = [Entry(name, folder / f"{name}.npy", "x") for name in names]
    for n, entry in enumerate(entries, start=1):
        array = np.full((140, 2), -n, dtype=np.float32)  # of equal lengths and sizes, on purpose
        array[1], array[128:] = -40, n / 10
        np.save(entry.path, array)
    for _ in range(3):
        asked = draw.draw(st.lists(st.sampled_from(entries), unique=True, min_size=1))
        for _ in range(2):  # the second time from the cache
            store = load_clips(asked, threads=draw.draw(st.sampled_from([1, 3, 16])))
            assert store.entries == asked
            assert_own_frames(store)


def test_clips_of_several_blocks_keep_their_order(tmp_path):
    """Arrays are converted 512 at a time. And bug 12: a limit of 150 frames kept 3.5 s of 30 s."""
    entries = [Entry(str(n), tmp_path / f"{n}.npy", "x") for n in range(1, 1100)]
    for n, entry in enumerate(entries, start=1):
        array = np.zeros((140, 1300 if n == 9 else 1 + n % 3), dtype=np.float16)
        array[:2] = [[-(n // 20)], [-(n % 20)]]
        np.save(entry.path, array)
    entries[700].path.write_bytes(b"")
    store = load_clips(entries, skip_bad=True)
    assert store.entries == entries[:700] + entries[701:]
    assert_own_frames(store)


def test_headers_are_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Up to CPython 3.11.7 the parser is not safe in threads: sound clips were called broken."""
    entries = [Entry(str(n), tmp_path / f"{n}.npy", "x") for n in range(20, 60)]
    for n, entry in enumerate(entries, start=20):  # NumPy remembers headers: all lengths differ
        np.save(entry.path, fake_clip(np.random.default_rng(n), 0.5, n))
    parse, turn = ast.literal_eval, threading.Lock()

    def parse_alone(*args):
        assert turn.acquire(blocking=False), "two threads were in the parser at once"
        time.sleep(0.002)  # long enough for another thread to come in
        turn.release()
        return parse(*args)

    monkeypatch.setattr(ast, "literal_eval", parse_alone)
    assert len(load_clips(entries, threads=8).entries) == 40


@pytest.fixture
def entries(own_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    return read_entries(own_data, "genre", "train")


def test_second_start_reads_the_cache_and_not_the_files(entries, monkeypatch):
    first = load_clips(entries)
    first.frames += 1  # a change made by mistake never reaches the file
    patch_everywhere(monkeypatch, "read_array", lambda path: pytest.fail(f"{path} was read again"))
    again = load_clips(entries)
    assert again.entries == first.entries and again.digests == first.digests
    assert_own_frames(again)


def test_a_file_that_changed_or_vanished_is_noticed_in_spite_of_the_cache(entries):
    load_clips(entries)
    path, stat = entries[2].path, entries[2].path.stat()
    array = np.load(path)
    array[:128], array[0] = -33.0, -44.0
    np.save(path, array)  # same name, same size: only the time tells
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert_own_frames(load_clips(entries))
    entries[1].path.unlink()
    with pytest.raises(InputError, match=f"{entries[1].clip_id}.*missing"):
        load_clips(entries)


def test_files_of_equal_size_and_time_are_told_apart_by_their_names(tmp_path):
    """Whole clips of 30 s are equally large, and an archive may give all files the same time."""
    entries = [Entry(str(n), tmp_path / f"{n}.npy", "x") for n in (1, 2)]
    for n, entry in enumerate(entries, start=1):
        array = np.zeros((140, 3), dtype=np.float32)
        array[1] = -n
        np.save(entry.path, array)
        os.utime(entry.path, ns=(0, 0))
    for entry in entries:
        assert_own_frames(load_clips([entry]))


def test_bad_files_stop_or_are_left_out_also_from_the_cache(entries, capsys):
    np.save(entries[4].path, np.full((140, 9), np.nan))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match=entries[4].clip_id):
            load_clips(entries)
        store = load_clips(entries, skip_bad=True)
        assert store.entries == entries[:4] + entries[5:]
        assert capsys.readouterr().err.startswith(f"left out: {entries[4].path}: holds NaN")
        assert_own_frames(store)  # the clips after the bad one keep their own


def test_nothing_but_bad_files(entries):
    for entry in entries:
        entry.path.write_bytes(b"")
    with pytest.raises(InputError, match=f"not a readable.*and {len(entries) - 1} more bad files"):
        load_clips(entries)
    with pytest.raises(InputError, match=f"train: none of {len(entries)} clips can be read"):
        load_clips(entries, skip_bad=True)
    with pytest.raises(InputError, match="no clips to load"):
        load_clips([])


def test_a_clip_that_failed_for_a_moment_is_read_again(entries, monkeypatch):
    """A share that hangs once must not brand a clip as bad for as long as the cache lives."""

    def fails(path):
        if path == entries[4].path:
            raise InputError(f"{path}: not a readable .npy array (Input/output error)")
        return read_array(path)

    with monkeypatch.context() as patch:
        patch_everywhere(patch, "read_array", fails)
        assert len(load_clips(entries, skip_bad=True).entries) == len(entries) - 1
    store = load_clips(entries)
    assert store.entries == entries
    assert_own_frames(store)


SPOILT = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1000],
    "zeros": lambda content: bytes(len(content)),
    "another's": lambda content: npy(np.zeros((9, 140), np.float16)),
    "gone": None,
}


@pytest.mark.parametrize("kind", ["npy", "json"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_broken_cache_is_made_anew(entries, tmp_path, spoil, kind):
    load_clips(entries)
    (path,) = (tmp_path / "cache").glob(f"*.{kind}")
    content = path.read_bytes()
    path.unlink()  # not written over: the file is mapped
    if SPOILT[spoil]:
        path.write_bytes(SPOILT[spoil](content))
    assert_own_frames(load_clips(entries))
    assert path.read_bytes() == content


def test_a_full_disk_leaves_no_cache(entries, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cache.*No space left on device.*\$PATREC_CACHE"):
            load_clips(entries)
    assert not list((tmp_path / "cache").iterdir())
    assert_own_frames(load_clips(entries))


def test_a_set_larger_than_memory_is_mapped_read_only(entries, monkeypatch):
    """Linux refuses a copy-on-write mapping larger than its memory."""
    memmap = np.memmap

    def refuse(*args, mode, **options):
        if mode == "c":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return memmap(*args, mode=mode, **options)

    load_clips(entries)
    monkeypatch.setattr(np, "memmap", refuse)
    patch_everywhere(monkeypatch, "fill_cache", lambda *_: pytest.fail("the cache was made anew"))
    assert_own_frames(load_clips(entries))


def test_leak_is_found_by_id_and_by_content(own_data):
    train, test = (read_entries(own_data, "genre", split) for split in ("train", "test"))
    array = np.load(train[0].path)
    array[0, 16:] -= 1.0  # two excerpts may share a fade-in
    np.save(test[0].path, array)
    assert find_leak(load_clips(train), load_clips(test)) == []
    shutil.copy(train[0].path, test[0].path)  # the same array under another id
    same_id = test[1]._replace(clip_id=train[1].clip_id)
    known, asked = load_clips(train), load_clips([test[0], same_id, *test[2:]])
    assert find_leak(known, asked) == [test[0].clip_id, train[1].clip_id]
    assert find_leak(known, asked, rows=[2, 1]) == [train[1].clip_id]  # of held-out clips alone


def test_a_clip_of_a_dropped_class_is_a_leak_where_classes_are_not_merged(own_data):
    """The genre network was trained on it then; after the merge it was not."""
    data = load_data(Source(own_data), target="emotion", n_folds=2)
    held_out, entries = data.held_out, data.train.dataset.store.entries
    heard, taught = (entries[part.indices[0]] for part in (held_out, data.train))
    # Only held-out clips must be new to it.
    shutil.copy(taught.path, read_entries(own_data, "genre", "train", merge=True)[0].path)
    dropped = next(e for e in read_entries(own_data, "genre", "train") if e.label == "Indie-Rock")
    shutil.copy(heard.path, dropped.path)
    assert find_emotion_leak(Source(own_data), held_out) is None
    with pytest.raises(InputError, match=f"1 of 4 held-out .*{heard.clip_id}"):
        find_emotion_leak(Source(own_data, merge=False), held_out)


def test_sampled_clips_are_their_own_in_both_forms(own_data):
    labels = {e.clip_id: e for e in read_entries(own_data, "genre", "train")}
    beats = {e.clip_id: e for e in read_entries(own_data, "genre", "train", beat=True)}
    clips = sample_clips(own_data, 2, seed=1)
    assert len(clips) == 2 * len(GENRES) and clips[0].genre != clips[1].genre
    for clip in clips:
        assert clip.genre == labels[clip.clip_id].label
        np.testing.assert_allclose(clip.full, np.load(labels[clip.clip_id].path), atol=0.04)
        np.testing.assert_allclose(clip.beat, np.load(beats[clip.clip_id].path), atol=0.04)
    alone = sample_clips(own_data, 2, seed=1, beat=False)
    assert [clip.clip_id for clip in alone] == [clip.clip_id for clip in clips]
    others = sample_clips(own_data, 2, seed=2, beat=False)
    assert {clip.clip_id for clip in others[:2]} != {clip.clip_id for clip in clips[:2]}
    beats[clips[0].clip_id].path.write_bytes(b"")
    rest = sample_clips(own_data, 2, seed=1, skip_bad=True)
    assert {c.clip_id for c in clips} - {c.clip_id for c in rest} == {clips[0].clip_id}
