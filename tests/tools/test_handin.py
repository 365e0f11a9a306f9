"""tools/handin.py: the draft of the report in its four forms, and the zip to hand in."""

import io
import json
import re
import sys
import unicodedata
import zipfile
from pathlib import Path

import pypdf
import pytest
from conftest import ROOT, assert_clean_error, run_forked, write_data_set

from patrec.errors import InputError
from tools import handin
from tools.report_text import GREEK, PAPERS, WORDS
from tools.steps import STEPS

ITEMS = re.findall(  # every lettered item of the lab sheet, in its order
    r"\S+",
    "0 1a 1b 1c 2a 2b 3 4a 4b 4c 5a 5b 5c 5d 5e 5f 6a 6b 6c 6d 6 7a 7b 7c 7d 7e 8a 8b 8c 8d 8e"
    " 9a 9b 9c 9d 9e 10a 10b 10c 10d 11a 11b 11c 11d",
)
BOXES = len(ITEMS) + 1  # and one for the sources


def run_tool(*args, cwd):
    """The command line, in a copy of this process."""
    return run_forked("tools/handin.py", *args, cwd=cwd, check=False)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Outputs as three steps leave them; the test runs in the folder that holds them."""
    import matplotlib.pyplot as plt

    def leave(name, summary, **args):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        facts = {
            "seconds": 12.3,
            "data": {"demo": False},
            "environment": {"device": "cpu", "torch": "2.x", "librosa": "0.11"},
            "runs": {},
        }
        if name.startswith("step06"):
            scores = {"precision": 0.25, "recall": 0.5, "f1": 1 / 3, "support": 8}
            facts["runs"]["mel"] = {"test": {"per_class": {"Hip-Hop": scores}}}
            facts["best_by_validation"] = "mel"
        (folder / "metrics.json").write_text(json.dumps(facts))
        (folder / "args.json").write_text(json.dumps({"smoke": False, "subset": None} | args))
        (folder / "summary.md").write_text(f"# {name}\n\n{summary}")
        return folder

    wide = " | ".join(f"macro_precision_{i}" for i in range(9))
    folder = leave(
        "step06_eval",
        f"""## Before the first item

| model | epochs |
| --- | --- |
| not_shown | 2 |

## 6a, c, d. All models

Words of the script, after Menon et al. (2021).

**Scores: ρ ≥ 0.5 & <more>**

| model | {wide} |
|{" --- |" * 10}
| beat_mel | {" | ".join(["0.409 [0.380, 0.441]"] * 9)} |

![All models [both]](scores.png)

*All models [both]*

## Without an item

| second table | of 6a |
| --- | --- |
| not_shown | 2 |

## 6b. Per class

![Gone](gone.png)

*Gone*
""",
    )
    fig, ax = plt.subplots(figsize=(12, 30))  # taller than half a page
    ax.plot([0, 1])
    fig.savefig(folder / "scores.png", dpi=60)
    plt.close(fig)
    leave(
        "step05_lstm",
        """## 5a. The network

```python
def forward(x):
    \"\"\"A docstring with
## no heading
    \"\"\"
```

## 5b. Overfitting

```python
def not_asked_for(x): ...
```

## 5c-f. Training

| run | epochs |
| --- | --- |
| mel | 40 |

## Scores

