"""The maps of step 11 as a page to walk in: hover, filter, click to hear a clip.

    python step11_latent.py
    python -m tools.maps

Input: what step 11 has saved, and the genre test clips; the package plotly. Output, in
outputs/maps/: maps.html, which needs no internet: every model and method, a point per test clip;
hovering shows what a clip is and what was predicted, clicking plays five seconds of it.
"""

import base64
import importlib.util
import io
import json
import re

import joblib
import numpy as np
import soundfile

from patrec.clips import load_clips
from patrec.errors import InputError
from patrec.features import BANDS, HOP, SR, mel_to_waveform
from patrec.files import write_text
from patrec.labels import fingerprint, read_entries
from patrec.parallel import parallel_map
from patrec.plots import COLORS, MARKERS, run_title
from patrec.step import Step

SYMBOLS = {  # plotly's names of MARKERS
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond",
    "P": "cross", "X": "x", "*": "star", "<": "triangle-left", ">": "triangle-right",
}  # fmt: skip

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Maps of the test clips</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1300px }
h1 { font-size: 1.3rem } #map { width: 100%; height: min(75vh, 800px) }
#map:focus-visible { outline: 3px solid #0072B2 }
fieldset { border: 0; padding: 0; margin: .4rem 0 }
label { margin-right: 1rem; white-space: nowrap } #said { min-height: 3em }
</style>
<h1>The genre test clips as the networks see them</h1>
<fieldset><label>model <select id="model"></select></label>
<label>method <select id="method"></select></label></fieldset>
<fieldset id="right"><label><input type="radio" name="right" value="all" checked> all</label>
<label><input type="radio" name="right" value="right"> predicted right</label>
<label><input type="radio" name="right" value="wrong"> predicted wrong</label></fieldset>
<fieldset id="classes"></fieldset>
<div id="map" tabindex="0" role="application" aria-label="Map: arrow keys go from clip to clip,
 Enter plays"></div>
