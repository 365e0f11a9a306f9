"""Does a data set of 20,000 clips stream through training as a small one does? Run by hand.

    python tests/load.py --folder /big/disk/scratch          # 500 against 20,000 full-length clips
    python tests/load.py --folder scratch --clips 2000 --frames 600 --batches 20

Makes the clips (half precision, 0.36 MB each at full length; as much again for the cache),
loads them by common.load_data, as step 7 does, and trains its CNN for a stretch of batches
on the small and on the large set in turn, so that a busy machine slows down both. Before
the last stretch the system is made to take back all pages of the cache file, as if nothing
fitted into memory. Prints the time per clip, the ratio, and the memory: `anonymous` is what
the process has allocated, `mapped` are pages of the cache file, which the system takes back
when it needs the room. All that was made is deleted at the end. Linux only (/proc, madvise).
"""

import argparse
import ctypes
import mmap
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import common  # noqa: E402
from patrec import files, flags, labels, machine, recipes  # noqa: E402

CLASSES = sorted({name for name in labels.MERGE.values() if name})
NETWORK = recipes.GENRE_NETWORKS["cnn_mel"]


def make_set(root, n_clips, n_frames) -> None:
    """n_clips different clips: a few random ones, each time rolled on by some frames."""
    folder = root / files.FOLDERS["genre"]
    (folder / "train").mkdir(parents=True)
    base = np.random.default_rng(0).random((20, 140, n_frames), dtype=np.float32)
    base[:, :128] = 80 * base[:, :128] - 80
    rows = ["Id\tGenre"]
    for i in range(n_clips):
        clip = np.roll(base[i % 20], i // 20, axis=1)
        clip[:128, :4] = -80 + i % 77  # else two clips might be each other's roll
        np.save(folder / "train" / f"{i}.fused.full.npy", clip.astype(np.float16))
        rows.append(f"{i}.fused.full.npy.gz\t{CLASSES[i % len(CLASSES)]}")
    (folder / "train_labels.txt").write_text("\n".join(rows) + "\n")


def watch(peak, stop) -> None:
    """Keep the highest memory of this process in GiB, looked up twenty times a second."""
    while not stop.wait(0.05):
        status = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in status)
        for name, key in (("anonymous", "RssAnon"), ("mapped", "RssFile")):
            peak[name] = max(peak.get(name, 0.0), int(sizes[key].split()[0]) / 2**20)


def train_batches(data, n_batches) -> float:
    """Train step 7's CNN for so many batches, drawn from all over the set; returns s per clip."""
    machine.seed_everything(0)
    n_classes = len(data.names)
    model = common.Classifier(common.make_backbone(NETWORK), n_classes)
    recipe = recipes.Recipe(epochs=1, lr=1e-3, augment=recipes.make_augment(NETWORK, n_classes))
    n_clips = n_batches * recipe.batch_size
    sampler = torch.utils.data.RandomSampler(data.train, replacement=True, num_samples=n_clips)
    batches = common.DataLoader(data.train, recipe.batch_size, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr)
    loss_fn = torch.nn.CrossEntropyLoss()
    state = common.TrainingState(model, loss_fn, optimizer, recipe, n_batches + 1, "cpu")
    began = time.perf_counter()
    common.train_epoch(batches, state, recipe, "cpu", 1)
    return (time.perf_counter() - began) / n_clips


def page_out(frames) -> None:
    """Have the system take back the pages of a mapped file: the next use reads from disk."""
    MADV_PAGEOUT = 21  # from linux/mman.h
    start = frames.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # the file's header comes before
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(frames.nbytes)
    if ctypes.CDLL(None, use_errno=True).madvise(address, size, MADV_PAGEOUT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def load(root, n_clips, n_frames):
    """Make a set of clips and load it, twice: the second time from the cache file."""
    make_set(root, n_clips, n_frames)
    for start in ("first", "second"):
        began = time.perf_counter()
        data = common.load_data(flags.Source(root, seed=0), crop=recipes.window_size(NETWORK))
        ms = 1e3 * (time.perf_counter() - began) / n_clips
        print(f"{n_clips:6d} clips: {start} start {ms:.2f} ms per clip", flush=True)
    return data


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with room")
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--small", type=int, default=500)
    parser.add_argument("--frames", type=int, default=1293)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    machine.keep_freed_memory()
    peak, stop = {}, threading.Event()
    threading.Thread(target=watch, args=(peak, stop), daemon=True).start()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="patrec-load-") as root:
        os.environ["PATREC_CACHE"] = f"{root}/cache"
        sets = [load(Path(root, str(n)), n, args.frames) for n in (args.small, args.clips)]
        for form in ("in memory", "in memory", "read from disk"):
            times = []
            for data in sets:
                if form == "read from disk":
                    page_out(data.train.dataset.store.frames)
                times.append(train_batches(data, args.batches))
            rates = ", ".join(f"{1 / seconds:.1f}" for seconds in times)
            ratio = times[1] / times[0]
            print(f"{form}: clips/s {rates}; time per clip {ratio:.2f} to 1", flush=True)
        print(", ".join(f"peak of {name} memory {size:.2f} GiB" for name, size in peak.items()))
        stop.set()


if __name__ == "__main__":
    main()
