"""One run of a step: its flags, and the record that it leaves."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import math
import shlex
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from patrec.errors import Finished, StepFailed, end_in_one_line
from patrec.features import SR, write_sound
from patrec.files import (
    FOLDERS,
    find_data,
    lock_folder,
    make_folder,
    output_folder,
    to_json,
    write_bytes,
    write_text,
)
from patrec.labels import fingerprint
from patrec.machine import environment, in_notebook, keep_freed_memory, pick_device, seed_everything
from patrec.tables import markdown_table


def bounded(kind, low, high=math.inf):
    """Return an argparse type that accepts `kind` values in [low, high] only."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = {int: "a whole number", float: "a number"}[kind]
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {name} of at least {low:g}{limit}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A mistyped flag is bad input too: one line, without the usage of twenty flags before it."""

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all flags\n")

    def flag(self, name, help, **options):
        """Add a flag whose help ends with its default."""
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)


def make_parser(description, training=False) -> Parser:
    """Build the command line that every step shares; `training` adds the flags of a training."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a mistyped flag must fail, not be guessed
    )
    add = parser.flag
    add("--data-dir", type=Path, help="folder with fma_genre_spectrograms and the other three")
    add("--out-dir", type=Path, help="where outputs go; else /kaggle/working/outputs or outputs")
    add("--seed", type=bounded(int, 0, 2**31), default=42, help="seed of splits, weights, batches")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="where to compute")
    add("--smoke", action="store_true", help="do everything, tiny: checks that the step runs")
    add("--skip-bad", action="store_true", help="leave out unreadable clips instead of stopping")
    add("--allow-leak", action="store_true", help="go on although test clips are trained on")
    add("--no-merge", action="store_true", help="keep the classes instead of merging 20 into 10")
    if training:
        scaled = "passes over the training clips; else scaled to their number"
        add("--epochs", type=bounded(int, 1), help=scaled)
        add("--batch-size", type=bounded(int, 2), default=32, help="clips in a batch")
        add("--lr", type=bounded(float, 1e-8, 10), default=2e-3, help="highest learning rate")
        add("--subset", type=bounded(int, 8), metavar="N", help="train on N clips (torch Subset)")
        check = "only check that the network can learn 4 batches by heart"
        add("--overfit-batch", action="store_true", help=check)
        add("--resume", action="store_true", help="go on from the last finished epoch")
        add(
            "--max-minutes", type=bounded(float, 0.01), help="stop training cleanly after this long"
        )
        workers = "processes that train side by side; else one per core or graphics card"
        add("--workers", type=bounded(int, 1, 1024), metavar="N", help=workers)
    return parser


