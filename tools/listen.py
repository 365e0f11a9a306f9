"""Your own song: its genre and its emotions over time, as a table and as a page.

    python -m tools.listen song.mp3 another.wav   # a table, outputs/listen/listen.json, pages

Input: sound files of any length and format; the checkpoints of steps 5, 7 and 10. A song is cut
into blocks of 30 s, and each block becomes a spectrogram in the same way as the lab's clips. The
input of the CNN is a window of 6 s, every 3 s. Output, in outputs/listen/: listen.json and, per
song, one HTML page that needs no internet: player, tables, and over one time axis the mel
spectrogram, what decides, and the curves of genre and emotion. A click or the arrow keys move
the cursor.
"""

import base64
import html
import io
import json
import re
import string
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import common
from patrec import features
from patrec.audio import CLIP_S, Sound, require_decoder
from patrec.batches import cut_windows
from patrec.errors import InputError, end_in_one_line
from patrec.explain import clip_attributions, patches
from patrec.features import BANDS, DB_FLOOR, HOP, N_MELS, SR
from patrec.files import find_data, make_folder, output_folder, write_text
from patrec.flags import Parser, Source
from patrec.labels import EMOTIONS, fingerprint
from patrec.machine import keep_freed_memory, pick_device, show_bars
from patrec.plots import COLORS, mel_ticks

SHORTEST_S, EVERY_S = 1.0, 3.0  # shortest song; from window to window
# The networks in use: the step that trains each, and the name of its run.
NETWORKS = {
    "cnn": ("step07_cnn", "cnn_mel"),
    "lstm": ("step05_lstm", "mel"),
    "emotion": ("step10_multitask", "multitask_from_genre"),
    "emotion_lstm": ("step10_multitask", "multitask_lstm"),
}


def find_checkpoint(folder, run) -> Path | None:
    """The finished checkpoint of a run (of its first fold); no data set is needed here."""
    runs = [folder / run, *sorted(folder.glob(f"{run}_fold1of*"))]
    done = [r for r in runs if (r / "best.pt").exists() and not (r / common.UNFINISHED).exists()]
    return done[0] / "best.pt" if done else None


def find_networks(out, device) -> dict[str, common.TrainedModel]:
    """Load the networks of NETWORKS; InputError names the steps whose networks are missing."""
    paths = {role: find_checkpoint(out / step, run) for role, (step, run) in NETWORKS.items()}
    missing = sorted({NETWORKS[role][0] for role, path in paths.items() if path is None})
    if missing:
        commands = " and ".join(f"python {step}.py" for step in missing)
        raise InputError(f"{out}: no checkpoints of {', '.join(missing)}; run {commands}")
    return {role: common.load_trained(path, pick_device(device)) for role, path in paths.items()}


