"""Draw a small made-up data set in the lab's layout, for a first run and for the tests.

No sound lies behind it: tones and drum strokes are drawn as spectrograms. Each genre has a style,
and the emotions follow from how a clip is drawn. The bytes are always the same.
"""

import functools
import os
import tempfile
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np

FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}
HEADERS = {"genre": "Id\tGenre", "emotion": "Id,valence,energy,danceability"}
N_CLIPS = {"genre": {"train": 8, "test": 3}, "emotion": {"train": 60, "test": 12}}  # of each genre
N_FRAMES = (474, 561)  # 11 to 13 s
FRAMES_PER_S = 22_050 / 512
LOWEST, N_TONES, N_PARTIALS = 24, 72, 40  # MIDI number of the lowest tone, a C of 33 Hz

# How a clip sounds: beats per minute; chance of a minor key; the tones of each chord in turn, in
# scale steps; chords per bar; time in which a tone falls to 1/e, in s; partial k has amplitude
# k ** -rolloff; tilt of the spectrum, in dB per octave; register; levels relative to the chords,
# in dB; how much the loudness changes, in dB; noise, in dB; how much a beat's length varies.
NAMES = "tempo minor voices chords decay rolloff tilt octave bass melody drums pattern swell noise"
Style = namedtuple("Style", f"{NAMES} loose", defaults=(0.01,))
TRIAD, POWER, SEVENTH, DRONE = ((0, 2, 4),), ((0, 4, 7),), ((0, 2, 4, 6),), ((0, 4, 7, 11),)
PICKED = ((0,), (4,), (2,), (7,))
STYLES = {  # genres that the lab merges have similar styles
    "Blues": Style(100, 0.3, SEVENTH, 4, 0.5, 1.4, -1, 0, -2, 4, -14, "shuffle", 4, -46),
    "Chiptune": Style(146, 0.5, PICKED, 16, 0.12, 0.9, 2, 1, 0, 2, -2, "four", 0, -70),
    "Classical": Style(96, 0.5, TRIAD, 4, 1.0, 1.9, -2, 1, -6, 2, -90, "rock", 18, -66),
    "Electronic": Style(128, 0.6, TRIAD, 8, 0.2, 1.0, 1, 0, 2, -6, 2, "four", 2, -62),
    "Folk": Style(104, 0.2, PICKED, 8, 0.5, 1.5, 0, 0, -8, 2, -30, "hand", 6, -58),
    "Hip-Hop": Style(98, 0.8, TRIAD, 2, 0.3, 1.8, 0, 0, 8, -8, 6, "boom", 1, -54),
    "Indie-Rock": Style(134, 0.3, TRIAD, 8, 0.5, 1.1, 0, 0, 0, 2, -2, "rock", 4, -48),
    "International": Style(112, 0.9, DRONE, 6, 0.3, 1.3, 1, 1, -4, 6, -4, "hand", 5, -52),
    "Jazz": Style(150, 0.5, SEVENTH, 1.5, 0.7, 2.0, -1, 0, 3, 5, -10, "swing", 8, -56),
    "Metal": Style(168, 0.9, POWER, 16, 0.3, 0.6, 1, -1, 0, -10, 4, "fast", 0, -34),
    "Old-Time": Style(118, 0.1, TRIAD, 8, 0.2, 1.2, -2, 1, -8, 3, -90, "rock", 4, -26),
    "Pop": Style(116, 0.2, TRIAD, 4, 0.8, 1.4, 2, 0, 0, 8, 0, "rock", 2, -62),
    "Post-Punk": Style(150, 0.8, POWER, 8, 0.4, 1.0, 0, 0, 6, -4, 0, "fast", 2, -48),
    "Post-Rock": Style(110, 0.6, TRIAD, 8, 1.2, 0.8, -1, 0, -2, 0, -4, "rock", 8, -40),
    "Psych-Folk": Style(100, 0.4, PICKED, 8, 0.7, 1.6, -1, 0, -8, 3, -28, "hand", 8, -54),
    "Psych-Rock": Style(116, 0.6, TRIAD, 8, 0.9, 0.8, -1, 0, 0, 1, -2, "rock", 5, -38),
    "Punk": Style(176, 0.6, POWER, 16, 0.4, 0.7, 1, -1, 0, -6, 4, "fast", 0, -36),
    "Rock": Style(124, 0.5, TRIAD, 8, 0.8, 0.8, 0, 0, 0, 1, 0, "rock", 3, -42),
    "Soundtrack": Style(92, 0.8, DRONE, 1, 3.0, 2.0, -3, 0, 0, -6, -90, "break", 16, -58),
    "Trip-Hop": Style(94, 0.9, SEVENTH, 1, 1.8, 1.8, -3, 0, 6, -6, 2, "break", 3, -38),
}
PATTERNS = {  # strokes of kick, snare and hi-hat in a bar, on sixteenths or triplets
    "four": ("x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "rock": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "fast": ("x...x...x...x...", "..x...x...x...x.", "x.x.x.x.x.x.x.x."),
    "break": ("x.....x...x.....", "....x..x.x..x...", "x.x.x.x.x.x.x.xx"),
    "boom": ("x..x......x..x..", "....x.......x...", "x.x.x.xxx.x.x.x."),
    "shuffle": ("x.....x.....", "...x.....x..", "x.xx.xx.xx.x"),
    "swing": ("............", "..........x.", "x..x.xx..x.x"),
    "hand": ("x..x..x...x.x...", "......x......x.x", "................"),
}
KIT = ((60, 40, 0.08), (300, 1500, 0.07), (9000, 3000, 0.03))  # centre, width in Hz; decay in s
PROGRESSIONS = ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 3, 0, 4), (5, 3, 0, 4))
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones


