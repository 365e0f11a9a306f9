"""The record of a step: what it shows, and the files that it leaves."""

import contextlib
import inspect
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from patrec.errors import Finished, StepFailed, end_in_one_line
from patrec.features import SR, write_sound
from patrec.files import lock_folder, make_folder, output_folder, to_json, write_bytes, write_text
from patrec.flags import options_from, parse_flags, prepare_process, source_from
from patrec.labels import fingerprints
from patrec.machine import environment, in_notebook, show_in_notebook
from patrec.tables import markdown_table


class Step:
    """The record of one run of a step.

    What the report needs (headings, text, tables, figures) is shown as it comes, in a notebook
    too; `finish` writes it into summary.md, and the numbers into metrics.json.

    Parameters
    ----------
    name : str, of the output folder, e.g. 'step05_lstm'
    description : str, the step's docstring, shown by --help
    training : bool, add the flags of steps that train
    parts : of the data that the step needs
    add_flags : callable, optional, gets the parser and adds flags of the step's own
    flags : str, for a notebook, which has no command line: e.g. "--epochs 20 --resume"

    Its attributes `args`, `source` (a Source) and `training` (TrainingOptions) are what the flags
    say; `out` is the folder of all steps' outputs, `folder` its own.
    """

    def __init__(
        self, name, description, *, training=False, parts=("genre", "emotion"),
        add_flags=None, flags="",
    ):  # fmt: skip
        sys.excepthook = end_in_one_line
        self.args = parse_flags(description, training, add_flags, flags)
        self.name, self.began, self.lines = name, time.monotonic(), []
        prepare_process(self.args.seed)
        self.source = source_from(self.args, parts)
        self.device = self.source.device
        self.out = output_folder(self.args.out_dir)
        if lab := self.args.recipe == "lab":  # its networks must not replace the others
            self.out /= "recipe_lab"
        self.searched = "all epochs" if lab else "the last 20% of the epochs"  # for the best one
        self.curves = "The dot marks the kept epoch. The training loss is measured with dropout"
        if not (lab or getattr(self.args, "plain", False)):
            self.curves += (
                " and, on mel bands, with shifted bands. The validation loss and score are "
                "measured without them, with the averaged weights, which lag behind in the first "
                "epochs"
            )
        self.folder = self.out / name
        if self.args.overfit_batch:  # a check must not replace the results of a full run
            self.folder = self.folder / "overfit_batch"
        make_folder(self.folder)
        self.lock = lock_folder(self.folder)
        self.training = options_from(self.args, self.source, self.out, self.folder)
        if self.source.demo:
            self.text("""
                > **Made-up demo data.** These numbers show that the pipeline runs. They say
                > nothing about music. Trainings are only as long as it takes to learn these data.
            """)
        if lab:
            self.text(
                "> **`--recipe lab`**: Adam, cross-entropy and dropout alone; best of all epochs."
            )
        print(f"{name}: data {self.source.root}, device {self.device}, output {self.folder}")

    def show(self, markdown):
        """Add Markdown to summary.md; in a notebook, display it."""
        self.lines.append(markdown + "\n")
        show_in_notebook(markdown)

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
        for axis in [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]:
            if axis.get_scale() == "log":  # matplotlib's own labels are formulas, see plots.py
                low, high = axis.get_view_interval()  # :g alone would mix 0.001 and 1e-05
                axis.set_major_formatter("{x:g}" if low >= 1e-4 and high < 1e5 else "{x:.0e}")
                axis.set_minor_formatter(NullFormatter())
        png = {"format": "png", "dpi": 120}
        write_bytes(self.folder / f"{name}.png", lambda file: fig.savefig(file, **png))
        self.lines.append(f"![{caption}]({name}.png)\n\n*{caption}*\n")
        show_in_notebook(fig, f"*{caption}*")
        plt.close(fig)

    def sound(self, waveform, name, caption):
        """Save a waveform (at SR) as <name>.mp3, with a player in a notebook, a link elsewhere."""
        write_sound(self.folder / f"{name}.mp3", waveform)
        self.lines.append(f"[{caption}]({name}.mp3)\n")
        show_in_notebook(f"*{caption}*", (waveform, SR))

    def show_source(self, *objects):
        """Add the source code of functions or classes that the text describes."""
        for thing in objects:
            with contextlib.suppress(OSError, TypeError):  # a class that a notebook's cell defines
                self.show(f"```python\n{textwrap.dedent(inspect.getsource(thing)).strip()}\n```")

    def require(self, reached, message):
        """End the step with exit code 1 where a goal was not reached; what is shown is kept."""
        if not reached:
            self.write()
            raise StepFailed(message)

    def write(self):
        write_text(self.folder / "summary.md", f"# {self.name}\n\n" + "\n".join(self.lines))

    def finish(self, runs=None, **facts):
        """Write metrics.json, args.json and summary.md; after --overfit-batch, end here."""
        root, demo, args = self.source.root, self.source.demo, self.args
        metrics = {"step": self.name, "seconds": round(time.monotonic() - self.began, 2)}
        metrics |= {"environment": environment(self.device), "seed": args.seed, "smoke": args.smoke}
        metrics["data"] = {"root": str(root), "demo": demo, "fingerprint": fingerprints(root)}
        metrics |= {"runs": runs or {}} | facts
        write_text(self.folder / "args.json", to_json(vars(self.args)))
        self.write()
        write_text(self.folder / "metrics.json", to_json(metrics))
        print(f"{self.name}: done in {metrics['seconds']:.0f} s; see {self.folder / 'summary.md'}")
        if self.args.overfit_batch:
            raise Finished("--overfit-batch: done")
        here = Path(sys.argv[0])
        later = [path.name for path in here.parent.glob("step*_*.py") if path.name > here.name]
        if later:  # not in a notebook, and not after the last step
            print(f"next: python {min(later)}")