<p id="said" aria-live="polite">Click a point, or focus the map and use the arrow keys and Enter:
five seconds of the clip, made from its spectrogram.</p>
<script>@PLOTLY@</script>
<script>
"use strict";
const data = @DATA@, $ = id => document.getElementById(id), map = $("map");
const audio = new Audio();
let shown = [], chosen = -1;
for (const name of Object.keys(data.models)) $("model").add(new Option(data.models[name], name));
for (const name of data.methods) $("method").add(new Option(name));
data.classes.forEach((name, k) => {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.checked = true; box.value = k;
  label.append(box, " " + name); $("classes").append(label);
});
function describe(i) {
  const run = data.runs[$("model").value], k = run.predicted[i];
  return "clip " + data.ids[i] + ", " + data.classes[data.labels[i]] + ", predicted " +
    data.classes[k] + " (unscaled probability " + run.probability[i].toFixed(2) + ")";
}
function draw() {
  const run = data.runs[$("model").value], points = run.points[$("method").value];
  const right = document.querySelector("[name=right]:checked").value;
  const on = new Set([...document.querySelectorAll("#classes :checked")].map(b => +b.value));
  shown = data.ids.map((id, i) => i).filter(i => on.has(data.labels[i]) && (right === "all" ||
    (run.predicted[i] === data.labels[i]) === (right === "right")));
  if (!shown.includes(chosen)) chosen = -1;
  const traces = data.classes.map((name, k) => {
    const rows = shown.filter(i => data.labels[i] === k);
    return {type: "scatter", mode: "markers", name, x: rows.map(i => points[i][0]),
      y: rows.map(i => points[i][1]), customdata: rows, text: rows.map(describe),
      hovertemplate: "%{text}<extra></extra>", marker: {color: data.colors[k % 10],
      symbol: data.symbols[k % 10], size: 10, line: {width: 1, color: "#000"}}};
  });
  const ring = chosen < 0 ? [] : [points[chosen]];
  traces.push({type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip",
    x: ring.map(p => p[0]), y: ring.map(p => p[1]),
    marker: {symbol: "circle-open", size: 24, color: "#d00", line: {width: 3}}});
  const axis = {title: "", zeroline: false, showticklabels: false};
  Plotly.react(map, traces, {margin: {l: 10, r: 10, t: 10, b: 10}, xaxis: axis, yaxis: axis,
    hovermode: "closest", legend: {orientation: "h"}}, {responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["toImage"]});
}
function choose(i, play) {
  chosen = i; draw(); $("said").textContent = describe(i);
  if (play) { audio.src = "data:audio/mpeg;base64," + data.sounds[i]; audio.play(); }
}
draw();
map.on("plotly_click", event => choose(event.points[0].customdata, true));
for (const id of ["model", "method", "right", "classes"]) $(id).addEventListener("change", draw);
map.addEventListener("keydown", event => {
  const points = data.runs[$("model").value].points[$("method").value];
  const order = [...shown].sort((a, b) => points[a][0] - points[b][0]);
  const at = order.indexOf(chosen), by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by && order.length) choose(order[(at + by + order.length) % order.length], false);
  else if (event.key === "Enter" && chosen >= 0) choose(chosen, true);
  else return;
  event.preventDefault();
});
</script>
</html>
"""


def sound_of(mel) -> str:
    """A mel spectrogram (128, T) as MP3, in base64."""
    file = io.BytesIO()
    quality = {"bitrate_mode": "VARIABLE", "compression_level": 0.99}
    soundfile.write(file, mel_to_waveform(mel), SR, format="MP3", **quality)
    return base64.b64encode(file.getvalue()).decode()


def read_step11(step) -> tuple[dict, dict]:
    """What step 11 has saved: {run: title}, {run: its clips and its maps, by id}.

    Raises
    ------
    InputError
        Step 11 was not run here, or with other clips.
    """
    folder = step.out / "step11_latent"
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        titles, runs = {}, {}
        for name, role in metrics["roles"].items():
            titles[name] = f"{role} ({run_title(name)})"
            with np.load(folder / f"latent_{name}.npz") as file:
                clips = {key: file[key] for key in file if key != "vectors"}
            with np.load(folder / f"maps_{name}.npz") as file:
                runs[name] = clips | {"maps": {method: file[method] for method in file}}
        made_with = metrics["data"]["fingerprint"]["genre"]
    except (OSError, KeyError, ValueError) as error:
        fault = f"no complete outputs of step 11 ({error})"
        raise InputError(f"{folder}: {fault}; run python step11_latent.py first") from None
    if made_with != fingerprint(step.source.root, "genre"):
        fault = f"step 11 was run with other labels than those in {step.source.root}"
        raise InputError(f"{folder}: {fault}; name the same --data-dir, or run it again")
    return titles, runs


def read_sounds(step, ids) -> list[str]:
    """The middle five seconds of test clips (one with --smoke), as `sound_of` gives them."""
    entries = {entry.clip_id: entry for entry in read_entries(step.source.root, "genre", "test")}
    store = load_clips([entries[clip_id] for clip_id in ids])
    size = round((1 if step.args.smoke else 5) * SR / HOP)
    mels = []
    for start, length in zip(store.starts.tolist(), store.lengths.tolist(), strict=True):
        first = start + max(length - size, 0) // 2
        part = store.frames[first : min(first + size, start + length), BANDS["mel"]]
        mels.append((part.float().numpy().T,))
    return list(parallel_map(sound_of, mels, 1 if step.args.smoke else joblib.cpu_count()))


def page_data(step, titles, runs) -> dict:
    """What the page shows: the clips that all models have, in one order."""
    of_cnn = runs["cnn_mel"]
    ids = [i for i in of_cnn["ids"].tolist() if all(i in run["ids"] for run in runs.values())]
    rows = {name: [run["ids"].tolist().index(i) for i in ids] for name, run in runs.items()}
    return {
        "ids": ids,
        "labels": of_cnn["labels"][rows["cnn_mel"]].tolist(),
        "classes": of_cnn["classes"].tolist(),
        "models": titles,
        "methods": list(of_cnn["maps"]),
        "runs": {
            name: {
                "predicted": run["predicted"][rows[name]].tolist(),
                "probability": run["probability"][rows[name]].round(3).tolist(),
                "points": {m: xy[rows[name]].round(3).tolist() for m, xy in run["maps"].items()},
            }
            for name, run in runs.items()
        },
        "sounds": read_sounds(step, ids),
        "colors": COLORS,
        "symbols": [SYMBOLS[marker] for marker in MARKERS],
    }


def main():
    step = Step("maps", __doc__, parts=("genre",))
    if not importlib.util.find_spec("plotly"):
        raise InputError("the page needs plotly: pip install plotly")
    from plotly.offline import get_plotlyjs

    titles, runs = read_step11(step)
    facts = page_data(step, titles, runs)
    parts = {"PLOTLY": get_plotlyjs(), "DATA": json.dumps(facts).replace("<", "\\u003c")}
    page = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)
    write_text(step.folder / "maps.html", page)
    step.text("[maps.html](maps.html): all maps of step 11 in one page, to hover and to listen.")
    step.finish(clips=len(facts["ids"]))


if __name__ == "__main__":
    main()
