"""Your own song: its genre and its emotions over time, as a table and as a page.

    python -m tools.listen song.mp3 another.wav   # a table, outputs/listen/listen.json, pages
    python -m tools.listen song.mp3 --train       # first trains what steps 5, 7 and 10 have not

Input: sound files of any length and format; the checkpoints of steps 5, 7 and 10. A song is cut
into blocks of 30 s, and each block becomes a spectrogram in the same way as the lab's clips. The
input of the CNN is a window of 6 s, every 3 s. Output, in outputs/listen/: listen.json and, per
song, one HTML page that needs no internet: player, mel spectrogram with a cursor, genre and
emotion curves on the same time axis. A click or the arrow keys move the cursor.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from common import UNFINISHED, adjust_logits, clip_ids, load_data, load_model, predict, true_labels
from patrec.audio import CLIP_S, Sound, require_decoder
from patrec.batches import cut_windows
from patrec.errors import InputError, end_in_one_line
from patrec.explain import clip_attributions, patches
from patrec.features import (
    BANDS,
    DB_FLOOR,
    HOP,
    N_MELS,
    SR,
    compile_librosa,
    mel_and_chroma,
    stack_rows,
)
from patrec.files import PROJECT, find_data, make_folder, output_folder, write_text
from patrec.flags import Parser, Source, bounded
from patrec.labels import EMOTIONS, fingerprint
from patrec.machine import keep_freed_memory, pick_device, show_bars
from patrec.plots import COLORS

SHORTEST_S, EVERY_S = 1.0, 3.0  # shortest song; from window to window
# The networks in use: the step that trains each, and the name of its run.
NETWORKS = {
    "cnn": ("step07_cnn", "cnn_mel"),
    "lstm": ("step05_lstm", "mel"),
    "emotion": ("step10_multitask", "multitask_from_genre"),
    "emotion_lstm": ("step10_multitask", "multitask_lstm"),
}


@dataclasses.dataclass
class LoadedModel:
    """One trained network, and the settings that it was trained with."""

    model: torch.nn.Module
    settings: dict

    def windows(self, rows, every=None):
        """Cut (140, T) rows into its windows, standardised.

        every : frames from window to window; else as few as cover the rows

        Returns
        -------
        x : (W, frames, F); lengths : (W,); middles : (W,), in frames
        """
        mean, std = self.settings["stats"]
        x = (torch.from_numpy(rows[BANDS[self.settings["features"]]]).float().T - mean) / std
        size = min(self.settings["window"], len(x))
        if every is None:
            cut, lengths = cut_windows(x[None], torch.tensor([len(x)]), size, overlap=False)
            starts = torch.linspace(0, len(x) - size, len(cut)).long()
        else:
            starts = torch.arange(0, max(len(x) - size, 0) + 1, every)
            cut, lengths = torch.stack([x[s : s + size] for s in starts]), None
        lengths = torch.full((len(cut),), size)
        return cut, lengths, starts + size // 2

    @torch.inference_mode()
    def predict_clips(self, rows, every=None):
        """Outputs (W, K) for the windows of (140, T) rows, and the windows' middles."""
        x, lengths, middles = self.windows(rows, every)
        device = next(self.model.parameters()).device
        return self.model(x.to(device), lengths).float().cpu(), middles


def find_checkpoint(folder, run) -> Path | None:
    """The finished checkpoint of a run (of its first fold); no data set is needed here."""
    runs = [folder / run, *sorted(folder.glob(f"{run}_fold1of*"))]
    done = [r for r in runs if (r / "best.pt").exists() and not (r / UNFINISHED).exists()]
    return done[0] / "best.pt" if done else None


