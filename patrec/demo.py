"""Draw a small made-up data set in the lab's layout, for a first run and for the tests.

There is no sound behind it: chords, bass, melody and drum strokes are drawn as spectrograms.
Each genre has a style. The emotions follow from how a clip is drawn. The same seed gives the
same bytes.
"""

import collections
import contextlib
import functools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

FRAMES_PER_S = 22_050 / 512
N_FRAMES = (474, 561)  # 11 to 13 s
SPLITS = {"genre": {"train": 8, "test": 3}, "emotion": {"train": 60, "test": 12}}  # per genre
FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}
NOTICE = "These clips are made up: scores on them say nothing about real music.\n"


class Style(NamedTuple):
    """How a clip sounds. Levels and noise are in dB, relative to a tone of level 0."""

    tempo: float  # beats per minute
    minor: float  # chance of a minor key
    voices: tuple  # of each stroke in turn, in scale steps above the chord's root
    strokes: float  # of the chord, per bar
    decay: float  # time in which a tone falls to 1/e of its amplitude, in s
    rolloff: float  # the k-th partial has amplitude k ** -rolloff: 1 is bright, 3 nearly a sine
    tilt: float  # of the whole spectrum, in dB per octave
    octave: int  # of the chords and the melody, above the C of 131 Hz
    bass: float
    melody: float
    drums: float
    pattern: str  # of the drums, a key of PATTERNS
    swell: float  # how much the loudness changes over the clip
    noise: float
    loose: float = 0.01  # how much a beat's length varies, as a share of it


TRIAD, POWER, SEVENTH, DRONE = ((0, 2, 4),), ((0, 4, 7),), ((0, 2, 4, 6),), ((0, 4, 7, 11),)
PICKED = ((0,), (4,), (2,), (7,))  # one tone after the other
STYLES = {  # genres that the lab merges have similar styles
    "Blues": Style(96, 0.3, SEVENTH, 4, 0.5, 1.4, -1, 0, -2, 4, -14, "shuffle", 4, -46),
    "Chiptune": Style(146, 0.5, PICKED, 16, 0.12, 0.9, 2, 1, 0, 2, -2, "four", 0, -70),
    "Classical": Style(88, 0.5, TRIAD, 4, 1.0, 1.9, -2, 1, -6, 2, -90, "rock", 18, -66),
    "Electronic": Style(128, 0.6, TRIAD, 8, 0.2, 1.0, 1, 0, 2, -6, 2, "four", 2, -62),
    "Folk": Style(104, 0.2, PICKED, 8, 0.5, 1.5, 0, 0, -8, 2, -30, "hand", 6, -58),
    "Hip-Hop": Style(92, 0.8, TRIAD, 2, 0.3, 1.8, 0, 0, 8, -8, 6, "boom", 1, -54),
    "Indie-Rock": Style(134, 0.3, TRIAD, 8, 0.5, 1.1, 0, 0, 0, 2, -2, "rock", 4, -48),
    "International": Style(112, 0.9, DRONE, 6, 0.3, 1.3, 1, 1, -4, 6, -4, "hand", 5, -52),
    "Jazz": Style(150, 0.5, SEVENTH, 1.5, 0.7, 2.0, -1, 0, 3, 5, -10, "swing", 8, -56),
    "Metal": Style(168, 0.9, POWER, 16, 0.3, 0.6, 1, -1, 0, -10, 4, "double", 0, -34),
    "Old-Time": Style(118, 0.1, TRIAD, 8, 0.2, 1.2, -2, 1, -8, 3, -90, "rock", 4, -26),
    "Pop": Style(116, 0.2, TRIAD, 4, 0.8, 1.4, 2, 0, 0, 8, 0, "rock", 2, -62),
    "Post-Punk": Style(150, 0.8, POWER, 8, 0.4, 1.0, 0, 0, 6, -4, 0, "fast", 2, -48),
    "Post-Rock": Style(110, 0.6, TRIAD, 8, 1.2, 0.8, -1, 0, -2, 0, -4, "rock", 8, -40),
    "Psych-Folk": Style(96, 0.4, PICKED, 8, 0.7, 1.6, -1, 0, -8, 3, -28, "hand", 8, -54),
    "Psych-Rock": Style(116, 0.6, TRIAD, 8, 0.9, 0.8, -1, 0, 0, 1, -2, "rock", 5, -38),
    "Punk": Style(176, 0.6, POWER, 16, 0.4, 0.7, 1, -1, 0, -6, 4, "fast", 0, -36),
    "Rock": Style(124, 0.5, TRIAD, 8, 0.8, 0.8, 0, 0, 0, 1, 0, "rock", 3, -42),
    "Soundtrack": Style(84, 0.8, DRONE, 1, 3.0, 2.0, -3, 0, 0, -6, -90, "break", 16, -58),
    "Trip-Hop": Style(86, 0.9, SEVENTH, 1, 1.8, 1.8, -3, 0, 6, -6, 2, "break", 3, -38),
}
PATTERNS = {  # strokes of kick, snare and hi-hat in a bar, on sixteenths or triplets
    "four": ("x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "rock": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "fast": ("x...x...x...x...", "..x...x...x...x.", "x.x.x.x.x.x.x.x."),
    "double": ("xxxxxxxxxxxxxxxx", "....x.......x...", "x...x...x...x..."),
    "break": ("x.....x...x.....", "....x..x.x..x...", "x.x.x.x.x.x.x.xx"),
    "boom": ("x..x......x..x..", "....x.......x...", "x.x.x.xxx.x.x.x."),
    "shuffle": ("x.....x.....", "...x.....x..", "x.xx.xx.xx.x"),
    "swing": ("............", "..........x.", "x..x.xx..x.x"),
    "hand": ("x..x..x...x.x...", "......x......x.x", "................"),
}
KIT = ((60, 40, 0.08), (300, 1500, 0.07), (9000, 3000, 0.03))  # centre and width in Hz, decay in s
PROGRESSIONS = ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 3, 0, 4), (5, 3, 0, 4))
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones
LOWEST, N_PITCHES, N_PARTIALS = 24, 72, 40  # MIDI number of the lowest tone, a C