def write_demo(root, parts=tuple(FOLDERS)) -> Path:
    """Write those of the parts 'genre' and 'emotion' that `root` lacks, whole or not at all."""
    root = Path(root)
    missing = [part for part in parts if not (root / FOLDERS[part]).is_dir()]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as unfinished:
        for part in missing:
            write_part(Path(unfinished), part)
        root.mkdir(exist_ok=True)
        notice = "These clips are made up: scores on them say nothing about real music.\n"
        (root / "DEMO.txt").write_text(notice)
        for name in [f"{FOLDERS[part]}{end}" for part in missing for end in ("_beat", "")]:
            if not (root / name).is_dir():  # another process may have been faster
                os.replace(Path(unfinished, name), root / name)
    return root


def write_part(root, part) -> None:
    """Write the clips of one part, full and beat-synchronised, and their label files."""
    genres = list(STYLES) if part == "genre" else [None]
    clips = [(split, genre) for split, n in N_CLIPS[part].items() for genre in genres * n]
    first_id = {"genre": 1, "emotion": 10**8}[part]
    ids = first_id + np.random.default_rng([0, first_id]).permutation(len(clips))
    rows = defaultdict(lambda: [HEADERS[part]])
    for clip_id, (split, genre) in sorted(zip(ids.tolist(), clips, strict=True)):
        rng = np.random.default_rng([0, clip_id])
        style, label = vary(genre, rng) if genre else draw_emotions(rng)
        full, beat = draw_clip(style, rng)
        form = "fused.full" if split == "train" else "full.fused"  # as in the lab's label files
        for end, array, name in (("", full, form), ("_beat", beat, "beatsync.fused")):
            folder = root / f"{FOLDERS[part]}{end}"
            (folder / split).mkdir(parents=True, exist_ok=True)
            np.save(folder / split / f"{clip_id}.fused.full.npy", array)
            row = f"{clip_id}.{name}.npy.gz\t{label}" if genre else f"{clip_id},{label}"
            if genre or split == "train":  # the lab gives no emotions of its test clips
                rows[folder / f"{split}_labels.txt"].append(row)
    for path, lines in rows.items():
        path.write_text("\n".join([*lines, ""]))


def vary(genre, rng) -> tuple[Style, str]:
    """Draw the style of one clip of a genre, near the genre's own."""
    style, spread = STYLES[genre], {"tempo": 5, "rolloff": 0.2, "tilt": 1.2, "noise": 5}
    spread |= {"bass": 3, "melody": 3, "drums": 3}
    values = {name: getattr(style, name) + s * rng.standard_normal() for name, s in spread.items()}
    return style._replace(**values), genre


def draw_emotions(rng) -> tuple[Style, str]:
    """Draw a style, and its valence, energy and danceability with some noise."""
    valence, energy, danceability = values = rng.random(3)
    style = list(STYLES.values())[rng.integers(len(STYLES))]
    style = style._replace(tempo=90 + 60 * valence, minor=float(valence < 0.5))
    style = style._replace(octave=round(2 * valence - 1), tilt=4 * valence - 3)
    style = style._replace(chords=2 ** int(5 * energy), rolloff=2.2 - 1.4 * energy)
    style = style._replace(swell=18 * (1 - energy), noise=-66 + 26 * energy)
    style = style._replace(drums=-24 + 30 * danceability, loose=0.1 * (1 - danceability))
    noisy = np.clip(values + 0.05 * rng.standard_normal(3), 0, 1)
    return style, ",".join(f"{value:.3f}" for value in noisy)