| run | test accuracy |
| --- | --- |
| mel | 0.601 |
| beat_mel | 0.602 |
| chroma | 0.603 |
| beat_chroma | 0.604 |
| fused | 0.605 |
""",
    )
    leave(
        "step05_lstm_small",
        "## 5b. Overfitting\n\n| run | loss |\n|---|---|\n| mel | 0 |\n",
        subset=64,
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def draft(name="report_draft.md", *flags):
    handin.main(["draft", "--to", name, *flags])
    return Path(name)


def section(text, item):
    return re.split(r"\n##+ ", text.split(f"\n### {item}. ")[1])[0]


# ------------------------------------------------------------------- what stands in the draft


def test_draft_asks_every_item_in_the_labs_order(outputs):
    text = draft().read_text()
    assert re.findall(r"^### (\d+[a-h]?)\. ", text, re.MULTILINE) == ITEMS
    assert re.findall(r"^> \*\*Own words \((\d+[a-h]?)\):\*\*", text, re.MULTILINE) == ITEMS
    assert re.findall(r"^## Step (\d+)\. ", text, re.MULTILINE) == [str(n) for n in STEPS]


def test_an_item_shows_the_table_and_the_figure_that_answer_it_and_no_more(outputs):
    text = draft().read_text()
    assert "| beat_mel | 0.409 [0.380, 0.441] |" in section(text, "6a")
    assert "![All models [both]](<outputs/step06_eval/scores.png>)" in section(text, "6a")
    assert "not_shown" not in text and "Words of the script" not in text
    assert "| Hip-Hop | 0.250 | 0.500 | 0.333 | 8 |" in section(text, "6b")
    assert "figure missing: outputs/step06_eval/gone.png" in section(text, "6b")
    assert "| mel | 0 |" in section(text, "5b")  # of the second run
    assert "`outputs/step06_eval/summary.md`" in text and "`outputs/step05_lstm_small/summ" in text


def test_every_lstm_has_its_own_result(outputs):
    text = draft().read_text()
    shown = {
        item: re.findall(r"\| 0\.60(\d) \|", section(text, item))
        for item in ("5c", "5d", "5e", "5f")
    }
    assert shown == {"5c": ["1"], "5d": ["2"], "5e": ["3", "4"], "5f": ["5"]}


def test_source_code_stands_only_where_an_item_asks_for_it(outputs):
    text = draft().read_text()
    assert "## no heading\n" in text.split("### 5a. ")[1].split("### 5b. ")[0]
    assert "not_asked_for" not in text


def test_draft_says_what_is_missing_and_what_is_no_result(outputs):
    for name, change in (("metrics", {"data": {"demo": True}}), ("args", {"smoke": True})):
        path = outputs / "step06_eval" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    title, _, rest = draft().read_text().partition("\n---\n")
    assert "Step 6: ran on the made-up demo data; Step 6: ran with --smoke" in title
    assert "Step 5: trained on a few clips only" in title
    assert "not run yet:** 1, 2, 3, 4, 7, 8, 9, 10, 11." in title
    assert "`python step01_spectrograms.py`" in rest and "python step06_eval.py" not in rest
    assert "forbidden" in title


def test_a_check_beside_a_full_run_is_not_shown_and_alone_it_is(outputs):
    """--overfit-batch leaves its own folder in the step's; the full run holds the check too."""
    full = outputs / "step06_eval"
    check = full / "overfit_batch"
    check.mkdir()
    for name in ("metrics.json", "args.json", "summary.md"):
        (check / name).write_bytes((full / name).read_bytes())
    (check / "args.json").write_text(json.dumps({"smoke": True, "subset": None}))
    told = ("step06_eval/overfit_batch/summary.md", "Step 6: ran with --smoke")
    text = draft("a.md").read_text()
    assert not any(words in text for words in told)
    (full / "summary.md").unlink()
    text = draft("b.md").read_text()
    assert all(words in text for words in told)


def test_title_page_has_the_names_and_room_for_those_not_given(outputs):
    text = draft("a.md", "--name1", "Άννα Ω. Παπα-Νίκα", "--id1", "03100001").read_text()
    title = text.split("\n---\n")[0]
    assert "| first partner | Άννα Ω. Παπα-Νίκα | 03100001 |" in title
    assert re.search(r"^\| second partner \| \.+ \| \.+ \|$", title, re.MULTILINE)


def test_greek_draft(outputs):
    text = draft("a.md", "--lang", "el").read_text()
    assert "# Αναγνώριση είδους" in text and "Εθνικό Μετσόβιο Πολυτεχνείο" in text
    assert re.findall(r"^### (\d+[a-h]?)\. ", text, re.MULTILINE) == ITEMS
    headings = re.findall(r"^## Βήμα \d+\. (.+)$", text, re.MULTILINE)
    assert headings == [title for title, *_ in GREEK.values()]
    assert text.count("> **Δικά μας λόγια (") == BOXES and "Own words" not in text
    assert "| Hip-Hop | 0.250" in text  # tables stay as they are


def test_sources_are_the_labs_links_and_the_papers_that_are_named(outputs):
    text = draft().read_text().split("\n## Sources\n")[1]
    assert "\\[0\\] <https://www.kaggle" in text and "\\[20\\] <https://towards" in text
    assert "Long-tail learning" in text and "Yosinski" in text
    assert "SpecAugment" not in text  # no step that has run names it


def test_every_paper_that_a_step_names_has_its_full_reference():
    text = " ".join(path.read_text() for path in sorted(ROOT.glob("step*.py")))
    pattern = r"\b([A-Z][A-Za-zé]+)(?: et\s+al\.| & [A-Z][a-z]+)?,? \(?((?:19|20)\d\d)\b"
    named = {(name, int(year)) for name, year in re.findall(pattern, " ".join(text.split()))}
    assert ("Hochreiter", 1991) in named and named <= set(PAPERS), named - set(PAPERS)