def write_demo(root, parts=tuple(FOLDERS), seed=0) -> Path:
    """Write the parts of the made-up data set that `root` lacks, each whole or not at all.

    Parameters
    ----------
    root : path of the folder that holds, or is to hold, the four folders of the lab
    parts : of 'genre' and 'emotion', those that are wanted
    """
    root = Path(root)
    missing = [part for part in parts if not (root / FOLDERS[part]).is_dir()]
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as unfinished:
        unfinished = Path(unfinished)
        (unfinished / "DEMO.txt").write_text(NOTICE)
        for part in missing:
            write_part(unfinished, part, seed)
        # The full clips come last: whoever finds them finds the rest.
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.is_dir(), -len(path.name))):
            with contextlib.suppress(OSError):  # another process was faster, with the same bytes
                os.replace(path, root / path.name)
    return root


def write_part(root, part, seed) -> None:
    """Write the full and the beat-synchronised clips of one part, with their label files."""
    rng = np.random.default_rng([seed, list(FOLDERS).index(part)])
    labels = list(STYLES) if part == "genre" else [None]
    clips = [(split, label) for split, n in SPLITS[part].items() for label in labels * n]
    ids = (1 if part == "genre" else 10**8) + rng.permutation(len(clips))
    folders = root / FOLDERS[part], root / f"{FOLDERS[part]}_beat"
    lines = {(folder, split): [] for folder in folders for split in SPLITS[part]}
    for folder, split in lines:
        (folder / split).mkdir(parents=True)
    for i, (split, label) in sorted(zip(ids.tolist(), clips, strict=True)):
        rng = np.random.default_rng([seed, i])
        if part == "genre":
            style = vary(STYLES[label], rng)
        else:
            style, label = draw_emotions(rng)
        for folder, array in zip(folders, draw_clip(style, rng), strict=True):
            np.save(folder / split / f"{i}.fused.full.npy", array)
            lines[folder, split].append((i, label))
    for (folder, split), rows in lines.items():
        if part == "genre":  # the forms of the names differ in the lab's data set too
            form = "fused.full" if split == "train" else "full.fused"
            form = "beatsync.fused" if folder == folders[1] else form
            text = ["Id\tGenre", *(f"{i}.{form}.npy.gz\t{label}" for i, label in rows)]
        elif split == "train":  # the lab gives no labels for the others
            text = ["Id,valence,energy,danceability"]
            text += [f"{i},{','.join(f'{value:.3f}' for value in label)}" for i, label in rows]
        else:
            continue
        (folder / f"{split}_labels.txt").write_text("\n".join([*text, ""]))


def vary(style, rng) -> Style:
    """Draw the style of one clip of a genre: near that of the genre."""
    spread = {"tempo": 0.06 * style.tempo, "rolloff": 0.12, "tilt": 0.7, "noise": 3}
    spread |= {"bass": 1.5, "melody": 1.5, "drums": 1.5}
    changes = {name: getattr(style, name) + s * rng.standard_normal() for name, s in spread.items()}
    return style._replace(**changes)