def temperature_of(out) -> float:
    """The temperature that tools.explain has fitted for the CNN; 1 if it was not run."""
    try:
        facts = json.loads((out / "explain" / "metrics.json").read_text())
        return float(facts["calibration"]["temperature"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


def training_vectors(cnn, data_dir) -> tuple[np.ndarray, pd.Series] | None:
    """Latent vectors of the genre training clips, and their classes by id; None without them.

    The data set must be the one that the network was trained on.
    """
    settings = cnn.settings
    try:
        root = find_data(data_dir, ("genre",), demo=False)
    except InputError:
        if data_dir:
            raise
        return None
    if fingerprint(root, "genre") != settings["fingerprint"]:
        return None
    source = Source(root, settings["seed"], merge=settings["merge"], skip_bad=True)
    data = common.load_data(source, stats=settings["stats"])
    loader, backbone = torch.utils.data.DataLoader(data.train, 64), cnn.model.backbone
    vectors, _ = common.predict(backbone, loader, device_of(cnn), settings["window"])
    return vectors.numpy(), common.true_labels(data.train, settings)


def read_blocks(path):
    """Yield a song, mono at SR, in blocks of 30 s; the last one may be longer by up to 3 s."""
    import librosa

    sound, waiting = Sound(path), np.zeros(0, np.float32)
    for block in sound.blocks(CLIP_S):
        waveform = librosa.resample(block, orig_sr=sound.rate, target_sr=SR)
        if len(waiting) and len(waveform) >= 3 * SR:  # else a tail that is no window of its own
            yield waiting
            waiting = waveform
        else:
            waiting = np.concatenate([waiting, waveform])
    if sound.seconds < SHORTEST_S:
        fault = f"{sound.seconds:.2f} s of sound is too short"
        raise InputError(f"{path}: {fault}; at least {SHORTEST_S:g} s are needed")
    if sound.damage:
        print(f"{path}: {sound.damage}", file=sys.stderr)
    yield waiting


def device_of(network):
    return next(network.model.parameters()).device


def windows(network, rows, every=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut (140, T) rows into a network's windows, standardised: x (W, frames, F), lengths (W,).

    every : frames from window to window; else as few windows as cover the rows
    """
    mean, std = network.settings["stats"]
    x = (torch.from_numpy(rows[BANDS[network.settings["features"]]]).float().T - mean) / std
    size = min(network.settings["window"], len(x))
    if every:
        cut = x.unfold(0, size, every).mT
    else:
        cut, *_ = cut_windows(x[None], torch.tensor([len(x)]), size)
    return cut.to(device_of(network)), torch.full((len(cut),), size)


@torch.inference_mode()
def predict_windows(network, rows, every=None) -> torch.Tensor:
    """Outputs (W, K) for the `windows` of (140, T) rows; of genres the logits."""
    return network.model(*windows(network, rows, every)).float().cpu()


@torch.inference_mode()
def predict_block(networks, rows, first_frame) -> dict[str, torch.Tensor]:
    """Predict for the rows (140, T) of a block that begins at a frame of the song.

    Returns logits and emotions of the CNNs' windows (W, K), those of the LSTMs for the whole
    block (1, K), the middles of the windows times_s (W,) and the latent vectors (W', H).
    """
    every, cnn = round(EVERY_S * SR / HOP), networks["cnn"]
    _, lengths = windows(cnn, rows, every)
    middles = first_frame + torch.arange(len(lengths)) * every + lengths // 2
    whole = {role: predict_windows(networks[role], rows) for role in ("lstm", "emotion_lstm")}
    return {
        "logits": predict_windows(cnn, rows, every),
        "emotions": predict_windows(networks["emotion"], rows, every),
        "logits_lstm": whole["lstm"].mean(0, keepdim=True),
        "emotions_lstm": whole["emotion_lstm"].mean(0, keepdim=True),
        "times_s": middles * HOP / SR,
        "latent": cnn.model.backbone(*windows(cnn, rows)).float().cpu(),
    }


def listen(path, networks, temperature, known):
    """Predict for one song: a dict for listen.json, and its picture and sound (PNG, MP3)."""
    import soundfile

    seconds, n_frames, mels, blocks, encoded = 0.0, 0, [], [], io.BytesIO()
    with soundfile.SoundFile(encoded, "w", SR, 1, format="MP3") as song:
        for waveform in tqdm(read_blocks(path), path.name, disable=not show_bars(), leave=False):
            song.write(np.clip(waveform, -1, 1))
            mel = np.full((N_MELS, len(waveform) // HOP + 1), DB_FLOOR)
            if np.ptp(waveform) > 1e-5:  # else silence
                rows = features.stack_rows(*features.mel_and_chroma(waveform))
                blocks.append(predict_block(networks, rows, n_frames))
                mel = rows[:N_MELS]
            mels.append(np.round(mel).astype(np.int8))  # dB fit into a byte: an hour is 20 MB
            n_frames += mel.shape[1]
            seconds += len(waveform) / SR
    if not blocks:
        raise InputError(f"{path}: silence; nothing can be predicted from it")
    found = {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}
    names, logits = networks["cnn"].settings["names"], found["logits"] / temperature
    genre = pd.Series(logits.mean(0).softmax(0), names)
    by_lstm = found["logits_lstm"].mean(0).softmax(0).tolist()
    emotion = (found["emotions"].mean(0) + found["emotions_lstm"].mean(0)) / 2
    times_s = found["times_s"].numpy().round(2)
    genres = pd.DataFrame(logits.softmax(1), times_s, names).round(4)
    emotions = pd.DataFrame(found["emotions"].clamp(0, 1), times_s, EMOTIONS).round(4)
    facts = {
        "file": str(path).encode(errors="replace").decode(),  # a name may be no UTF-8
        "seconds": round(seconds, 2),
        "genre": genre.to_dict(),
        "genre_lstm": dict(zip(networks["lstm"].settings["names"], by_lstm, strict=True)),
        "emotion": dict(zip(EMOTIONS, emotion.clamp(0, 1).tolist(), strict=True)),
        "times_s": times_s.tolist(),
        "genre_over_time": genres.T.to_numpy().tolist(),
        "emotion_over_time": emotions.T.to_numpy().tolist(),
        "classes": names,
        "nearest": nearest(found["latent"].mean(0).numpy(), known),
    }
    predicted = names.index(genre.idxmax())
    parts = [attributions(networks["cnn"], mel, predicted) for mel in mels]
    mel, parts = np.concatenate(mels, axis=1), np.concatenate(parts, axis=1)
    picture = draw(mel, parts, genres, emotions, seconds, genre.idxmax())
    return facts, picture, encoded.getvalue()


def attributions(cnn, mel, predicted) -> np.ndarray:
    """What every patch of a mel spectrogram (128, T) adds to the predicted class's logit."""
    mean, std = cnn.settings["stats"]
    x = (torch.from_numpy(mel.astype(np.float32)).T - mean) / std
    return patches(clip_attributions(cnn.model, x, cnn.settings["window"], predicted)).T.numpy()


def nearest(vector, known, n=5) -> list[dict]:
    """The training clips whose latent vectors are nearest, dimensions standardised."""
    if known is None:
        return []
    vectors, classes = known
    mean, std = vectors.mean(0), vectors.std(0) + 1e-6
    distances = np.linalg.norm((vectors - vector) / std, axis=1)
    spread = np.median(np.linalg.norm((vectors - mean) / std, axis=1))
    found = {"clip": classes.index, "genre": classes, "distance": distances.astype(float) / spread}
    return pd.DataFrame(found).nsmallest(n, "distance").round(3).to_dict("records")


LEFT, RIGHT = 0.07, 0.99  # the time axis in the picture, as shares of its width
LINES = ["-", "--", ":", "-.", (0, (8, 2)), (0, (6, 2, 1, 2, 1, 2))]  # to tell curves apart
WIDTH = 1400  # columns of the spectrogram at most; the time axis has as many pixels


def draw(mel, parts, genres, emotions, seconds, predicted) -> bytes:
    """Draw a song over time as PNG: mel (128, T) in dB, what its patches add, the two curves."""
    fig, axes = plt.subplots(4, 1, figsize=(13, 10), sharex=True)
    fig.subplots_adjust(LEFT, 0.05, RIGHT, 0.97, hspace=0.3)
    # A column shows the loudest of its frames: else nobody would see a click in a long song.
    starts = np.linspace(0, mel.shape[1], min(mel.shape[1], WIDTH), endpoint=False).astype(int)
    loudest = np.maximum.reduceat(mel, starts, axis=1)
    limit = float(np.quantile(np.abs(parts), 0.995)) or 1.0
    place = {"origin": "lower", "aspect": "auto", "extent": (0, seconds, 0, N_MELS)}
    axes[0].imshow(loudest, cmap="magma", vmin=DB_FLOOR, vmax=0, interpolation="nearest", **place)
    axes[1].imshow(parts, cmap="RdBu_r", vmin=-limit, vmax=limit, **place)
    axes[0].set_title("Mel spectrogram")
    axes[1].set_title(f"What speaks for {predicted} (red) and against it (blue)")
    for ax in axes[:2]:
        ax.set_ylabel("Frequency (Hz)")
        mel_ticks(ax.yaxis)
    # By the curves and not by the prediction for the song: a medley has several genres.
    genres = genres[genres.mean().nlargest(len(LINES)).index]
    for ax, curves, label in ((axes[2], genres, "Probability"), (axes[3], emotions, "Emotion")):
        ax.set_prop_cycle(color=COLORS[: len(LINES)], linestyle=LINES)
        mark = "." if len(curves) == 1 else ""  # of one window there is no line
        ax.plot(curves.index, curves, marker=mark, label=list(curves))
        ax.set(ylim=(0, 1), ylabel=label)
        ax.grid(axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(LINES), frameon=False)
    axes[3].set(xlabel="Time (min:s)", xlim=(0, seconds))
    axes[3].xaxis.get_major_locator().set_params(integer=True)
    axes[3].xaxis.set_major_formatter(lambda t, _: f"{t // 60:.0f}:{t % 60:02.0f}")
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=120)
    plt.close(fig)
    return file.getvalue()


PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1300px }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem } h1, td { overflow-wrap: anywhere }
th, td { padding: .1rem .8rem .1rem 0; text-align: left }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start }
audio { width: 100% } .note { background: #fff3cd; padding: .5rem .8rem }
.scroll { overflow-x: auto } #picture { position: relative; min-width: 800px; cursor: crosshair }
#picture:focus-visible { outline: 3px solid #0072B2 } img { display: block; width: 100% }
#cursor { position: absolute; top: 0; bottom: 0; border-left: 2px solid #d00 }
</style>
<h1>$title</h1>
<div class="columns">$tables</div>
<p><audio id="audio" controls preload="auto" src="data:audio/mpeg;base64,$audio"></audio></p>
<p>Click the picture, or focus it and use the arrow keys (5 s).</p>
<div class="scroll"><div id="picture" tabindex="0" role="slider"
  aria-label="Position in the song, in seconds"
  aria-valuemin="0" aria-valuemax="$seconds" aria-valuenow="0"><img
  alt="Over time: mel spectrogram, what decides, probabilities of the genres, emotions"
  src="data:image/png;base64,$picture"><div id="cursor"></div></div></div>
<h2>Limits of these predictions</h2>
$limits
<script>
"use strict";
const [audio, picture, cursor] = ["audio", "picture", "cursor"].map(
  id => document.getElementById(id));
const seconds = $seconds, left = $left, width = $right - $left;
function place() {
  cursor.style.left = 100 * (left + width * audio.currentTime / seconds) + "%";
  picture.setAttribute("aria-valuenow", audio.currentTime.toFixed(1));
  if (!audio.paused) requestAnimationFrame(place);
}
audio.onplay = audio.onseeked = place;
picture.onclick = event => {
  const box = picture.getBoundingClientRect();
  audio.currentTime = seconds * ((event.clientX - box.left) / box.width - left) / width;
};
picture.onkeydown = event => {
  const now = audio.currentTime;
  const to = {ArrowLeft: now - 5, ArrowRight: now + 5, Home: 0, End: seconds}[event.key];
  if (to === undefined) return;
  audio.currentTime = to;
  event.preventDefault();
};
place();
</script></html>
""")


def make_page(facts, picture, audio, limits) -> str:
    """One song as a page that loads nothing from outside; names from outside are escaped."""
    genre = pd.Series(facts["genre"]).sort_values(ascending=False).map("{:.0%}".format)
    emotion = pd.Series(facts["emotion"]).map("{:.2f}".format)
    tables = [genre.to_frame("Genre"), emotion.to_frame("Emotion (0 to 1)")]
    if facts["nearest"]:
        clips = pd.DataFrame(facts["nearest"]).set_index("clip")
        tables.append(
            clips[["genre"]].rename_axis(None).set_axis(["Nearest training clips"], axis=1)
        )
    return PAGE.substitute(
        title=html.escape(Path(facts["file"]).name),
        tables="\n".join(table.to_html(border=0) for table in tables),
        seconds=facts["seconds"],
        limits=limits,
        left=LEFT,
        right=RIGHT,
        picture=base64.b64encode(picture).decode(),
        audio=base64.b64encode(audio).decode(),
    )


def limits_of(out, networks, temperature) -> str:
    """The limits of the predictions, as HTML."""
    names = html.escape(", ".join(networks["cnn"].settings["names"]))
    scaled = "are not calibrated (run python -m tools.explain)"
    if temperature != 1.0:
        scaled = f"are calibrated on validation clips (temperature {temperature:.2f})"
    files = [out / step / "metrics.json" for step, _ in NETWORKS.values()]
    demo = ""
    if any(json.loads(file.read_text())["data"]["demo"] for file in files if file.exists()):
        demo = """<p class="note"><b>Networks trained on made-up demo music:</b> these
        predictions show that the program runs. They say nothing about the song.</p>"""
    return f"""{demo}<p>The networks predict one of {names} for every input, for speech and noise
    as well. The percentages {scaled}; this holds for clips of 30 s that resemble the training
    clips, not for the 6 s behind each point of a curve. The genre table and all curves are
    predictions of CNNs, the emotion table is the mean of a CNN and an LSTM. The second picture
    shows integrated gradients: red patches raise the score of the predicted genre above its score
    for the mean training clip, blue ones lower it; the ends of every 30 s lie in fewer windows and
    look paler.</p>"""


def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.flag
    parser.add_argument("songs", nargs="+", type=Path, help="sound files")
    add("--data-dir", type=Path, help="the training data, for the nearest clips")
    add("--out-dir", type=Path, help="folder of the steps' outputs; pages go there too")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    args = parser.parse_args(argv)
    require_decoder(args.songs)
    keep_freed_memory()
    features.compile_librosa()
    out = output_folder(args.out_dir)
    networks = find_networks(out, args.device)
    temperature, known = temperature_of(out), training_vectors(networks["cnn"], args.data_dir)
    folder = out / "listen"
    make_folder(folder)
    limits = limits_of(out, networks, temperature)
    found, table = [], []
    for place, path in enumerate(args.songs, start=1):
        try:
            facts, picture, audio = listen(path, networks, temperature, known)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        name = Path(facts["file"])
        safe = re.sub(r"[^\w.-]+", "_", name.stem)[:60].strip("._") or "song"
        page = folder / f"{place:02d}_{safe}.html"
        write_text(page, make_page(facts, picture, audio, limits))
        found.append(facts | {"page": str(page)})
        best = pd.Series(facts["genre"]).nlargest(3)
        row = {
            "song": name.name,
            "length": "{}:{:02d}".format(*divmod(round(facts["seconds"]), 60)),
            "genre": ", ".join(f"{genre} {value:.0%}" for genre, value in best.items()),
            **{emotion: f"{value:.2f}" for emotion, value in facts["emotion"].items()},
            "nearest training clips": ", ".join(c["genre"] for c in facts["nearest"][:3]) or "-",
            "page": str(page),
        }
        table.append(row)
    if table:
        facts = {"songs": found, "temperature": temperature, "classes": found[0]["classes"]}
        write_text(folder / "listen.json", json.dumps(facts, indent=1))
        print(pd.DataFrame(table).to_string(index=False))
    if len(found) < len(args.songs):
        sys.exit(2)


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
