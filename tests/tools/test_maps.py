"""tools.maps: the page of step 11's maps, what it holds and how it is walked in."""

import base64
import io
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import assert_clean_error, labels_of, run_forked, write_data_set

from patrec.features import HOP, SR
from patrec.labels import fingerprint
from tools.maps import draw, read_sounds, read_step11, sound_of

pytestmark = pytest.mark.slow
TOOL, METHODS = "tools/maps.py", ("PCA", "t-SNE")


@pytest.fixture(scope="module")
def outputs(small_data, tmp_path_factory):
    """The page of what step 11 would have saved (test_step11 makes one of what it does save)."""
    out, rng = tmp_path_factory.mktemp("out"), np.random.default_rng(0)
    folder, labels = out / "step11_latent", labels_of(small_data, split="test")
    folder.mkdir()
    classes, ids = sorted(set(labels.values())), sorted(labels)
    for name, known in (("cnn_mel", ids), ("beat_chroma", ids[:0:-1])):  # it lacks a clip
        arrays = {"ids": known, "classes": classes, "vectors": rng.random((len(known), 9))}
        arrays["labels"] = [classes.index(labels[clip]) for clip in known]
        arrays["predicted"] = rng.integers(0, len(classes), len(known))
        arrays["probability"] = rng.random(len(known))
        np.savez(folder / f"latent_{name}.npz", **arrays)
        maps = {method: rng.standard_normal((len(known), 2)) for method in METHODS}
        np.savez(folder / f"maps_{name}.npz", **maps)
    facts = {"roles": {"cnn_mel": "CNN", "beat_chroma": "worst LSTM"}}
    facts["data"] = {"fingerprint": {"genre": fingerprint(small_data, "genre")}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    run_forked(TOOL, "--smoke", "--data-dir", small_data, "--out-dir", out)
    return out


def maps_of(outputs, data):
    """What the page is made of: {map: its clips}."""
    return read_step11(SimpleNamespace(out=outputs, source=SimpleNamespace(root=data)))


def mel_of(data, clip):
    """(128, T) of a test clip, in half precision as it is kept."""
    path = data / "fma_genre_spectrograms" / "test" / f"{clip}.fused.full.npy"
    return np.load(path)[:128].astype(np.float16).astype(np.float32)


def sounds_of(outputs):
    """The sounds in the page, in the order of the clips."""
    text = (outputs / "maps" / "maps.html").read_text()
    return json.loads(re.search(r"sounds = (\[.*?\]);", text)[1])


def test_without_step_11_or_with_other_clips_it_says_what_to_run(small_data, tmp_path, outputs):
    where = ("--data-dir", small_data, "--out-dir", tmp_path)
    result = run_forked(TOOL, *where, check=False)
    assert_clean_error(result, "no complete outputs of step 11", "run python step11_latent.py")
    other = write_data_set(tmp_path / "other", per_class=(1, 1), n_emotion=(2, 1), n_frames=30)
    result = run_forked(TOOL, "--data-dir", other, "--out-dir", outputs, check=False)
    assert_clean_error(result, "other labels", "--data-dir")


def test_the_maps_hold_every_clip_that_all_models_have(outputs, small_data):
    found, folder = maps_of(outputs, small_data), outputs / "step11_latent"
    titles = {"cnn_mel": "CNN (CNN, mel)", "beat_chroma": "worst LSTM (LSTM, chroma, beats)"}
    assert list(found) == [f"{t}: {method}" for t in titles.values() for method in METHODS]
    for name, title in titles.items():
        clips, maps = np.load(folder / f"latent_{name}.npz"), np.load(folder / f"maps_{name}.npz")
        for method in METHODS:
            table = found[f"{title}: {method}"]
            assert list(table.index) == list(next(iter(found.values())).index)  # as the sounds are
            rows = [clips["ids"].tolist().index(clip) for clip in table.index]
            np.testing.assert_allclose(table[["x", "y"]], maps[method][rows], atol=1e-3)
            for column, key in (("genre", "labels"), ("predicted", "predicted")):
                assert table[column].tolist() == clips["classes"][clips[key][rows]].tolist()
            np.testing.assert_allclose(table["probability"], clips["probability"][rows])
    assert len(table) == len(np.load(folder / "latent_beat_chroma.npz")["ids"])
    for trace in draw(found)[0]["data"]:  # open marks are mistakes
        assert (trace["marker"]["symbol"] >= 100) == trace["name"].endswith(", wrong")


def test_a_click_lets_hear_the_middle_of_the_clip(outputs, small_data):
    sounds, n_frames = sounds_of(outputs), round(SR / HOP)
    ids = next(iter(maps_of(outputs, small_data).values())).index
    sound = soundfile.info(io.BytesIO(base64.b64decode(sounds[0])))
    assert sound.duration == pytest.approx(1, abs=0.2)
    source, args = SimpleNamespace(root=small_data), SimpleNamespace(smoke=False)
    (sound,) = read_sounds(SimpleNamespace(args=args, source=source), ids[:1])
    sound = soundfile.info(io.BytesIO(base64.b64decode(sound)))
    assert sound.duration == pytest.approx(5, abs=0.2)
    assert len(sounds) == len(ids) and len(set(sounds)) > 0.9 * len(ids)
    for i in (0, 7):
        mel = mel_of(small_data, ids[i])
        first = (mel.shape[1] - n_frames) // 2
        assert sounds[i] == sound_of(mel[:, first : first + n_frames])


def test_a_clip_shorter_than_that_is_heard_alone(own_data):
    """Nothing of the clip that comes next in memory."""
    step = SimpleNamespace(args=SimpleNamespace(smoke=True), source=SimpleNamespace(root=own_data))
    ids = sorted(labels_of(own_data, split="test"))[:2]
    mels = [mel_of(own_data, clip) for clip in ids]
    assert max(mel.shape[1] for mel in mels) < round(SR / HOP)
    assert read_sounds(step, ids) == list(map(sound_of, mels))


def test_a_name_of_a_class_does_not_end_the_script(outputs, small_data, tmp_path):
    """With --no-merge, names are the user's."""
    folder, saved = tmp_path / "step11_latent", outputs / "step11_latent"
    shutil.copytree(saved, folder)
    clips = dict(np.load(saved / "latent_cnn_mel.npz"))
    clips["classes"] = [f"</script><b>{name}" for name in clips["classes"]]
    np.savez(folder / "latent_cnn_mel.npz", **clips)
    run_forked(TOOL, "--smoke", "--data-dir", small_data, "--out-dir", tmp_path)
    assert "</script><b>" not in (tmp_path / "maps" / "maps.html").read_text()


@pytest.mark.parametrize("width", [400, 1400])
def test_the_maps_can_be_walked_in(open_page, outputs, small_data, width):
    page, maps = open_page(outputs / "maps" / "maps.html", width), maps_of(outputs, small_data)
    page.wait_for_function("document.querySelectorAll('.points path').length > 5")
    page.select_option("#map", "CNN (CNN, mel): t-SNE")
    table, sounds = maps["CNN (CNN, mel): t-SNE"], sounds_of(outputs)

    def shown():
        """The points that can be seen: {place in the list of sounds: (x, y, text)}."""
        traces = page.evaluate("document.querySelector('.js-plotly-plot').data")
        rows = [zip(t["customdata"], t["x"], t["y"], t["text"], strict=True)
                for t in traces if t.get("visible", True) is True]  # fmt: skip
        return {i: (x, y, text) for i, x, y, text in itertools.chain(*rows)}

    points = shown()
    assert sorted(points) == list(range(len(table)))
    for i, (x, y, text) in points.items():
        row = table.iloc[i]
        assert (x, y) == pytest.approx((row["x"], row["y"]))
        said = f"clip {table.index[i]}, {row['genre']}, predicted {row['predicted']} "
        assert text.startswith(said) and f"{row['probability']:.2f}" in text
    page.select_option("#shown", "predicted wrong")
    wrong = np.flatnonzero(table["genre"] != table["predicted"])
    assert sorted(shown()) == wrong.tolist()
    # Hovering says what a clip is, clicking plays it; so do the arrow keys and Enter.
    box = page.locator(".points path").first.bounding_box()
    at = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*at)
    page.wait_for_selector(".hovertext")
    said = page.text_content(".hoverlayer")
    page.mouse.click(*at)
    page.wait_for_function("audio.currentTime > 0.2")
    (i,) = (i for i, (*_, text) in points.items() if text == said)
    assert page.evaluate("audio.src") == f"data:audio/mpeg;base64,{sounds[i]}"
    page.focus(".js-plotly-plot")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    i = min(wrong, key=lambda i: points[i][0])
    # Plotly draws the text a moment after the key.
    hovers = "text => document.querySelector('.hoverlayer').textContent == text"
    page.wait_for_function(hovers, arg=points[i][2], timeout=5000)
    assert page.evaluate("audio.src") == f"data:audio/mpeg;base64,{sounds[i]}"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