def draw_emotions(rng) -> tuple[Style, tuple[float, float, float]]:
    """Draw the style of an emotion clip and the valence, energy and danceability it stands for.

    Valence follows from a major key, a high register and a quick tempo, energy from how many
    strokes there are, how loud the soft passages are and how bright the tones, danceability from
    strong drums and a steady beat. Listeners disagree, so each has some noise.
    """
    valence, energy, danceability = values = rng.random(3)
    style = list(STYLES.values())[rng.integers(len(STYLES))]
    style = style._replace(
        tempo=80 + 60 * valence + 8 * rng.standard_normal(),
        minor=float(valence < 0.5),
        octave=round(2 * valence - 1),
        tilt=4 * valence - 3,
        strokes=(1, 2, 4, 8, 16)[int(5 * energy)],
        rolloff=2.2 - 1.4 * energy,
        swell=18 * (1 - energy),
        noise=-66 + 26 * energy,
        drums=-24 + 30 * danceability,
        loose=0.1 * (1 - danceability),
    )
    return style, np.clip(values + 0.05 * rng.standard_normal(3), 0, 1).tolist()


def draw_clip(style, rng) -> tuple[np.ndarray, np.ndarray]:
    """Draw one clip; its key, chords and melody come from the random generator.

    Returns
    -------
    full, beat : np.ndarray [shape=(140, T)], float32
        128 mel bands in dB and 12 chroma values, per frame and (their median) per beat
    """
    n_frames = int(rng.integers(*N_FRAMES))
    beat_frames = 60 / style.tempo * FRAMES_PER_S
    n_beats = int(n_frames / beat_frames) + 8
    lengths = beat_frames * (1 + style.loose * rng.standard_normal(n_beats))
    beats = np.cumsum(lengths) - lengths[0] * (1 + 3 * rng.random())  # the first one is before 0
    rows = render(*compose(style, beats, n_frames, rng), style, rng)
    cuts = beats.round().astype(int)
    cuts = cuts[(cuts > 0) & (cuts < n_frames)]
    spans = np.split(rows, cuts, axis=1)  # each (140, frames of a beat)
    return in_db(rows), in_db(np.stack([np.median(span, axis=1) for span in spans], axis=1))


def in_db(rows) -> np.ndarray:
    """Convert the mel rows of (140, T) from power to dB below the loudest cell, at least -80."""
    mel = rows[:128] / rows[:128].max()
    return np.concatenate([10 * np.log10(np.maximum(mel, 1e-8)), rows[128:]])