# ---------------------------------------------------------------------- one draft, four forms


@pytest.mark.slow
def test_word_draft(outputs):
    with zipfile.ZipFile(draft("a.docx", "--lang", "el")) as archive:
        page = archive.read("word/document.xml").decode()
        assert [name for name in archive.namelist() if name.startswith("word/media/")]
        assert 'w:instr="PAGE"' in archive.read("word/footer1.xml").decode()
        assert 'w:name w:val="Own words"' in archive.read("word/styles.xml").decode()
    assert page.count('w:val="OwnWords"') >= BOXES
    assert "Σχήμα" in page and "Περιεχόμενα" in page and "ρ ≥ 0.5 &amp; &lt;more&gt;" in page
    order = ("TOC ", "<w:footerReference", "<w:footnotePr>", "<w:pgSz", "<w:pgMar")  # Word's own
    places = [page.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.slow
def test_latex_draft_has_its_figures_and_fonts_beside_it(outputs):
    text = draft("a/report.tex").read_text()
    (name,) = re.findall(r"includegraphics\[.*?\]\{(.+?)\}", text)
    assert Path("a", name).read_bytes() == (outputs / "step06_eval/scores.png").read_bytes()
    assert Path("a/report_files/DejaVuSerif.ttf").is_file() and "Path=report_files/" in text
    assert text.count(r"\begin{ownwords}") >= BOXES and r"\tableofcontents" in text
    size = re.search(r"height=([\d.]+)cm|width=([\d.]+)cm", text)
    assert float(size[1] or size[2]) < 6  # so that the tall figure fits


@pytest.mark.slow
@pytest.mark.parametrize(
    "lang, name, contents",
    [("en", "Own words", "Contents"), ("el", "Δικά μας λόγια", "Περιεχόμενα")],
)
def test_pdf_draft_is_refused_by_zip_until_its_boxes_are_filled(
    outputs, capsys, lang, name, contents
):
    pdf = draft("a.pdf", "--lang", lang).read_bytes()
    pages = pypdf.PdfReader(io.BytesIO(pdf)).pages
    assert len(pages) > 3 and sum(len(page.images) for page in pages) == 1
    first, second, third = (pages[i].extract_text() for i in range(3))
    assert WORDS[lang]["course"] in first and f"{name} (" not in first
    assert second.startswith(contents) and f"{WORDS[lang]['step']} 1." in third
    pack = ["zip", "--id1", "1", "--report"]
    with pytest.raises(InputError, match=f"still has {BOXES} boxes"):
        handin.main([*pack, "a.pdf"])
    assert not list(Path().glob("*.zip"))
    handin.main([*pack, "a.pdf", "--anyway"])
    assert zipfile.ZipFile("patrec_1.zip").read("a.pdf") == pdf

    text = draft("a.md", "--lang", lang).read_text().replace(f"**{name} (", "**Ours (")
    Path("written.md").write_text(text.replace("Ours (5b)", f"{name} (5b)"))
    handin.main(["convert", "written.md", "--to", "b.pdf"])
    with pytest.raises(InputError, match="still has 1 boxes"):
        handin.main([*pack, "b.pdf"])


@pytest.mark.parametrize("text", ["Own\nwords (5b): …", "Own words(6)", "Own words (sources)"])
def test_a_box_is_counted_however_a_program_breaks_its_line(text):
    assert handin.count_boxes(text) == 1


def test_a_box_is_counted_however_a_program_writes_accents():
    text = "Δικά μας λόγια (10d) και Δικά μας λόγια (πηγές), στα δικά μας λόγια"
    assert handin.count_boxes(text) == 2
    assert handin.count_boxes(unicodedata.normalize("NFD", text)) == 2


@pytest.mark.parametrize(
    "name, module, package",
    [("a.docx", "pypandoc", "pypandoc_binary"), ("a.tex", "pypandoc", "pypandoc_binary")]
    + [("a.pdf", "typst", "typst")],
)
def test_a_missing_package_is_named_and_markdown_needs_none(
    outputs, monkeypatch, name, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {package}$"):
        draft(name)
    assert not Path(name).exists() and draft().is_file()


def test_a_figure_that_is_cut_off_is_named(outputs):
    path = outputs / "step06_eval/scores.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="scores.png: not readable"):
        draft("a.docx")


def test_a_draft_elsewhere_finds_its_figures(outputs):
    path = draft("reports/2026/a.md")
    (target,) = re.findall(r"!\[All models \[both\]\]\(<(.+?)>\)", path.read_text())
    assert (path.parent / target).resolve() == outputs / "step06_eval/scores.png"


def test_draft_never_overwrites_what_a_student_wrote(outputs):
    draft()
    path = draft()  # untouched: made anew
    path.write_text(path.read_text().replace("Own words (5b):", "The loss falls to"))
    before = path.read_bytes()
    with pytest.raises(InputError, match="report_draft.md: was not made here, or was changed"):
        draft()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--to", "a.html"], [".docx"]),
        (["--out-dir", "nowhere"], ["nowhere", "step01_spectrograms.py"]),
        (["--name1", "Maria\nNika"], ["letters"]),
        (["--name2", "A | B"], ["letters"]),
        (["--id1", "03 1"], ["Latin letters and digits"]),
        (["--id1", "1", "--id2", "1"], ["--id2"]),
        (["--lang", "de"], ["--lang"]),
        (["--name", "Maria"], ["--help"]),
    ],
)
def test_bad_flags_of_a_draft_are_one_line(outputs, flags, words):
    assert_clean_error(run_tool("draft", *flags, cwd=outputs.parent), *words)
    assert not list(outputs.parent.glob("*.*"))


