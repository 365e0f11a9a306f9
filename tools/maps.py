"""The maps of step 11 as a page to walk in: hover, filter, click to hear a clip.

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
<p>Click a point to hear five seconds of the clip, made from its spectrogram. Click a class in the
legend to hide it, twice to see it alone.</p>
<audio id="audio" controls></audio>
{figure}
</html>
"""
# Plotly runs this after the figure is drawn, with its own place in {plot_id}.
PLAY = """
document.getElementById("{plot_id}").on("plotly_click", event => {
  const audio = document.getElementById("audio"), sounds = SOUNDS;
  audio.src = "data:audio/mpeg;base64," + sounds[event.points[0].customdata];
  audio.play();
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

    Raises
    ------
    InputError
        Step 11 was not run here, or with other clips.
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


def draw(maps):
    """The maps of `read_step11` as one Plotly figure, with a menu of the maps and three filters.

    Each class has two traces, of clips that are predicted right (filled) and wrong (open).
    """
    try:
        from plotly.graph_objects import Figure
    except ImportError:
        raise InputError("the page needs plotly: pip install plotly") from None
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

    fig, shown = Figure(), values(first)
    for place, (genre, right) in enumerate(traces):
        k = classes.index(genre) % len(COLORS)
        symbol = k if right else k + 100  # Plotly's open form of the same mark
        fig.add_scatter(
            **{key: lists[place] for key, lists in shown.items()},
            mode="markers",
            marker={"color": COLORS[k], "symbol": symbol, "size": 10, "line_width": 1},
            name=genre if right else f"{genre}, wrong",
            hovertemplate="%{text}<extra></extra>",
        )
    filters = {
        label: {"visible": [True if right in kinds else "legendonly" for _, right in traces]}
        for label, kinds in (("all", (1, 0)), ("predicted right", (1,)), ("predicted wrong", (0,)))
    }
    menu = {title: values(clips) for title, clips in maps.items()}
    for choices, look in (
        (menu, {"type": "dropdown", "y": 1.12}),
        (filters, {"type": "buttons", "y": 1.06, "direction": "right"}),
    ):
        buttons = [{"label": k, "method": "restyle", "args": [v]} for k, v in choices.items()]
        look |= {"x": 0, "xanchor": "left", "yanchor": "middle"}
        fig.layout.updatemenus += ({"buttons": buttons, **look},)
    axis = {"zeroline": False, "showticklabels": False}
    fig.update_layout(xaxis=axis, yaxis=axis, height=800, hovermode="closest")
    fig.update_layout(legend_orientation="h", margin={"l": 10, "r": 10})
    return fig


def main():
    step = Step("maps", __doc__, parts=("genre",))
    maps = read_step11(step)
    fig = draw(maps)
    ids = next(iter(maps.values())).index
    play = PLAY.replace("SOUNDS", json.dumps(read_sounds(step, ids)))
    config = {"responsive": True, "displaylogo": False}
    figure = fig.to_html(full_html=False, post_script=play, config=config)
    write_text(step.folder / "maps.html", PAGE.format(figure=figure))
    step.text("[maps.html](maps.html): all maps of step 11 in one page, to hover and to listen.")
    step.finish(clips=len(ids))


if __name__ == "__main__":
    main()