def draw_clip(style, rng) -> tuple[np.ndarray, np.ndarray]:
    """Draw the array of one clip, (140, frames), and its beat-synchronised twin, (140, beats)."""
    n_frames = int(rng.integers(*N_FRAMES))
    beat = 60 / style.tempo * FRAMES_PER_S  # in frames
    lengths = beat * (1 + style.loose * rng.standard_normal(int(n_frames / beat) + 8))
    beats = np.cumsum(lengths) - lengths[0] * (1 + 3 * rng.random())  # begins within a bar
    n_ticks = 12 * (len(beats) - 1)
    ticks = np.interp(np.arange(n_ticks) / 12, np.arange(len(beats)), beats).round().astype(int)
    levels = np.zeros((N_TONES + len(KIT), n_frames), np.float32)
    t_s = np.arange(2 * n_frames, dtype=np.float32) / FRAMES_PER_S
    for row, tick, length, level_db, decay_s in compose(style, n_ticks, rng):
        start, end = ticks[tick], ticks[min(tick + length, n_ticks - 1)]
        first = max(start, 0)
        power = 10 ** (level_db / 10) * (0.5 + 0.5 * rng.random())
        span = levels[row, first : max(end, 0)]
        span += power * np.exp(-2 / decay_s * t_s[first - start :][: len(span)])
    rows = render(levels, style, rng)
    cuts = beats.round().astype(int)
    spans = np.split(rows, cuts[(cuts > 0) & (cuts < n_frames)], axis=1)  # a beat each
    both = rows, np.stack([np.median(span, axis=1) for span in spans], axis=1)
    for array in both:  # the median is taken on power, before dB
        array[:128] = 10 * np.log10(np.maximum(array[:128] / array[:128].max(), 1e-8))
    return both


def compose(style, n_ticks, rng):
    """Yield every tone and stroke: row, tick, length in ticks (12 a beat), level, decay time."""
    scale = MINOR if rng.random() < style.minor else MAJOR
    degrees = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    key = 48 - LOWEST + int(rng.integers(-6, 6))
    between, melody = round(48 / style.chords), 7

    def row(step, octave):
        return key + scale[step % 7] + 12 * (step // 7 + octave)

    for i, tick in enumerate(range(0, n_ticks, between)):
        for step in style.voices[i % len(style.voices)]:
            tone = row(degrees[tick // 48 % 4] + step, style.octave)
            yield tone, tick, between, 0, style.decay
    for tick in range(0, n_ticks, 6):
        if tick % 12 == 0:
            yield row(degrees[tick // 48 % 4], -1), tick, 12, style.bass, 0.6
        if rng.random() < 0.5:
            melody = min(max(melody + int(rng.integers(-2, 3)), 3), 14)
            yield row(melody, style.octave), tick, 12, style.melody, 0.8
    for i, ((*_, decay_s), strokes) in enumerate(zip(KIT, PATTERNS[style.pattern], strict=True)):
        for tick in range(0, n_ticks, 48 // len(strokes)):
            if strokes[tick % 48 * len(strokes) // 48] == "x":
                yield N_TONES + i, tick, 24, style.drums, decay_s


def render(levels, style, rng) -> np.ndarray:
    """Turn the power of tones and strokes, (75, T), into that of mel bands and into chroma."""
    centres, mel_shapes, chroma_shapes = shapes()
    n_frames, tones, strokes = levels.shape[1], levels[:N_TONES], levels[N_TONES:]
    swell = np.sin(2 * np.pi * (np.arange(n_frames) / n_frames + rng.random()))
    tones *= 10 ** (style.swell / 20 * swell)
    k = np.arange(1, N_PARTIALS + 1, dtype=np.float32)
    partials = k ** -np.float32(style.rolloff) * (1 - k / (N_PARTIALS + 1))  # ends softly
    kit = [np.exp(-0.5 * ((centres - f_hz) / width) ** 2) + 0.001 for f_hz, width, _ in KIT]
    floor = np.float32(10 ** (style.noise / 10))
    noise = np.float32(kit).T @ strokes + floor * np.minimum(500 / centres, 3)[:, None]
    grain = rng.standard_exponential((128, n_frames), np.float32)
    mel = np.tensordot(partials**2, mel_shapes, 1) @ tones * (0.7 + 0.3 * grain) + noise * grain
    mel *= 10 ** (style.tilt * np.log2(centres / 1000) / 10)[:, None]
    hiss = np.sqrt(strokes.mean(0) / 3 + 10 * floor) * rng.random((12, n_frames), np.float32)
    chroma = np.tensordot(partials, chroma_shapes, 1) @ np.sqrt(tones) + hiss
    return np.concatenate([mel, chroma / chroma.max(0)])


@functools.cache
def shapes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres of the mel bands, in Hz; what each partial of a tone adds to bands and to chroma."""
    mel = np.linspace(0, 15 + 27 * np.log(11.025) / np.log(6.4), 130)  # Slaney, 1998
    edges = np.where(mel < 15, 200 / 3 * mel, 1000 * 6.4 ** ((mel - 15) / 27))
    centres, widths = edges[1:-1], (edges[2:] - edges[:-2]) / 2
    pitch = LOWEST + np.arange(N_TONES) + 12 * np.log2(np.arange(1, N_PARTIALS + 1))[:, None, None]
    away_hz = centres[:, None] - 440 * 2 ** ((pitch - 69) / 12)
    spread_hz = np.hypot(12, 0.4 * widths)[:, None]  # of the analysis window and of the band
    bands = np.exp(-0.5 * (away_hz / spread_hz) ** 2) * (widths[0] / widths)[:, None]
    away = (pitch - np.arange(12)[:, None] + 6) % 12 - 6  # in semitones
    return centres.astype(np.float32), np.float32(bands), np.exp(-2 * np.float32(away) ** 2)
