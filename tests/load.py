"""Does a data set of 20,000 clips stream through training as a small one does? Run by hand.

    python tests/load.py --folder /big/disk/scratch          # 500 against 20,000 full-length clips
    python tests/load.py --folder scratch --clips 2000 --frames 600 --batches 20

Makes the clips (half precision, 0.36 MB each at full length; as much again for the cache),
loads them by common.load_data, as step 7 does, and trains its CNN for a stretch of batches
on the small and on the large set in turn, so that a busy machine slows down both. Before
the last two stretches the system is made to take back part of the cache file's pages: as
much as would not fit into --room GiB, then all. Prints the time per clip, the ratio, and
the memory: `anonymous` is what the process has allocated, `mapped` are pages of the cache
file, which the system takes back when it needs the room. All that was made is deleted at
the end. Linux only (/proc, madvise).
"""

import argparse
import ctypes
import itertools
import mmap
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import common  # noqa: E402
from patrec import features, files, flags, labels, machine, recipes  # noqa: E402

CLASSES = sorted({name for name in labels.MERGE.values() if name})


def make_set(root, n_clips, n_frames) -> None:
    """n_clips different clips: a few random ones, each time rolled on by some frames."""
    folder = root / files.FOLDERS["genre"]
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = [
        np.vstack([rng.uniform(-80, 0, (128, n_frames)), rng.uniform(0, 1, (12, n_frames))]).astype(
            np.float16
        )
        for _ in range(20)
    ]
    rows = ["Id\tGenre"]
    for i in range(n_clips):
        clip = np.roll(base[i % 20], i // 20, axis=1)
        clip[: features.N_MELS, :4] = -80 + i % 77  # else two clips might be each other's roll
        np.save(folder / "train" / f"{i}.fused.full.npy", clip)
        rows.append(f"{i}.fused.full.npy.gz\t{CLASSES[i % len(CLASSES)]}")
    (folder / "train_labels.txt").write_text("\n".join(rows) + "\n")


def memory_gib() -> dict:
    """Anonymous and file-mapped memory of this process now, in GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[key].split()[0]) / 2**20
        for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile"))
    }


def watch(peak, stop) -> None:
    """Keep the highest memory seen, twenty times a second."""
    while not stop.wait(0.05):
        now = memory_gib()
        for name in now:
            peak[name] = max(peak.get(name, 0.0), now[name])


def train_batches(data, n_batches) -> float:
    """Train step 7's CNN for so many batches, drawn from all over the set; returns s per clip."""
    machine.seed_everything(0)
    network, n_classes = recipes.GENRE_NETWORKS["cnn_mel"], len(data.names)
    model = common.Classifier(common.make_backbone(network), n_classes)
    recipe = recipes.Recipe(epochs=1, lr=1e-3, augment=recipes.make_augment(network, n_classes))
    loader = common.DataLoader(data.train, recipe.batch_size, shuffle=True)
    endless = itertools.chain.from_iterable(itertools.repeat(loader.batch_sampler))
    stretch = list(itertools.islice(endless, n_batches))
    batches = common.DataLoader(data.train, batch_sampler=stretch)
    optimizer, loss_fn = (
        torch.optim.AdamW(model.parameters(), recipe.lr),
        torch.nn.CrossEntropyLoss(),
    )
    state = common.TrainingState(model, loss_fn, optimizer, recipe, n_batches + 1, "cpu")
    began = time.perf_counter()
    common.train_epoch(batches, state, recipe, "cpu", 1)
    return (time.perf_counter() - began) / sum(map(len, stretch))


def page_out(frames, share) -> None:
    """Have the system take back this share of a mapped file: the next use reads from disk."""
    MADV_PAGEOUT = 21  # from linux/mman.h
    start = frames.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # the file's header comes before
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(int(share * frames.nbytes))
    if ctypes.CDLL(None, use_errno=True).madvise(address, size, MADV_PAGEOUT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="scratch folder on a disk with room; a folder patrec-load is made in it",
    )
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--small", type=int, default=500)
    parser.add_argument("--frames", type=int, default=1293)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument(
        "--room", type=float, default=6.0, help="memory to act as if there were, in GiB"
    )
    args = parser.parse_args()
    root = args.folder / "patrec-load"
    os.environ["PATREC_CACHE"] = str(root / "cache")
    machine.keep_freed_memory()
    peak, stop = {}, threading.Event()
    threading.Thread(target=watch, args=(peak, stop), daemon=True).start()
    try:
        data = {}
        for n_clips in (args.small, args.clips):
            began = time.perf_counter()
            make_set(root / str(n_clips), n_clips, args.frames)
            made = time.perf_counter()
            for start in ("first", "second"):
                data.pop(n_clips, None)  # one mapping at a time
                data[n_clips] = common.load_data(
                    flags.Source(root / str(n_clips), seed=0),
                    crop=recipes.BUDGETS["cnn"].crop,
                )
                now = time.perf_counter()
                print(
                    f"{n_clips:6d} clips: made in {made - began:.0f} s; " * (start == "first")
                    + f"{start} start {1e3 * (now - made) / n_clips:.2f} ms per clip",
                    flush=True,
                )
                made = now
            shutil.rmtree(root / str(n_clips))  # the cache file holds them now
        for form in ("all in memory", "all in memory", f"{args.room:g} GiB", "none in memory"):
            times = {}
            for n_clips, one in data.items():
                frames = one.train.dataset.store.frames
                fits = {
                    "none in memory": 0.0,
                    f"{args.room:g} GiB": (args.room - peak["anonymous"]) * 2**30 / frames.nbytes,
                }.get(form, 1.0)
                page_out(frames, max(0.0, 1 - fits))
                times[n_clips] = train_batches(one, args.batches)
                print(
                    f"{n_clips:6d} clips, {form}: {1 / times[n_clips]:.1f} clips/s in training",
                    flush=True,
                )
            print(
                f"time per clip, {args.clips} clips over {args.small}, {form}:"
                f" {times[args.clips] / times[args.small]:.2f}",
                flush=True,
            )
        print(
            "peak memory: " + ", ".join(f"{name} {value:.2f} GiB" for name, value in peak.items())
        )
    finally:
        stop.set()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