def compose(style, beats, n_frames, rng) -> tuple[dict, np.ndarray]:
    """Choose what sounds when, and how loud.

    Returns
    -------
    tones : {(instrument, row of the tone): power of its first partial per frame}
    drums : np.ndarray [shape=(3, n_frames)], power of kick, snare and hi-hat
    """
    # Everything begins on a grid of 12 ticks per beat, 48 per bar.
    grid = np.interp(np.arange(12 * len(beats) - 11) / 12, np.arange(len(beats)), beats)
    grid = grid.round().astype(int).tolist()
    scale = MINOR if rng.random() < style.minor else MAJOR
    degrees = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    key = 48 + int(rng.integers(-6, 6)) - LOWEST
    tones = collections.defaultdict(lambda: np.zeros(n_frames, np.float32))
    drums = np.zeros((len(KIT), n_frames), np.float32)

    def faded(level_db, decay_s):
        t_s = np.arange(2 * n_frames, dtype=np.float32) / FRAMES_PER_S
        return 10 ** (level_db / 10) * np.exp(-2 / decay_s * t_s)

    def play(power, tick, n_ticks, sound):
        start, end = grid[tick], min(grid[min(tick + n_ticks, len(grid) - 1)], n_frames)
        if (first := max(start, 0)) < end:
            power[first:end] += (0.5 + 0.5 * rng.random()) * sound[first - start : end - start]

    def tone(instrument, step, octave, *how):
        play(tones[instrument, key + scale[step % 7] + 12 * (step // 7 + octave)], *how)

    sound, n_ticks = faded(0, style.decay), round(48 / style.strokes)
    for i, tick in enumerate(range(0, len(grid), n_ticks)):
        for step in style.voices[i % len(style.voices)]:
            tone("chord", degrees[tick // 48 % 4] + step, style.octave, tick, n_ticks, sound)
    sound = faded(style.bass, 0.6)
    for tick in range(0, len(grid), 12):
        step = degrees[tick // 48 % 4] + (0, 0, 0, 4)[rng.integers(4)]
        tone("bass", step, -1, tick, 12, sound)
    sound, step = faded(style.melody, 0.8), 7  # the melody wanders over the scale
    for tick in range(0, len(grid), 6):
        if rng.random() < 0.5:
            step = min(max(step + int(rng.integers(-2, 3)), 3), 14)
            tone("melody", step, style.octave, tick, 12, sound)
    for power, strokes, (*_, decay_s) in zip(drums, PATTERNS[style.pattern], KIT, strict=True):
        sound = faded(style.drums, decay_s)
        for tick in range(0, len(grid), 48 // len(strokes)):
            if strokes[tick % 48 * len(strokes) // 48] == "x":
                play(power, tick, 24, sound)
    return tones, drums


def render(tones, drums, style, rng) -> np.ndarray:
    """Turn what `compose` chose into power (128 rows) and chroma (12 rows), one array (140, T)."""
    n_frames, (centres, _) = drums.shape[1], mel_bands()
    mel_shapes, chroma_shapes = partial_shapes()
    mel, chroma = {}, {}
    for name, rolloff in (("chord", style.rolloff), ("bass", 2), ("melody", style.rolloff)):
        amplitudes = np.arange(1, N_PARTIALS + 1, dtype=np.float32) ** -np.float32(rolloff)
        mel[name] = np.tensordot(amplitudes**2, mel_shapes, 1)  # (128, N_PITCHES)
        chroma[name] = np.tensordot(amplitudes, chroma_shapes, 1)  # (12, N_PITCHES)
    swell = np.sin(2 * np.pi * (np.arange(n_frames) / n_frames + rng.random()))
    levels = np.stack(list(tones.values())) * np.float32(10 ** (style.swell / 20 * swell))
    mel = np.stack([mel[name][:, row] for name, row in tones], 1) @ levels
    chroma = np.stack([chroma[name][:, row] for name, row in tones], 1) @ np.sqrt(levels)

    # Noise fluctuates from cell to cell; the frames overlap, so neighbours are alike.
    floor = 10 ** (style.noise / 10)
    kit = [np.exp(-0.5 * ((centres - f_hz) / width) ** 2) + 0.001 for f_hz, width, _ in KIT]
    noise = np.float32(np.stack(kit, 1)) @ drums
    noise += np.float32(floor * np.minimum(500 / centres, 3))[:, None]
    grain = rng.standard_exponential((128, n_frames + 1), np.float32)
    grain = (grain[:, 1:] + grain[:, :-1]) / 2
    tilt = np.float32(10 ** (style.tilt * np.log2(centres / 1000) / 10))[:, None]
    mel = (mel * (0.7 + 0.3 * grain) + noise * grain) * tilt
    hiss = np.sqrt(0.1 * drums[0] + 0.3 * drums[1] + 10 * np.float32(floor))
    chroma += hiss * rng.random(chroma.shape, np.float32)
    # The lowest notes need long windows, so a change takes a few frames.
    padded = np.pad(chroma, ((0, 0), (2, 2)), "edge")
    chroma = sum(padded[:, i : i + n_frames] for i in range(5))
    return np.concatenate([mel, chroma / chroma.max(0)])


@functools.cache
def mel_bands() -> tuple[np.ndarray, np.ndarray]:
    """Centres and widths of the 128 mel bands, in Hz: linear up to 1 kHz, then logarithmic."""
    top = 15 + 27 * np.log(11.025) / np.log(6.4)  # 11,025 Hz in mel (Slaney, 1998)
    mel = np.linspace(0, top, 130)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    return edges[1:-1], (edges[2:] - edges[:-2]) / 2


@functools.cache
def partial_shapes() -> tuple[np.ndarray, np.ndarray]:
    """What every partial of every tone adds to the bands and to the pitch classes.

    Returns
    -------
    mel : np.ndarray [shape=(N_PARTIALS, 128, N_PITCHES)], power
    chroma : np.ndarray [shape=(N_PARTIALS, 12, N_PITCHES)], amplitude
    """
    centres, widths = mel_bands()
    k = np.arange(1, N_PARTIALS + 1)[:, None, None]
    pitch = LOWEST + np.arange(N_PITCHES) + 12 * np.log2(k)
    f_hz = 440 * 2 ** ((pitch - 69) / 12)
    spread = np.hypot(12, 0.4 * widths)[:, None]  # of the window of 93 ms and of the band, in Hz
    mel = np.exp(-0.5 * ((centres[:, None] - f_hz) / spread) ** 2) * (widths[0] / widths)[:, None]
    away = (pitch - np.arange(12)[:, None] + 6) % 12 - 6  # semitones from each pitch class
    return np.float32(mel * (f_hz < 11_025)), np.float32(np.exp(-0.5 * (away / 0.5) ** 2))