def find_networks(out, args) -> dict[str, LoadedModel]:
    """Load the networks of NETWORKS; with --train, train those that are missing."""
    missing = [step for step, run in NETWORKS.values() if not find_checkpoint(out / step, run)]
    if missing and not args.train:
        commands = " and ".join(f"python {step}.py" for step in dict.fromkeys(missing))
        fault = f"{out}: no checkpoints of {', '.join(dict.fromkeys(missing))}"
        raise InputError(f"{fault}; run {commands}, or pass --train")
    for step in sorted(set(missing)):
        command = [sys.executable, str(PROJECT / f"{step}.py"), "--out-dir", str(out)]
        command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        print(f"--train: {step}", flush=True)
        if subprocess.run(command).returncode:
            raise InputError(f"{step} could not be trained; see above")
    device, networks = pick_device(args.device), {}
    for role, (step, run) in NETWORKS.items():
        path = find_checkpoint(out / step, run)
        model, checkpoint = load_model(path, device)
        settings, part = checkpoint["settings"], "emotion" if "emotion" in role else "genre"
        features = "fused" if role == "emotion_lstm" else "mel"
        kept = {"part": part, "features": features, "beat": False}
        odd = [key for key, value in kept.items() if settings.get(key) != value]
        if odd or not settings.get("window"):
            fault = f"a network for other input ({', '.join(odd) or 'window'} differ)"
            raise InputError(f"{path}: {fault}; train {step} again")
        networks[role] = LoadedModel(model, settings)
    return networks


