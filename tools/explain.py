"""What the CNN of step 7 looks at, and how far its probabilities can be trusted.

    python step07_cnn.py
    python -m tools.explain

Input: the checkpoint of step 7, the genre data set. Output, in outputs/explain/: how well its
probabilities are calibrated (tools.listen scales its own with the temperature found here);
which patches of a spectrogram decide, whether they really do, and how they sound (summary.md,
metrics.json, a figure, mp3 files).
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import common
from patrec import explain
from patrec.batches import cut_windows
from patrec.clips import sample_clips
from patrec.errors import InputError
from patrec.features import BANDS, DB_FLOOR, HOP, N_MELS, SR, mel_to_waveform
from patrec.machine import seed_everything
from patrec.plots import mel_ticks, plot_spectrogram
from patrec.scores import bootstrap, class_numbers, spearman
from patrec.step import Step
from patrec.tables import with_interval


def calibrate(step, cnn, data, test):
    """Fit the temperature on the validation clips and judge it on the test clips.

    Returns it, the adjusted log-probabilities of the test clips (clip x class), and the table.
    """
    step.heading("How sure the network is")
    temperature, sureness = None, {}
    for split, clips in (("validation", data.val), ("test", test)):
        predictions = common.predict_clips(cnn.model, clips, cnn.settings, step.device)
        z = torch.tensor(predictions.to_numpy())
        targets = torch.tensor(class_numbers(common.true_labels(clips, cnn.settings), data.names))
        temperature = temperature or explain.fit_temperature(z, targets)  # on the first: validation
        sureness[f"{split} ({len(targets)} clips)"] = {
            "accuracy": float((z.argmax(1) == targets).float().mean()),
            "mean confidence": float(z.softmax(1).amax(1).mean()),
            "confidence, scaled": float((z / temperature).softmax(1).amax(1).mean()),
            "calibration error": explain.calibration_error(z, targets),
            "calibration error, scaled": explain.calibration_error(z / temperature, targets),
        }
    caption = f"Confidence (probability of the predicted class); temperature {temperature:.2f}"
    step.table(pd.DataFrame(sureness).T.rename_axis("clips"), caption)
    step.text("""
    A probability of .9 should be right nine times out of ten. The *calibration error* (expected
    calibration error, 10 bins; Guo et al., 2017) is the distance between confidence and accuracy,
    averaged over bins, each weighted by its clips; on few clips it is above 0 by chance alone. The
    *temperature* divides the adjusted logits, so the predicted class stays the same. It is fitted
    on the validation clips, which also chose the epoch: only the test row tells whether it helps.
    """)
    return temperature, predictions, sureness


def judge_patches(step, cnn, test) -> dict:
    """Test attributions before they are shown: insertion, deletion, and random weights."""
    step.heading("Do the patches that attributions name really decide?")
    n_judged, n_steps = (4, 4) if step.args.smoke else (min(60, len(test)), 16)
    model = copy.deepcopy(cnn.model).cpu().eval()
    seed_everything(step.args.seed + 1000)  # not the weights that the training began with
    untrained = common.build_model(common.model_spec(cnn.model)).eval()
    areas, agreement = {"insertion": [], "deletion": []}, []
    for index in np.random.default_rng(step.args.seed).permutation(len(test))[:n_judged]:
        clip, _, length = test[int(index)]
        size = min(int(length), cnn.settings["window"])
        x = clip[(int(length) - size) // 2 :][:size].cpu()  # the middle of the clip, (T, F)
        lengths = torch.tensor([size])
        with torch.no_grad():
            label = model(x[None], lengths).argmax(1)
        named, other = (
            explain.integrated_gradients(network, x[None], lengths, label, n_steps)[0]
            for network in (model, untrained)
        )
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(index)))
        named, other, noise = map(explain.patches, (named, other, noise))
        for way, rows in areas.items():
            case = int(label), way == "insertion"
            orders = explain.cell_ranks(named), explain.cell_ranks(noise)
            curves = [explain.probability_curve(model, x, order, *case) for order in orders]
            rows.append([float(curve.mean()) for curve in curves])
        one_each = slice(None, None, 8), slice(None, None, 4)  # one cell of each patch
        agreement.append(spearman(*(a.abs()[one_each].flatten() for a in (named, other))))
    agreement, faithful = np.array(agreement), {}
    for way, rows in areas.items():
        named, random = np.array(rows).T
        gain = named - random if way == "insertion" else random - named
        interval = bootstrap(lambda i, gain=gain: gain[i].mean(), len(gain))
        faithful[way] = {
            "by attribution": named.mean(),
            "in random order": random.mean(),
            "better by": with_interval({"gain": gain.mean(), "gain_ci95": interval}, "gain"),
        }
    caption = (
        "Area under the probability of the predicted class while patches of 8 frames and 4 bands "
        "are put back (insertion: higher is better) or taken away (deletion: lower is better); "
        f"{n_judged} test clips, at most 6 s from their middle"
    )
    step.table(pd.DataFrame(faithful).T.rename_axis("test"), caption)
    low, high = bootstrap(lambda i: agreement[i].mean(), len(agreement))
    step.text(f"""
    Attributions are integrated gradients (Sundararajan et al., 2017): they distribute the logit of
    the predicted class over the cells of the input, compared with a clip that is the mean in every
    band. If the patches they name decide, putting them back first raises the probability faster
    than a random order does, and taking them away first lowers it faster (Petsiuk et al., 2018).
    The 95% intervals are over clips, for one random order each. A patch is taken away by setting it
    to the mean of its bands, which is unusual in music, so part of a fall may come from that.

    As a check, a network with random weights should not name the same patches (Adebayo et al.,
    2018). The rank correlation of the two networks' attributions, without sign, is
    {agreement.mean():.2f} [{low:.2f}, {high:.2f}], averaged over the clips. It would be 1 if the
    weights did not matter; it need not be 0, since both attributions are multiplied by the clip.
    """)
    return faithful | {"randomised_weights": {"mean": agreement.mean(), "ci95": [low, high]}}


def clips_to_show(step, cnn, test, predictions) -> list[tuple]:
    """The two clips of step 1 and the two surest mistakes: (title, mel in dB (T, 128))."""
    found = []
    clips = sample_clips(step.source.root, 1, step.args.seed, step.args.skip_bad, beat=False)
    for clip in clips[:2]:
        mel = torch.from_numpy(clip.full[BANDS["mel"]]).float().T
        found.append((f"{clip.clip_id}, {clip.genre}, training split", mel))
    mean, std = (value.cpu() for value in cnn.settings["stats"])
    true = common.true_labels(test, cnn.settings)
    mistakes = predictions[predictions.idxmax(axis=1) != true].max(axis=1).nlargest(2)
    for clip_id in mistakes.index:
        clip, _, length = test[predictions.index.get_loc(clip_id)]
        title = f"{clip_id}, {true[clip_id]}, test set"
        found.append((title, clip[:length].cpu() * std + mean))
    return [(title, mel[:300]) for title, mel in found] if step.args.smoke else found


def show_decisions(step, cnn, shown, temperature):
    """Draw each clip beside its attributions, and make the sound of the patches that decide."""
    step.heading("What decides, to look at and to hear")
    model = copy.deepcopy(cnn.model).cpu().eval()
    mean, std = (value.cpu() for value in cnn.settings["stats"])
    window, names = cnn.settings["window"], cnn.settings["names"]
    size = (13, 2.6 * len(shown))
    fig, axes = plt.subplots(len(shown), 2, figsize=size, squeeze=False, layout="constrained")
    for place, ((title, mel), (left, right)) in enumerate(zip(shown, axes, strict=True), start=1):
        x = (mel - mean) / std
        windows, lengths, _ = cut_windows(x[None], torch.tensor([len(x)]), min(window, len(x)))
        with torch.no_grad():
            logits = model(windows, lengths).mean(0)
        probability, label = (logits / temperature).softmax(0).max(0)
        named = explain.patches(explain.clip_attributions(model, x, window, int(label)))
        predicted = f"predicted: {names[int(label)]} ({probability:.2f})"
        fig.colorbar(plot_spectrogram(left, mel.T), ax=left, format="%+.0f dB")
        left.set_title(title, fontsize="medium")
        limit = float(named.abs().quantile(0.995)) or 1.0
        look = {"origin": "lower", "aspect": "auto", "cmap": "RdBu_r", "interpolation": "nearest"}
        extent = (0, len(x) * HOP / SR, 0, N_MELS)
        image = right.imshow(named.T, extent=extent, vmin=-limit, vmax=limit, **look)
        fig.colorbar(image, ax=right, label="part of the logit")
        right.set(xlabel="Time (s)", ylabel="Frequency (Hz)")
        right.set_title(predicted, fontsize="medium")
        mel_ticks(right.yaxis)
        quieter = (mel - 30.0 * (explain.cell_ranks(named) >= 0.2)).clamp(min=DB_FLOOR)
        for name, sound, what in (
            ("all", mel, "the whole spectrogram"),
            ("deciding", quieter, "all but the fifth that supports it most is up to 30 dB lower"),
        ):
            caption = f"{title}, {predicted}: {what}"
            step.sound(mel_to_waveform(sound.T.numpy()), f"clip_{place}_{name}", caption)
    caption = (
        "Left: the two clips of step 1 and the two most confident mistakes on the test set. Right: "
        "how much each patch adds to the logit of the predicted class, summed over the windows "
        "that contain it. Red supports the predicted class, blue opposes it. Each panel has its "
        f"own colour scale. Probabilities are at temperature {temperature:.2f}"
    )
    step.figure(fig, "what_decides", caption)


def main():
    step = Step("explain", __doc__, parts=("genre",))
    path = common.find_genre_checkpoint(step.training, "cnn_mel")
    if path is None:
        fault = f"{step.out}: no CNN of step 7 for these clips, labels and seed"
        raise InputError(f"{fault}; run python step07_cnn.py first")
    cnn = common.load_trained(path, step.device)
    data, test = common.load_data(step.source), common.load_test(step.source, cnn.settings)
    temperature, predictions, sureness = calibrate(step, cnn, data, test)
    faithful = judge_patches(step, cnn, test)
    show_decisions(step, cnn, clips_to_show(step, cnn, test, predictions), temperature)
    step.finish(calibration=sureness | {"temperature": temperature}, faithfulness=faithful)


if __name__ == "__main__":
    main()
