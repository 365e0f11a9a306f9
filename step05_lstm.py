"""Step 5: music genre recognition with LSTMs.

The lab asks: a) an LSTM that takes the spectrograms of step 4's Dataset; b) a boolean
`overfit_batch` of train(), which learns a few batches by heart to prove that the network
can be trained; c) an LSTM on mel spectrograms, d) on beat-synchronised ones, e) on
chromagrams, f) on both together.

    python step05_lstm.py                          # all six LSTMs, default settings
    python step05_lstm.py --features mel beat_mel  # two of them
    python step05_lstm.py --overfit-batch          # b): four batches by heart
    python step05_lstm.py --plain                  # the textbook LSTM, for comparison

Input: the genre data set. Output, in outputs/step05_lstm/: a checkpoint and a history
per run, learning curves, test scores (summary.md, metrics.json), each test clip's true
and predicted class (predictions.csv).

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: best on validation mel, test accuracy .637, macro-F1 .599 (157 clips); six LSTMs
in about 12 minutes.
"""

import matplotlib.pyplot as plt
import pandas as pd

from common import (
    COLORS,
    GENRE_RUNS,
    TRAINING_DEFAULTS,
    Step,
    genre_predictions,
    make_parser,
    parse_args,
    plot_history,
    plot_scores,
    run_main,
    score_genre,
    seconds_left,
    train_genre,
    write_text,
)

RUNS = [name for name, run in GENRE_RUNS.items() if run.network == "lstm" and not run.plain]
PLAIN_RUNS = [name for name, run in GENRE_RUNS.items() if run.plain]


def main(argv=None):
    parser = make_parser(__doc__, training=True, **TRAINING_DEFAULTS)
    parser.add_argument("--features", nargs="+", choices=RUNS, default=RUNS, help="which LSTMs to train (default: all six)")
    parser.add_argument("--plain", action="store_true", help="train the textbook LSTM instead: every frame, one direction, last step")
    args = parse_args(parser, argv)
    step = Step("step05_lstm", args)
    names = PLAIN_RUNS if args.plain else args.features
    flags = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "subset": args.subset}

    # b) Before any long training: can this network learn four batches by heart? If not,
    # something is broken, and train() says so with exit code 1.
    if args.overfit_batch:
        return overfit_check(step, names, flags)

    # c) to f) One LSTM per kind of input, same recipe; of the last fifth of the epochs
    # the best by validation macro-F1 is kept.
    # a) is LSTMBackbone in common.py: it reads the Dataset's (B, T, F) batches and lengths.
    trained = {}
    for position, name in enumerate(names):
        trained[name] = train_genre(step, name, **flags, resume=args.resume,
                                    max_seconds=seconds_left(args, len(names) - position))  # fmt: skip

    # The test split is opened only now, when no choice is left to make.
    runs, predictions = {}, []
    for name, (model, settings, result) in trained.items():
        test, targets, logits, ids = score_genre(step, model, settings)
        predictions.append(genre_predictions(name, settings["beat"], settings["classes"], ids, targets, logits.argmax(1)))
        runs[name] = {key: value for key, value in result.items() if key != "history"} | {"val": {"macro_f1": result["val_score"]}, "test": test}

    write_text(step.folder / "predictions.csv", pd.concat(predictions).to_csv(index=False))
    report_overfit(step, names)
    report_curves(step, trained)
    report_scores(step, runs)
    return step.finish(runs)


def overfit_check(step, names, flags):
    """b) Learn four fixed batches by heart; StepFailed (exit code 1) where it does not work."""
    checks = {}
    for name in names:
        _, _, result = train_genre(step, name, **flags, overfit_batch=True)
        checks[name] = {key: value for key, value in result.items() if key != "history"}
    report_overfit(step, names)
    return step.finish(overfit=checks)


def report_overfit(step, names):
    """b) The curves that --overfit-batch has left for these runs, if it was run."""
    curves = {name: pd.read_csv(path) for name in names if (path := step.folder / name / "overfit.csv").exists()}
    if not curves:
        return
    fig, ax = plt.subplots(figsize=(7, 4))
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        ax.semilogy(curve["epoch"], curve["train_loss"], color=color, label=name)
    ax.axhline(0.01, color="grey", linestyle=":", label="goal")
    ax.set(xlabel="Pass over the four batches", ylabel="Cross-entropy (log scale)", title="Four batches learned by heart")
    ax.legend(fontsize="small")
    step.heading("5b. Overfitting four batches")
    step.text(
        "With regularisation off, each network brings the loss on four fixed batches of training clips close to 0 "
        "with every clip right. Gradients, loss and labels are therefore wired correctly; what limits the models "
        "is generalisation, not a defect."
    )
    last = {name: {"passes": len(curve), "loss": curve["train_loss"].iloc[-1], "accuracy": curve["accuracy"].iloc[-1]} for name, curve in curves.items()}
    step.table(pd.DataFrame(last).T.astype({"passes": int}).rename_axis("LSTM"))
    step.figure(fig, "overfit_batch", "Training loss on four fixed batches, regularisation off")


def report_curves(step, trained):
    """Learning curves of all runs in one figure."""
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for ax, (name, (_, _, result)) in zip(axes.flat, trained.items(), strict=False):
        plot_history(ax, result["history"], name, "macro-F1")
    for ax in axes.flat[len(trained) :]:
        ax.remove()
    step.heading("5c-f. Training")
    step.text(
        "Train loss is measured on crops of masked clips and with dropout, validation loss on whole clips without, so the first may stay above "
        "the validation loss. The dot marks the epoch whose weights were kept: the best macro-F1 on the validation set "
        "among the last fifth of the epochs, when the learning rate has come down. An earlier peak on so few clips is mostly luck."
    )
    step.figure(fig, "learning_curves", "Loss and validation macro-F1 against the epoch, per input")


def report_scores(step, runs):
    """Test scores as a table and a figure, and which input did best."""
    columns = ("accuracy", "macro_f1")
    step.heading("Scores on the test set")
    table = pd.DataFrame(
        {
            name: {
                "network hears": f"{'beats' if GENRE_RUNS[name].beat else 'frames'}, {GENRE_RUNS[name].features}",
                "weights": run["weights"],
                "epochs (best)": f"{run['epochs']} ({run['best_epoch']})",
                "seconds": round(run["train_seconds"]),
                "val macro-F1": run["val"]["macro_f1"],
            }
            | {f"test {c}": "{:.3f} [{:.3f}, {:.3f}]".format(run["test"][c], *run["test"][f"{c}_ci95"]) for c in columns}
            for name, run in runs.items()
        }
    ).T.rename_axis("run")
    step.table(table, f"{len(runs)} LSTMs, {next(iter(runs.values()))['test']['n_clips']} test clips, 95% bootstrap intervals")
    fig, ax = plt.subplots(figsize=(7, 0.6 * len(runs) + 1.2))
    plot_scores(ax, list(runs), [run["test"]["macro_f1"] for run in runs.values()],
                [run["test"]["macro_f1_ci95"] for run in runs.values()], "Test macro-F1 (bar: 95% interval)")  # fmt: skip
    step.figure(fig, "test_scores", "Macro-F1 on the test set")
    best = max(runs, key=lambda name: runs[name]["val"]["macro_f1"])
    step.text(
        f"Best on validation: **{best}**, with test accuracy {runs[best]['test']['accuracy']:.3f} and macro-F1 "
        f"{runs[best]['test']['macro_f1']:.3f}. Intervals that overlap widely are no proof of a difference."
    )


if __name__ == "__main__":
    metrics = run_main(main)