def temperature_of(out) -> float:
    """The temperature that tools.explain has fitted for the CNN; 1 if it was not run."""
    try:
        facts = json.loads((out / "explain" / "metrics.json").read_text())
        return float(facts["calibration"]["temperature"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


def training_vectors(cnn, args) -> tuple[np.ndarray, pd.Series] | None:
    """Latent vectors of the genre training clips, and their classes by id; None without them.

    The data set must be the one that the network was trained on.
    """
    settings = cnn.settings
    try:
        root = find_data(args.data_dir, ("genre",), demo=False)
    except InputError:
        if args.data_dir:
            raise
        return None
    if fingerprint(root, "genre") != settings["fingerprint"]:
        return None
    source = Source(root, settings["seed"], merge=settings["merge"], skip_bad=True)
    data = load_data(source, stats=settings["stats"])
    device = next(cnn.model.parameters()).device
    loader = torch.utils.data.DataLoader(data.train, 64)
    vectors, _ = predict(cnn.model.backbone, loader, device, settings["window"], overlap=False)
    return vectors.numpy(), true_labels(data.train, settings).loc[clip_ids(data.train)]


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


@torch.inference_mode()
def predict_block(networks, rows, first_frame) -> dict[str, torch.Tensor]:
    """Predict for the rows (140, T) of a block that begins at a frame of the song.

    Returns logits and emotions of the windows (W, K), of the LSTMs' whole block (1, K), the
    windows' middles times_s (W,) and the latent vectors (W, H).
    """
    every, cnn, lstm = round(EVERY_S * SR / HOP), networks["cnn"], networks["lstm"]
    logits, middles = cnn.predict_clips(rows, every)
    emotions, _ = networks["emotion"].predict_clips(rows, every)
    logits_lstm = adjust_logits(lstm.predict_clips(rows)[0], lstm.settings["priors"])
    emotions_lstm, _ = networks["emotion_lstm"].predict_clips(rows)
    x, lengths, _ = cnn.windows(rows)
    device = next(cnn.model.parameters()).device
    return {
        "logits": adjust_logits(logits, cnn.settings["priors"]),
        "emotions": emotions,
        "logits_lstm": logits_lstm.mean(0, keepdim=True),
        "emotions_lstm": emotions_lstm.mean(0, keepdim=True),
        "times_s": (first_frame + middles) * HOP / SR,
        "latent": cnn.model.backbone(x.to(device), lengths).float().cpu(),
    }


def listen(path, networks, temperature, known):
    """Everything about one song: a dict for listen.json, and pictures and sound for its page."""
    import soundfile

    total, n_frames, mels, encoded = 0, 0, [], io.BytesIO()
    blocks, names = [], networks["cnn"].settings["names"]
    with soundfile.SoundFile(encoded, "w", SR, 1, format="MP3") as song:
        bar = tqdm(read_blocks(path), desc=path.name, disable=not show_bars(), leave=False)
        for waveform in bar:
            song.write(np.clip(waveform, -1, 1))
            mel = np.full((N_MELS, len(waveform) // HOP + 1), DB_FLOOR)
            if np.ptp(waveform) > 1e-5:  # else silence
                rows = stack_rows(*mel_and_chroma(waveform))
                blocks.append(predict_block(networks, rows, n_frames))
                mel = rows[:N_MELS]
            mels.append(np.round(mel).astype(np.int8))  # dB fit into a byte: an hour is 20 MB
            n_frames += mel.shape[1]
            total += len(waveform)
    if not blocks:
        raise InputError(f"{path}: silence; nothing can be predicted from it")
    found = {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}
    overall = (found["logits"].mean(0) / temperature).softmax(0)
    by_lstm = found["logits_lstm"].mean(0).softmax(0)
    emotion = (found["emotions"].mean(0) + found["emotions_lstm"].mean(0)) / 2
    curves = (found["logits"] / temperature).softmax(1), found["emotions"].clamp(0, 1)
    lstm_names = networks["lstm"].settings["names"]
    facts = {
        "file": str(path).encode(errors="replace").decode(),  # a name may be no UTF-8
        "seconds": round(total / SR, 2),
        "genre": dict(zip(names, overall.tolist(), strict=True)),
        "genre_lstm": dict(zip(lstm_names, by_lstm.tolist(), strict=True)),
        "emotion": dict(zip(EMOTIONS, emotion.clamp(0, 1).tolist(), strict=True)),
        "times_s": found["times_s"].round(decimals=2).tolist(),
        "genre_over_time": curves[0].round(decimals=4).T.tolist(),
        "emotion_over_time": curves[1].round(decimals=4).T.tolist(),
        "classes": names,
        "nearest": nearest(found["latent"].mean(0).numpy(), known),
    }
    predicted = int(overall.argmax())
    parts = np.concatenate([attributions(networks["cnn"], mel, predicted) for mel in mels], axis=1)
    limit = float(np.quantile(np.abs(parts), 0.995)) or 1.0
    pictures = {
        "mel": picture(np.concatenate(mels, axis=1), "magma", DB_FLOOR, 0),
        "attributions": picture(parts, "RdBu_r", -limit, limit),
    }
    return facts, pictures, encoded.getvalue()


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
    order = distances.argsort()[:n]
    return [
        {
            "clip": classes.index[i],
            "genre": classes.iloc[i],
            "distance": round(float(distances[i] / spread), 3),
        }
        for i in order
    ]


def picture(values, cmap, low, high, width=1600) -> bytes:
    """(128, T) as a PNG without axes, low bands below; at most `width` columns, by maximum."""
    step = -(-values.shape[1] // width)
    pad = -values.shape[1] % step
    values = np.pad(values.astype(np.float32), ((0, 0), (0, pad)), mode="edge")
    blocks = values.reshape(N_MELS, -1, step)
    loudest = np.abs(blocks - low).argmax(2)[..., None] if cmap == "magma" else None
    shown = blocks.mean(2) if loudest is None else np.take_along_axis(blocks, loudest, 2)[..., 0]
    colors = matplotlib.colormaps[cmap]((shown[::-1] - low) / (high - low))
    file = io.BytesIO()
    plt.imsave(file, colors, format="png")
    return file.getvalue()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1300px;
  color: #111; background: #fff }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 1rem 0 .2rem }
audio { width: 100% } table { border-collapse: collapse } td, th { padding: .1rem .8rem .1rem 0;
  text-align: left; overflow-wrap: anywhere }
.bar { background: #56B4E9; height: .8rem; display: inline-block; vertical-align: middle }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 3rem }
.panel { position: relative; cursor: crosshair; user-select: none; touch-action: manipulation }
.panel img, .panel svg { display: block; width: 100%; height: 160px }
.panel svg { background: #fafafa; border: 1px solid #ccc; box-sizing: border-box }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 2px solid #d00;
  box-shadow: 0 0 0 1px #fff; pointer-events: none }
#panels:focus-visible { outline: 3px solid #0072B2; outline-offset: 4px }
.key { display: inline-block; margin-right: 1.2rem; white-space: nowrap }
.key svg { width: 34px; height: 10px; vertical-align: middle }
.note { background: #fff3cd; padding: .5rem .8rem } small { color: #444 }
.ticks { display: flex; justify-content: space-between; font-size: .8rem; color: #444 }
[hidden] { display: none !important }
</style>
<h1>@TITLE@</h1>
<div class="columns">
<div><h2>Genre</h2><table id="genre"></table></div>
<div><h2>Emotion (0 to 1)</h2><table id="emotion"></table></div>
<div><h2>Nearest training clips</h2><table id="nearest"></table></div>
</div>
<p><audio id="audio" controls preload="auto" src="data:audio/mpeg;base64,@AUDIO@"></audio></p>
<p><small>Click a picture, or focus the pictures and use the arrow keys (5 s) and space.
<span id="now" aria-live="off"></span></small></p>
<div id="panels" tabindex="0" role="slider" aria-label="Position in the song"
  aria-valuemin="0" aria-valuemax="@SECONDS@" aria-valuenow="0">
<h2><label>Mel spectrogram, low frequencies below
  <input type="checkbox" id="explain"> show what speaks for
  and against <em id="predicted"></em></label></h2>
<div class="panel"><img id="mel" alt="Mel spectrogram of the song over time"
  src="data:image/png;base64,@MEL@"><img id="attributions" hidden
  alt="What every patch adds to the predicted class: red speaks for it, blue against it"
  src="data:image/png;base64,@ATTRIBUTIONS@"><div class="cursor"></div></div>
<h2>Genre: probability of the six likeliest classes (lines at 25, 50 and 75 %)</h2>
<div class="panel"><svg id="genres" preserveAspectRatio="none"></svg>
<div class="cursor"></div></div><div id="genrekeys"></div>
<h2>Emotion: 0 (below) to 1</h2>
<div class="panel"><svg id="emotions" preserveAspectRatio="none"></svg>
<div class="cursor"></div></div><div class="ticks" id="ticks"></div><div id="emotionkeys"></div>
</div>
<h2>Limits of these predictions</h2>
@LIMITS@
<script>
"use strict";
const song = @DATA@;
const $ = id => document.getElementById(id), audio = $("audio"), panels = $("panels");
const dashes = ["", "8 4", "2 3", "12 3 2 3", "5 2", "10 3 2 3 2 3"];
function cell(row, text) { const c = row.insertCell(); c.textContent = text; return c; }
function percent(value) { return (100 * value).toFixed(0) + " %"; }
const order = song.classes.map((name, k) => k)
  .sort((a, b) => song.genre[song.classes[b]] - song.genre[song.classes[a]]);
for (const k of order) {
  const row = $("genre").insertRow(), name = song.classes[k];
  cell(row, name); cell(row, percent(song.genre[name]));
  const bar = document.createElement("span");
  bar.className = "bar"; bar.style.width = 120 * song.genre[name] + "px";
  row.insertCell().append(bar);
}
for (const [name, value] of Object.entries(song.emotion)) {
  const row = $("emotion").insertRow(); cell(row, name); cell(row, value.toFixed(2));
}
for (const clip of song.nearest) {
  const row = $("nearest").insertRow(); cell(row, clip.genre); cell(row, clip.clip);
}
if (!song.nearest.length) cell($("nearest").insertRow(), "the data set was not found");
$("predicted").textContent = song.classes[order[0]];
$("explain").addEventListener("change", event => {
  $("attributions").hidden = !event.target.checked; $("mel").hidden = event.target.checked;
});
const ns = "http://www.w3.org/2000/svg";
function element(name, attributes) {
  const made = document.createElementNS(ns, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
function draw(id, keys, curves) {
  const svg = $(id);
  svg.setAttribute("viewBox", "0 0 1000 100");
  for (const level of [25, 50, 75])
    svg.append(element("line", {x1: 0, x2: 1000, y1: level, y2: level, stroke: "#ddd",
      "vector-effect": "non-scaling-stroke"}));
  curves.forEach(([name, values], i) => {
    const style = {fill: "none", stroke: song.colors[i], "stroke-width": 2.5,
      "stroke-dasharray": dashes[i % dashes.length], "vector-effect": "non-scaling-stroke"};
    const points = values.map((v, j) =>
      (1000 * song.times_s[j] / song.seconds).toFixed(2) + "," + (100 - 100 * v).toFixed(2));
    if (points.length === 1) points.unshift("0," + points[0].split(",")[1]);
    svg.append(element("polyline", {...style, points: points.join(" ")}));
    const key = document.createElement("span"), sample = element("svg", {viewBox: "0 0 34 10"});
    key.className = "key";
    sample.append(element("line", {...style, x1: 0, x2: 34, y1: 5, y2: 5}));
    key.append(sample, " " + name);
    $(keys).append(key);
  });
}
// By the curves and not by the prediction for the song: a medley has several genres.
const total = k => song.genre_over_time[k].reduce((sum, value) => sum + value, 0);
draw("genres", "genrekeys", [...order].sort((a, b) => total(b) - total(a)).slice(0, 6).map(k =>
  [song.classes[k], song.genre_over_time[k]]));
draw("emotions", "emotionkeys", Object.keys(song.emotion).map((name, k) =>
  [name, song.emotion_over_time[k]]));
function clock(t) {
  return Math.floor(t / 60) + ":" + String(Math.floor(t % 60)).padStart(2, "0");
}
for (let i = 0; i <= 4; i++) {
  const tick = document.createElement("span");
  tick.textContent = clock(song.seconds * i / 4); $("ticks").append(tick);
}
const cursors = document.querySelectorAll(".cursor");
function place() {
  const t = audio.currentTime;
  for (const cursor of cursors) cursor.style.left = 100 * t / song.seconds + "%";
  panels.setAttribute("aria-valuenow", t.toFixed(1));
  panels.setAttribute("aria-valuetext", clock(t)); $("now").textContent = clock(t);
  if (!audio.paused) requestAnimationFrame(place);
}
for (const name of ["play", "seeked", "timeupdate", "loadedmetadata"])
  audio.addEventListener(name, place);
function jump(t) {
  audio.currentTime = Math.min(Math.max(t, 0), (audio.duration || song.seconds) - 0.05);
  place();
}
for (const panel of document.querySelectorAll(".panel"))
  panel.addEventListener("click", event => {
    const box = panel.getBoundingClientRect();
    jump(song.seconds * (event.clientX - box.left) / box.width);
  });
panels.addEventListener("keydown", event => {
  if (event.target !== panels) return;
  const by = {ArrowLeft: -5, ArrowRight: 5}[event.key];
  if (by) jump(audio.currentTime + by);
  else if (event.key === "Home") jump(0); else if (event.key === "End") jump(song.seconds);
  else if (event.key === " ") audio.paused ? audio.play() : audio.pause();
  else return;
  event.preventDefault();
});
place();
</script></html>
"""


def make_page(facts, pictures, audio, limits) -> str:
    """One song as a page that loads nothing from outside."""
    data = facts | {"colors": COLORS}
    parts = {
        "TITLE": html.escape(Path(facts["file"]).name),
        "SECONDS": facts["seconds"],
        "LIMITS": limits,
        "MEL": base64.b64encode(pictures["mel"]).decode(),
        "ATTRIBUTIONS": base64.b64encode(pictures["attributions"]).decode(),
        "AUDIO": base64.b64encode(audio).decode(),
        # A name may hold anything, and "</script>" would end the script.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    # In one pass, so that what is filled in is not searched for further places.
    return re.sub("@([A-Z]+)@", lambda match: str(parts[match[1]]), PAGE)


def limits_of(out, networks, temperature) -> str:
    """The limits of the predictions, as HTML."""
    names = networks["cnn"].settings["names"]
    scaled = "are not calibrated (run python -m tools.explain)"
    if temperature != 1.0:
        scaled = f"are calibrated on validation clips (temperature {temperature:.2f})"
    demo = ""
    for step, _ in NETWORKS.values():
        metrics = out / step / "metrics.json"
        if metrics.exists() and json.loads(metrics.read_text())["data"]["demo"]:
            demo = """<p class="note"><b>Networks trained on made-up demo music:</b> these
            predictions show that the program runs. They say nothing about the song.</p>"""
    return f"""{demo}<p>The networks know {len(names)} genres: {html.escape(", ".join(names))}. They
    predict one of these for every input, for speech and noise as well. The percentages {scaled};
    this holds for clips of 30 s that resemble the training clips, not for the 6 s behind each
    point of a curve. The genre table and curves are the predictions of the CNN. The emotion curves
    are those of the CNN of step 10, the emotion table is the mean of that CNN and an LSTM. The
    checkbox shows integrated gradients: red patches raise the score of the predicted genre above
    its score for the mean of the training clips, blue patches lower it. The ends of every 30 s lie
    in fewer windows and therefore look paler. The player has a compressed mono copy.</p>"""


def main(argv=None):
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.flag
    parser.add_argument("songs", nargs="+", type=Path, help="sound files")
    add("--data-dir", type=Path, help="the training data, for the nearest clips")
    add("--out-dir", type=Path, help="folder of the steps' outputs; pages go there too")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--train", action="store_true", help="run the steps whose checkpoints are missing")
    add("--top", type=bounded(int, 1, 20), default=3, help="classes in the table")
    args = parser.parse_args(argv)
    require_decoder(args.songs)
    keep_freed_memory()
    compile_librosa()
    out = output_folder(args.out_dir)
    networks = find_networks(out, args)
    temperature, known = temperature_of(out), training_vectors(networks["cnn"], args)
    folder = out / "listen"
    make_folder(folder)
    limits = limits_of(out, networks, temperature)
    found, table, failed = [], [], []
    for place, path in enumerate(args.songs, start=1):
        try:
            facts, pictures, audio = listen(path, networks, temperature, known)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(path)
            continue
        safe = re.sub(r"[^\w.-]+", "_", Path(facts["file"]).stem)[:60].strip("._") or "song"
        page = folder / f"{place:02d}_{safe}.html"
        write_text(page, make_page(facts, pictures, audio, limits))
        found.append(facts | {"page": str(page)})
        best = sorted(facts["genre"].items(), key=lambda pair: -pair[1])[: args.top]
        row = {
            "song": Path(facts["file"]).name,
            "length": "{}:{:02d}".format(*divmod(round(facts["seconds"]), 60)),
            "genre": ", ".join(f"{name} {value:.0%}" for name, value in best),
            **{name: f"{value:.2f}" for name, value in facts["emotion"].items()},
            "nearest training clips": ", ".join(c["genre"] for c in facts["nearest"][:3]) or "-",
            "page": str(page),
        }
        table.append(row)
    if table:
        facts = {"songs": found, "temperature": temperature, "classes": found[0]["classes"]}
        write_text(folder / "listen.json", json.dumps(facts, indent=1))
        print(pd.DataFrame(table).to_string(index=False))
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
