"""The command line that the steps share."""

import argparse
import contextlib
import dataclasses
import math
import shlex
import time
from pathlib import Path

import torch

from patrec.files import find_data
from patrec.machine import in_notebook, keep_freed_memory, pick_device, seed_everything


def bounded(kind, low, high=math.inf):
    """Return an argparse type that accepts `kind` values in [low, high] only."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = {int: "a whole number", float: "a number"}[kind]
        limit = f" and at most {high:g}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text} is not {name} of at least {low:g}{limit}")

    return parse


class Parser(argparse.ArgumentParser):
    """A mistyped flag is bad input too: one line, without the usage of twenty flags before it."""

    def __init__(self, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=raw, allow_abbrev=False, **options)  # no flag is guessed
        self.register("type", Path, lambda text: Path(text).expanduser())  # --out-dir=~/lab

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all flags\n")

    def flag(self, name, help, **options):
        """Add a flag whose help ends with its default."""
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)


def make_parser(description, training) -> Parser:
    """Build the command line that every step shares; `training` adds the flags of a training."""
    parser = Parser(description=description)
    add = parser.flag
    add("--data-dir", type=Path, help="folder with fma_genre_spectrograms and the other three")
    add("--out-dir", type=Path, help="where outputs go; else /kaggle/working/outputs or outputs")
    add("--seed", type=bounded(int, 0, 2**31), default=42, help="seed of splits, weights, batches")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--smoke", action="store_true", help="do everything, tiny: checks that the step runs")
    add("--skip-bad", action="store_true", help="leave out unreadable clips instead of stopping")
    add("--allow-leak", action="store_true", help="go on although test clips are trained on")
    add("--no-merge", action="store_true", help="keep the classes instead of merging 20 into 10")
    if training:
        add("--epochs", type=bounded(int, 1), help="passes over clips; else set by their number")
        add("--batch-size", type=bounded(int, 2), default=32, help="clips in a batch")
        add("--lr", type=bounded(float, 1e-8, 10), default=1e-3, help="learning rate of Adam")
        add("--subset", type=bounded(int, 8), metavar="N", help="train on N clips (torch Subset)")
        lab = "lab: Adam, cross-entropy, dropout, best epoch alone; into OUT_DIR/recipe_lab"
        add("--recipe", choices=["full", "lab"], default="full", help=lab)
        add("--overfit-batch", action="store_true", help="only check that it can overfit 4 batches")
        add("--resume", action="store_true", help="go on from the last finished epoch")
        add("--max-minutes", type=bounded(float, 0.01), help="stop cleanly after this long")
        workers = "trainings at the same time; else one per core or graphics card"
        add("--workers", type=bounded(int, 1, 1024), metavar="N", help=workers)
    return parser


@dataclasses.dataclass(frozen=True)
class Source:
    """Which clips there are and how they are read, from the data flags of a step."""

    root: Path  # folder of the four parts
    seed: int = 42  # of all splits
    device: str | torch.device = "cpu"
    merge: bool = True
    skip_bad: bool = False
    allow_leak: bool = False
    subset: int | None = None  # train on this many clips only
    smoke: bool = False

    demo = property(lambda self: (self.root / "DEMO.txt").exists())


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a step trains and where it looks for networks of other steps, from its flags."""

    source: Source
    out: Path  # folder of all steps' outputs
    folder: Path  # this step's
    epochs: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    recipe: str = "full"  # or "lab": see `make_recipe`
    resume: bool = False
    deadline: float = math.inf  # when --max-minutes are over, as time.time() tells it
    workers: int | None = None  # trainings at the same time; None: see `count_workers`

    smoke = property(lambda self: self.source.smoke)
    demo = property(lambda self: self.source.demo)


def parse_flags(description, training=False, add_flags=None, flags="") -> argparse.Namespace:
    """Read the command line; in a notebook, which has none, the text `flags`.

    A step without the flags of a training has them at their defaults: it may have to train a
    network that it does not find.
    """
    parser = make_parser(description, training)
    if add_flags:
        add_flags(parser)
    given = parser.parse_args(shlex.split(flags) if in_notebook() else None)
    defaults = make_parser("", training=True).parse_args([])
    return argparse.Namespace(**(vars(defaults) | vars(given)))


def prepare_process(seed) -> None:
    """Seed everything, and set what makes a training on a processor fast."""
    seed_everything(seed)
    keep_freed_memory()
    # Gradients that vanish on their way back through an LSTM become numbers below 1e-38, with
    # which some processors compute slowly (docs/experiments.md, Speed): they are 0 instead.
    torch.set_flush_denormal(True)


def source_from(args, parts=("genre", "emotion")) -> Source:
    """The data that the flags name; `parts` are those that the step needs."""
    same = {name: getattr(args, name) for name in ("seed", "skip_bad", "allow_leak", "smoke")}
    return Source(
        device=pick_device(args.device),
        root=find_data(args.data_dir, parts),
        merge=not args.no_merge,
        subset=args.subset or (64 if args.smoke else None),
        **same,
    )


def options_from(args, source, out, folder) -> TrainingOptions:
    """The TrainingOptions of a step that writes into `folder`, within `out`."""
    minutes = math.inf if args.max_minutes is None else args.max_minutes
    same = ("epochs", "batch_size", "lr", "recipe", "resume", "workers")
    return TrainingOptions(
        source=source,
        out=out.absolute(),  # a worker may have another working directory
        folder=folder.absolute(),
        deadline=time.time() + 60 * minutes,
        **{name: getattr(args, name) for name in same},
    )