# --------------------------------------------------------------------------------------- zip


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A finished report, of one page without boxes."""
    monkeypatch.chdir(tmp_path)
    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    writer.write("report.pdf")
    return tmp_path / "report.pdf"


def test_unpacked_zip_has_the_layout_of_the_project(report, capsys):
    handin.main(["zip", "--id1", "03100001", "--id2", "03100002", "--report", str(report)])
    with zipfile.ZipFile("patrec_03100001_03100002.zip") as archive:
        archive.extractall("unpacked")
        names = archive.namelist()
    folder = Path("unpacked")
    expected = {f"{step.script}.py" for step in STEPS.values()}
    expected |= {"common.py", "README.md", "requirements.txt", "report.pdf"}
    assert expected <= {path.name for path in folder.iterdir()}
    for part in ("patrec", "tools"):
        modules = {path.name: path.read_bytes() for path in (ROOT / part).glob("*.py")}
        assert {p.name: p.read_bytes() for p in (folder / part).iterdir()} == modules
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"patrec", "tools"}
    assert all(name in capsys.readouterr().out for name in names[-1:])  # the listing


@pytest.mark.slow
def test_unpacked_zip_runs_by_itself(report):
    data = write_data_set(Path("data"), per_class=(3, 1), n_emotion=(4, 2), n_frames=40).resolve()
    handin.main(["zip", "--id1", "MariaNika", "--report", str(report)])
    zipfile.ZipFile("patrec_MariaNika.zip").extractall("unpacked")
    step = Path("unpacked/step07_cnn.py").resolve()
    flags = ("--overfit-batch", "--smoke", "--data-dir", data, "--out-dir", Path("out").resolve())
    run_forked(step, *flags, cwd=step.parent)
    assert list(Path("out/step07_cnn").rglob("metrics.json"))


@pytest.mark.parametrize(
    "content, name, words",
    [
        (None, "report.pdf", ["No such file", "--report"]),
        (b"<html></html>", "report.pdf", ["is no PDF"]),
        (b"%PDF-1.7\n%%EOF", "report.html", ["is no PDF"]),
        (b"%PDF-1.7\n1 0 obj", "report.pdf", ["cut off"]),
        (b"%PDF-1.7\nnothing\n%%EOF\n", "report.pdf", ["not readable as PDF", "--anyway"]),
    ],
)
def test_reports_that_are_refused(tmp_path, content, name, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run_tool("zip", "--id1", "1", "--report", name, cwd=tmp_path)
    assert_clean_error(result, name, *words)
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("ids", [["../1"], ["Μαρία"], [""], ["a_b"], ["1", "1"]])
def test_ids_that_the_course_would_refuse(report, ids):
    flags = [part for n, text in enumerate(ids, 1) for part in (f"--id{n}", text)]
    with pytest.raises(InputError, match="id"):
        handin.main(["zip", *flags, "--report", str(report)])
    assert not list(report.parent.rglob("*.zip"))


@pytest.mark.parametrize(
    "name, text", [("common.py", "def main(:\n"), ("patrec/a.py", "return 1\n")]
)
def test_script_that_does_not_compile_is_refused(report, monkeypatch, name, text):
    path = report.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    monkeypatch.setattr(handin, "HERE", report.parent)
    with pytest.raises(InputError, match=f"{name}, line 1: does not compile"):
        handin.main(["zip", "--id1", "1", "--report", str(report)])
    assert not list(report.parent.glob("*.zip"))