@dataclasses.dataclass(frozen=True)
class Source:
    """Which clips there are and how they are read: what the data flags of a step say."""

    root: Path  # folder of the four parts
    seed: int = 42  # of all splits
    device: str | torch.device = "cpu"
    merge: bool = True
    skip_bad: bool = False
    allow_leak: bool = False
    subset: int | None = None  # train on so many clips only
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a step trains and where it looks for what others have trained: what its flags say."""

    source: Source
    out: Path  # folder of all steps' outputs
    folder: Path  # this step's
    epochs: int | None = None
    batch_size: int = 32
    lr: float = 2e-3
    resume: bool = False
    deadline: float = math.inf  # when --max-minutes are over, as time.time() tells it
    workers: int | None = None  # processes that train side by side; None: see `count_workers`

    smoke = property(lambda self: self.source.smoke)


class Step:
    """One run of a step: its flags, device, clips and output folder.

    Creating it reads the command line, seeds everything and finds the data. What the
    report needs (headings, text, tables, figures) is shown as it comes, in a notebook too,
    and `finish` writes it into summary.md, the numbers into metrics.json.

    Parameters
    ----------
    name : str, of the output folder, e.g. 'step05_lstm'
    description : str, the step's docstring, shown by --help
    training : bool, add the flags of steps that train
    parts : of the data that the step needs; of the demo set no others are synthesised
    add_flags : callable, optional
        Gets the parser; adds flags of the step's own.
    flags : str
        In a notebook, where there is no command line: e.g. "--epochs 20 --resume".

    Attributes
    ----------
    args, device, out, folder
    source : Source, what the data flags say
    training : TrainingOptions, what the flags of a training say
    """

    def __init__(
        self,
        name,
        description,
        *,
        training=False,
        parts=tuple(FOLDERS),
        add_flags=None,
        flags="",
    ):
        sys.excepthook = end_in_one_line
        parser = make_parser(description, training)
        if add_flags:
            add_flags(parser)
        given = parser.parse_args(shlex.split(flags) if in_notebook() else None)
        # A step without the flags of a training may have to train a missing network: as by default.
        defaults = make_parser("", training=True).parse_args([])
        self.args = args = argparse.Namespace(**(vars(defaults) | vars(given)))
        self.name, self.began, self.lines = name, time.monotonic(), []
        seed_everything(args.seed)
        keep_freed_memory()
        self.device = pick_device(args.device)
        root = find_data(args.data_dir, parts)
        # Gradients that vanish on their way back through an LSTM become numbers below 1e-38, with
        # which some processors compute slowly (docs/experiments.md, Speed): they are 0 instead.
        torch.set_flush_denormal(True)
        self.source = Source(
            root,
            args.seed,
            self.device,
            not args.no_merge,
            args.skip_bad,
            args.allow_leak,
            args.subset or (64 if args.smoke else None),
            args.smoke,
        )
        self.out = output_folder(args.out_dir)
        self.folder = self.out / name
        if args.overfit_batch:  # a check must not replace the results of a full run
            self.folder = self.folder / "overfit_batch"
        make_folder(self.folder)
        self.lock = lock_folder(self.folder)
        minutes = math.inf if args.max_minutes is None else args.max_minutes
        self.training = TrainingOptions(
            self.source,
            self.out.absolute(),  # a worker may have another working directory
            self.folder.absolute(),
            args.epochs,
            args.batch_size,
            args.lr,
            args.resume,
            time.time() + 60 * minutes,
            args.workers,
        )
        self.demo = (root / "DEMO.txt").exists()
        if self.demo:
            self.text(
                "> **Synthesised demo data.** These numbers show that the pipeline runs; "
                "they say nothing about music."
            )
        print(f"{name}: data {root}, device {self.device}, output {self.folder}")

    def show(self, markdown):
        """Add Markdown to summary.md; in a notebook, display it."""
        self.lines.append(markdown + "\n")
        if in_notebook():
            from IPython.display import Markdown, display

            display(Markdown(markdown))

    def heading(self, text):
        if not in_notebook():
            print(f"\n--- {text}")
        self.show(f"## {text}")

    def text(self, markdown):
        """Add a paragraph; indentation that all of its lines share is removed."""
        self.show(textwrap.dedent(markdown).strip())

    def table(self, frame, caption=""):
        """Add a pandas table (index included) and print it."""
        self.show((f"**{caption}**\n\n" if caption else "") + markdown_table(frame))
        if not in_notebook():
            print(frame.to_string(float_format=lambda value: f"{value:.3f}"))

    def figure(self, fig, name, caption):
        """Save a figure as <name>.png, show it in a notebook, add it to summary.md."""
        png = {"format": "png", "dpi": 120, "bbox_inches": "tight"}
        write_bytes(self.folder / f"{name}.png", lambda file: fig.savefig(file, **png))
        self.lines.append(f"![{caption}]({name}.png)\n\n*{caption}*\n")
        if in_notebook():
            from IPython.display import Markdown, display

            display(fig, Markdown(f"*{caption}*"))
        plt.close(fig)

    def sound(self, waveform, name, caption):
        """Save a waveform (at SR) as <name>.mp3, with a player in a notebook, a link elsewhere."""
        write_sound(self.folder / f"{name}.mp3", waveform)
        self.lines.append(f"[{caption}]({name}.mp3)\n")
        if in_notebook():
            from IPython.display import Audio, Markdown, display

            display(Markdown(f"*{caption}*"), Audio(waveform, rate=SR))

    def show_source(self, *objects):
        """Add the source of functions or classes: what the page speaks of, word by word."""
        for thing in objects:
            # A notebook knows the source of functions only, not that of a class as a whole.
            methods = [part for part in vars(thing).values() if inspect.isfunction(part)]
            whole = not (inspect.isclass(thing) and in_notebook())
            with contextlib.suppress(OSError, TypeError):
                parts = [inspect.getsource(part) for part in ([thing] if whole else methods)]
                code = "\n".join(textwrap.dedent(part) for part in parts)
                self.show(f"```python\n{code.strip()}\n```")

    def show_layers(self, model, data, n_clips=2):
        """Add a table of a network's layers: output shape for a batch, and weights."""
        items = data.train.dataset.__getitems__(data.train.indices[:n_clips])
        x, lengths = (torch.stack(column) for column in (list(zip(*items, strict=True))[::2]))
        rows, hooks = [], []

        def weights_of(module):
            return sum(weights.numel() for weights in module.parameters())

        def note(module, _, output, name):
            output = output[0] if isinstance(output, tuple) else output
            shape = " x ".join(map(str, output.shape))
            rows.append([name, type(module).__name__, shape, weights_of(module)])

        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(functools.partial(note, name=name)))
        training = model.training
        with torch.no_grad():
            model.eval()(x.to(self.device), lengths)
        model.train(training)
        for hook in hooks:
            hook.remove()
        batch = f"Layer by layer, for a batch of {tuple(x.shape)} (clips, frames, bands)"
        table = pd.DataFrame(rows, columns=["layer", "operation", "output", "weights"])
        self.table(table.set_index("layer"), f"{batch}; {weights_of(model):,} weights")

    def require(self, reached, message):
        """End the step with exit code 1 where a goal was not reached; what is shown is kept."""
        if not reached:
            self.write()
            raise StepFailed(message)

    def write(self):
        write_text(self.folder / "summary.md", f"# {self.name}\n\n" + "\n".join(self.lines))

    def finish(self, runs=None, **facts):
        """Write metrics.json, args.json and summary.md; after --overfit-batch, end here."""
        root = self.source.root
        prints = {part: value for part in FOLDERS if (value := fingerprint(root, part))}
        metrics = {
            "step": self.name,
            "seconds": round(time.monotonic() - self.began, 2),
            "environment": environment(self.device),
            "data": {"root": str(root), "demo": self.demo, "fingerprint": prints},
            "seed": self.args.seed,
            "smoke": self.args.smoke,
            "runs": runs or {},
            **facts,
        }
        write_text(self.folder / "args.json", to_json(vars(self.args)))
        self.write()
        write_text(self.folder / "metrics.json", to_json(metrics))
        print(f"{self.name}: done in {metrics['seconds']:.0f} s; see {self.folder / 'summary.md'}")
        if self.args.overfit_batch:
            raise Finished("--overfit-batch: done")
