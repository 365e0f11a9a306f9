"""tools.maps: the page of step 11's maps, what it holds and how it is walked in."""

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile
from conftest import assert_clean_error, labels_of, run_forked, write_data_set

from patrec.features import HOP, SR
from patrec.labels import fingerprint
from tools.maps import sound_of

pytestmark = pytest.mark.slow
TOOL = "tools/maps.py"


@pytest.fixture(scope="module")
def outputs(small_data, tmp_path_factory):
    """The page of what step 11 would have saved (test_step11 makes one of what it does save).

    The LSTM is of beats, in another order, and lacks a clip.
    """
    out, rng = tmp_path_factory.mktemp("out"), np.random.default_rng(0)
    folder, labels = out / "step11_latent", labels_of(small_data, split="test")
    folder.mkdir()
    classes, ids = sorted(set(labels.values())), sorted(labels)
    for name, known in (("cnn_mel", ids), ("beat_chroma", ids[:0:-1])):
        arrays = {"ids": known, "classes": classes, "vectors": rng.random((len(known), 9))}
        arrays["labels"] = [classes.index(labels[clip]) for clip in known]
        arrays["predicted"] = rng.integers(0, len(classes), len(known))
        arrays["probability"] = rng.random(len(known))
        np.savez(folder / f"latent_{name}.npz", **arrays)
        maps = {method: rng.standard_normal((len(known), 2)) for method in ("PCA", "t-SNE")}
        np.savez(folder / f"maps_{name}.npz", **maps)
    facts = {"roles": {"cnn_mel": "CNN", "beat_chroma": "worst LSTM"}}
    facts["data"] = {"fingerprint": {"genre": fingerprint(small_data, "genre")}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    run_forked(TOOL, "--smoke", "--data-dir", small_data, "--out-dir", out)
    return out


def maps_data(outputs):
    text = (outputs / "maps" / "maps.html").read_text()
    return json.loads(re.search(r"^const data = (.*), \$ = id", text, re.MULTILINE)[1])


def test_without_step_11_or_with_other_clips_it_says_what_to_run(small_data, tmp_path, outputs):
    where = ("--data-dir", small_data, "--out-dir", tmp_path)
    result = run_forked(TOOL, *where, check=False)
    assert_clean_error(result, "no complete outputs of step 11", "run python step11_latent.py")
    other = write_data_set(tmp_path / "other", per_class=(1, 1), n_emotion=(2, 1), n_frames=30)
    result = run_forked(TOOL, "--data-dir", other, "--out-dir", outputs, check=False)
    assert_clean_error(result, "other labels", "--data-dir")


def test_the_maps_hold_every_clip_that_all_models_have(outputs):
    data, folder = maps_data(outputs), outputs / "step11_latent"
    assert data["models"] == {"cnn_mel": "CNN (CNN, mel)",
                              "beat_chroma": "worst LSTM (LSTM, chroma, beats)"}  # fmt: skip
    for name, run in data["runs"].items():
        clips, maps = np.load(folder / f"latent_{name}.npz"), np.load(folder / f"maps_{name}.npz")
        rows = [clips["ids"].tolist().index(clip) for clip in data["ids"]]
        assert data["labels"] == clips["labels"][rows].tolist()
        for method in ("PCA", "t-SNE"):
            np.testing.assert_allclose(run["points"][method], maps[method][rows], atol=1e-3)
        assert run["predicted"] == clips["predicted"][rows].tolist()
        assert run["probability"] == pytest.approx(clips["probability"][rows].tolist(), abs=1e-3)
    assert len(data["ids"]) == len(np.load(folder / "latent_beat_chroma.npz")["ids"])


def test_a_click_lets_hear_the_middle_of_the_clip(outputs, small_data):
    data, n_frames = maps_data(outputs), round(SR / HOP)
    sound = soundfile.info(io.BytesIO(base64.b64decode(data["sounds"][0])))
    assert sound.duration == pytest.approx(1, abs=0.2)  # five seconds without --smoke
    assert len(set(data["sounds"])) > 0.9 * len(data["ids"])
    for i in (0, 7):
        path = small_data / "fma_genre_spectrograms" / "test" / f"{data['ids'][i]}.fused.full.npy"
        mel = np.load(path)[:128].astype(np.float16).astype(np.float32)
        first = (mel.shape[1] - n_frames) // 2
        assert data["sounds"][i] == sound_of(mel[:, first : first + n_frames])


@pytest.mark.parametrize("width", [400, 1400])
def test_the_maps_can_be_walked_in(open_page, outputs, width):
    page, data = open_page(outputs / "maps" / "maps.html", width), maps_data(outputs)
    page.wait_for_function("document.querySelectorAll('#map .points path').length > 5")
    assert page.evaluate("shown.length") == len(data["ids"])
    page.check("[value=wrong]")
    run = data["runs"][next(iter(data["models"]))]
    wrong = [i for i, label in enumerate(data["labels"]) if run["predicted"][i] != label]
    assert page.evaluate("shown") == wrong
    page.check("[value=all]")
    page.uncheck("#classes input >> nth=0")
    there = [i for i, label in enumerate(data["labels"]) if label != 0]
    assert page.evaluate("shown") == there
    page.select_option("#model", "cnn_mel")
    page.select_option("#method", "t-SNE")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    points = data["runs"]["cnn_mel"]["points"]["t-SNE"]
    first = page.evaluate("chosen")
    assert first == min(there, key=lambda i: points[i][0])
    page.keyboard.press("Enter")
    page.wait_for_function("audio.currentTime > 0.2")
    said = page.inner_text("#said")
    assert f"clip {data['ids'][first]}, {data['classes'][data['labels'][first]]}" in said
    assert "probability" in said
    # Hovering says the same of another clip, the one furthest to the right; clicking plays it.
    boxes = [path.bounding_box() for path in page.locator("#map .points path").all()]
    box = max(boxes, key=lambda box: box["x"])
    at = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*at)
    page.wait_for_selector("#map .hovertext")
    assert "clip " in page.text_content("#map .hoverlayer")
    page.mouse.click(*at)
    page.wait_for_function(f"chosen !== {first} && audio.currentTime > 0.2")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
