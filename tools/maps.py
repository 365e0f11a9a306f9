"""The maps of step 11 as an interactive page: hover, filter, click to hear a clip.

    python step11_latent.py
    python -m tools.maps

Input: what step 11 has saved, and the genre test clips; the package plotly. Output, in
outputs/maps/: maps.html, which needs no internet: every model and method, a point per test clip;
hovering shows what a clip is and what was predicted, clicking plays five seconds of it.
"""

import base64
import functools
import io
import json

import joblib
import numpy as np
import pandas as pd
import soundfile

from patrec.clips import load_clips
from patrec.errors import InputError
from patrec.features import BANDS, HOP, SR, mel_to_waveform
from patrec.files import write_text
from patrec.labels import fingerprint, read_entries
from patrec.parallel import parallel_map
from patrec.plots import COLORS, run_title
from patrec.step import Step

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Maps of the test clips</title>
<body style="font: 16px/1.5 system-ui, sans-serif">
<h1>The genre test clips as the networks see them</h1>
<label>map <select id="map"></select></label> <label>clips <select id="shown"></select></label>
<p>Click a point, or focus the map and use the arrow keys and Enter, to hear five seconds of the
clip, made from its spectrogram.</p>
<audio id="audio" controls></audio>
{figure}
</html>
"""
# Plotly runs this when the figure is drawn; {plot_id} is the figure's.
SCRIPT = """
const figure = document.getElementById("{plot_id}"), menus = MENUS, sounds = SOUNDS;
for (const id of ["map", "shown"]) {
  const menu = document.getElementById(id);
  for (const label of Object.keys(menus[id])) menu.add(new Option(label));
  menu.addEventListener("change", () => Plotly.restyle(figure, menus[id][menu.value]));
}
function play(number) {
  const audio = document.getElementById("audio");
  audio.src = "data:audio/mpeg;base64," + sounds[number];
  audio.play();
}
figure.on("plotly_click", event => play(event.points[0].customdata));
let at = -1;  // the place of the chosen point, from left to right
figure.tabIndex = 0;
figure.addEventListener("keydown", event => {
  const points = figure.data.flatMap((trace, curveNumber) => trace.visible === "legendonly" ? [] :
    trace.x.map((x, i) => ({x, curveNumber, pointNumber: i, number: trace.customdata[i]})));
  points.sort((a, b) => a.x - b.x);
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by && points.length) {
    at = (at + by + points.length) % points.length;
    Plotly.Fx.hover(figure, [points[at]]);
  } else if (event.key === "Enter" && points[at]) play(points[at].number);
  else return;
  event.preventDefault();
});
"""


def sound_of(mel) -> str:
    """A mel spectrogram (128, T) as MP3, in base64."""
    file = io.BytesIO()
    quality = {"bitrate_mode": "VARIABLE", "compression_level": 0.99}
    soundfile.write(file, mel_to_waveform(mel), SR, format="MP3", **quality)
    return base64.b64encode(file.getvalue()).decode()


def read_step11(step) -> dict[str, pd.DataFrame]:
    """What step 11 has saved: for each map, i.e. model and method, the clips that all models have.

    The columns are x, y, genre, predicted and probability; the index holds the clips' ids.
    InputError if step 11 was not run here, or with other clips.
    """
    folder, maps = step.out / "step11_latent", {}
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        for name, role in metrics["roles"].items():
            with np.load(folder / f"latent_{name}.npz") as file:
                clips = pd.DataFrame({"probability": file["probability"]}, file["ids"])
                for column, numbers in (("genre", "labels"), ("predicted", "predicted")):
                    clips[column] = file["classes"][file[numbers]]
            with np.load(folder / f"maps_{name}.npz") as file:
                for method in file:
                    x, y = file[method].round(3).T
                    maps[f"{role} ({run_title(name)}): {method}"] = clips.assign(x=x, y=y)
        made_with = metrics["data"]["fingerprint"]["genre"]
    except (OSError, KeyError, ValueError) as error:
        fault = f"no complete outputs of step 11 ({error})"
        raise InputError(f"{folder}: {fault}; run python step11_latent.py first") from None
    if made_with != fingerprint(step.source.root, "genre"):
        fault = f"step 11 was run with other labels than those in {step.source.root}"
        raise InputError(f"{folder}: {fault}; name the same --data-dir, or run it again")
    ids = functools.reduce(pd.Index.intersection, [clips.index for clips in maps.values()])
    return {title: clips.loc[ids] for title, clips in maps.items()}


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


def draw(maps) -> tuple[dict, dict]:
    """The first map of `read_step11` as a Plotly figure, and what the page's menus change in it.

    Each class has two traces, of clips that are predicted right (filled) and wrong (open).
    """
    first = next(iter(maps.values()))
    classes = sorted(first["genre"].unique())
    traces = [(genre, right) for genre in classes for right in (True, False)]

    def values(clips):
        """What the traces show of a map: for each property, a list with an entry per trace."""
        said = "clip {}, {}, predicted {} (unscaled probability {:.2f})".format
        columns = [clips[key] for key in ("genre", "predicted", "probability")]
        texts = list(map(said, clips.index, *columns))
        clips = clips.assign(text=texts, customdata=range(len(clips)))
        is_right = clips["genre"] == clips["predicted"]
        parts = [clips[(clips["genre"] == genre) & (is_right == right)] for genre, right in traces]
        keys = ("x", "y", "text", "customdata")
        return {key: [part[key].tolist() for part in parts] for key in keys}

    kept = {"all": (True, False), "predicted right": (True,), "predicted wrong": (False,)}
    menus = {
        "map": {title: values(clips) for title, clips in maps.items()},
        "shown": {
            label: {"visible": [right in some or "legendonly" for _, right in traces]}
            for label, some in kept.items()
        },
    }
    figure = {"data": [], "layout": {"height": 800, "hovermode": "closest"}}
    for place, (genre, right) in enumerate(traces):
        k = classes.index(genre) % len(COLORS)
        symbol = k if right else k + 100  # Plotly's open form of the same mark
        look = {"type": "scatter", "mode": "markers", "hovertemplate": "%{text}<extra></extra>"}
        look["marker"] = {"color": COLORS[k], "symbol": symbol, "size": 10, "line": {"width": 1}}
        shown = {key: lists[place] for key, lists in values(first).items()}
        figure["data"].append(look | shown | {"name": genre if right else f"{genre}, wrong"})
    axis = {"zeroline": False, "showticklabels": False}
    figure["layout"] |= {"xaxis": axis, "yaxis": axis, "legend": {"orientation": "h"}}
    return figure, menus


def main():
    step = Step("maps", __doc__, parts=("genre",))
    try:
        from plotly.io import to_html
    except ImportError:
        raise InputError("the page needs plotly: pip install plotly") from None
    maps = read_step11(step)
    figure, menus = draw(maps)
    ids = next(iter(maps.values())).index
    # A name may hold anything, and "</script>" would end the script.
    script = SCRIPT.replace("MENUS", json.dumps(menus).replace("<", "\\u003c"))
    script = script.replace("SOUNDS", json.dumps(read_sounds(step, ids)))
    config = {"responsive": True, "displaylogo": False}
    figure = to_html(figure, full_html=False, post_script=script, config=config)
    write_text(step.folder / "maps.html", PAGE.format(figure=figure))
    step.text("[maps.html](maps.html): all maps of step 11 in one page, to hover and to listen.")
    step.finish(clips=len(ids))


if __name__ == "__main__":
    main()
