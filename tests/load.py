"""Does a data set of 20,000 clips stream through training as a small one does? Run by hand.

    python tests/load.py --folder /big/disk/scratch          # 500 against 20,000 full-length clips
    python tests/load.py --folder scratch --clips 2000 --frames 600 --batches 20

Makes the clips (0.36 MB each at full length; as much again for the cache), loads them as step 7
does, and trains its CNN for a stretch of batches on the small and on the large set in turn, so
that a busy machine slows down both. Prints the memory too: `anonymous` is what the process has
allocated, which must not grow with the set; `mapped` are pages of the cache file, which the system
takes back when it needs the room. All that was made is deleted. Linux only (/proc).
"""

import argparse
import os
import re
import sys
import tempfile
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


def train_batches(data, n_batches) -> float:
    """Train step 7's CNN for so many batches, drawn from all over the set; returns clips per s."""
    machine.seed_everything(0)
    n_classes = len(data.names)
    model = common.Classifier(common.make_backbone(NETWORK), n_classes)
    recipe = recipes.Recipe(epochs=1)
    n_clips = n_batches * recipe.batch_size
    sampler = torch.utils.data.RandomSampler(data.train, replacement=True, num_samples=n_clips)
    batches = common.DataLoader(data.train, recipe.batch_size, sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr)
    loss_fn = torch.nn.CrossEntropyLoss()
    state = common.TrainingState(model, loss_fn, optimizer, recipe, n_batches + 1, "cpu")
    began = time.perf_counter()
    common.train_epoch(batches, state, recipe, "cpu", 1)
    return n_clips / (time.perf_counter() - began)


def report(data, what) -> None:
    """Print what was measured of a set, and the memory of the process now."""
    sizes = re.findall(r"Rss(?:Anon|File):\s+(\d+)", Path("/proc/self/status").read_text())
    anonymous, mapped = (int(size) / 2**20 for size in sizes)
    n_clips = len(data.train.dataset)
    print(f"{n_clips} clips: {what}; {anonymous:.2f} GiB anonymous, {mapped:.2f} GiB mapped")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with room")
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--frames", type=int, default=1293)
    parser.add_argument("--batches", type=int, default=200)
    args = parser.parse_args()
    machine.keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="patrec-load-") as root:
        os.environ["PATREC_CACHE"] = f"{root}/cache"
        sets = []
        for n_clips in (args.clips // 40, args.clips):
            folder = Path(root, str(n_clips))
            make_set(folder, n_clips, args.frames)
            began = time.perf_counter()
            source = flags.Source(folder, seed=0)
            sets.append(common.load_data(source, crop=recipes.window_size(NETWORK)))
            ms = 1e3 * (time.perf_counter() - began) / n_clips
            report(sets[-1], f"loaded in {ms:.2f} ms per clip")
        for data in 3 * sets:
            report(data, f"{train_batches(data, args.batches):.1f} clips/s in training")


if __name__ == "__main__":
    main()
