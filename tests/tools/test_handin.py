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
from conftest import ROOT, assert_clean_error, run_forked
from PIL import Image

from patrec.errors import InputError
from tools import handin
from tools.report_text import GREEK_TITLES, PAPERS, QUESTIONS
from tools.steps import STEPS

ITEMS = """
0 1a 1b 1c 2a 2b 3 4a 4b 4c 5a 5b 5c 5d 5e 5f 6a 6b 6c 6d 6 7a 7b 7c 7d 7e 8a 8b 8c 8d 8e
9a 9b 9c 9d 9e 10a 10b 10c 10d 11a 11b 11c 11d
"""  # of the lab sheet, in its order
ITEMS = re.findall(r"\w+", ITEMS)
TOOL = "tools/handin.py"
BOXES = len(ITEMS) + 1  # and one for the sources


STEP_6 = """## 6a, c, d. All models

Words of the script, after Santurkar et al. (2018).

**Scores: ρ ≥ 0.5 & <more>**

| model |{columns}
| --- |{rule}
| cnn_lstm_ensemble |{row}

![All models [both]](scores.png)

*All models [both]*

## Of 6a too

| second table | epochs |
| --- | --- |
| not_shown | 2 |
""".format(columns=" precision |" * 9, rule=" --- |" * 9, row=" 0.409 [0.380, 0.441] |" * 9)
STEP_5 = """## 5a. The network

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

| run | test accuracy |
| --- | --- |
| mel | 0.601 |
| beat_mel | 0.602 |
| chroma | 0.603 |
| beat_chroma | 0.604 |
| fused | 0.605 |
"""


def leave(folder, summary, subset=None, smoke=False, demo=False, **facts):
    """Write what a step leaves."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"data": {"demo": demo}} | facts))
    (folder / "args.json").write_text(json.dumps({"smoke": smoke, "subset": subset}))
    (folder / "summary.md").write_text(summary)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Outputs as two steps leave them; the test runs in the folder that holds them."""
    scores = {"Hip-Hop": {"precision": 0.25, "recall": 0.5, "f1": 1 / 3, "support": 8}}
    runs = {"mel": {"test": {"per_class": scores}}}
    leave(tmp_path / "outputs/step06_eval", STEP_6, runs=runs, best_by_validation="mel")
    tall = Image.new("RGB", (720, 1800))  # taller than half a page
    tall.save(tmp_path / "outputs/step06_eval/scores.png")
    leave(tmp_path / "outputs/step05_lstm", STEP_5, subset=64)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def draft(name="report_draft.md", *flags):
    handin.main(["draft", "--to", name, *flags])
    return Path(name)


def section(text, item):
    return re.split(r"\n##+ ", text.split(f"\n### {item}. ")[1])[0]


def test_draft_asks_every_item_in_the_labs_order(outputs):
    text = draft().read_text()
    assert re.findall(r"^### (\d+[a-h]?)\. ", text, re.MULTILINE) == ITEMS
    assert re.findall(r"^> \*\*Own words \((\d+[a-h]?)\):\*\*", text, re.MULTILINE) == ITEMS
    assert re.findall(r"^## Step (\d+)\. ", text, re.MULTILINE) == [str(n) for n in STEPS]


def test_an_item_shows_the_table_and_the_figure_that_answer_it_and_no_more(outputs):
    text = draft().read_text()
    assert "**Scores: ρ ≥ 0.5 & <more>**\n\n| model | precision" in section(text, "6a")
    assert "| cnn_lstm_ensemble | 0.409 [0.380, 0.441] |" in section(text, "6a")
    assert "![All models [both]](<outputs/step06_eval/scores.png>)" in section(text, "6a")
    assert "not_shown" not in text and "Words of the script" not in text
    assert "| Hip-Hop | 0.250 | 0.500 | 0.333 | 8 |" in section(text, "6b")
    assert "`outputs/step06_eval/summary.md`" in text
    assert "## no heading\n" in text.split("### 5a. ")[1].split("### 5b. ")[0]
    assert "not_asked_for" not in text  # source code in 5b
    lstms = [re.findall(r"\| 0\.60(\d) \|", section(text, f"5{letter}")) for letter in "cdef"]
    assert lstms == [["1"], ["2"], ["3", "4"], ["5"]]
    found = {"2a": "![a](b.png)\n\n![c](lstm_cost.png)\n"}  # the second figure answers 2a
    assert handin.answer("2a", found, "x") == ["![c](<x/lstm_cost.png>)\n\n*c*"]


def test_draft_says_what_is_missing_and_what_is_no_result(outputs):
    leave(outputs / "step02_beat_sync", "## 2a. Steps\n", smoke=True, demo=True)
    title, _, rest = draft().read_text().partition("\n---\n")
    assert "made-up demo data:** Step 2\n" in title and "with --smoke:** Step 2\n" in title
    assert "(--subset):** Step 5" in title and "forbidden" in title
    assert "Not run yet:** Step 1, 3, 4, 7, 8, 9, 10, 11\n" in title
    assert "`python step01_spectrograms.py`" in rest and "python step06_eval.py" not in rest


def test_a_check_beside_a_full_run_is_not_shown_and_alone_it_is(outputs):
    """--overfit-batch leaves its own folder in the step's; the full run holds the check too."""
    leave(outputs / "step05_lstm/overfit_batch", "## 5b. Check\n", smoke=True)
    told = ("step05_lstm/overfit_batch/summary.md", "with --smoke:** Step 5")
    text = draft("a.md").read_text()
    assert not any(words in text for words in told)
    (outputs / "step05_lstm/metrics.json").unlink()  # as a step that did not end well leaves it
    text = draft("b.md").read_text()
    assert all(words in text for words in told)


def test_greek_draft_with_names_in_another_folder(outputs):
    path = draft("a/b.md", "--lang", "el", "--name1", "Άννα Παπα-Νίκα", "--id1", "03100001")
    text = path.read_text()
    assert "# Αναγνώριση είδους" in text and "Εθνικό Μετσόβιο Πολυτεχνείο" in text
    assert "| πρώτο μέλος | Άννα Παπα-Νίκα | 03100001 |" in text
    assert re.search(r"^\| δεύτερο μέλος \| \.+ \| \.+ \|$", text, re.MULTILINE)
    assert re.findall(r"^## Βήμα \d+\. (.+)$", text, re.MULTILINE) == list(GREEK_TITLES.values())
    assert all(re.search("[α-ω]", question["el"]) for question in QUESTIONS.values())
    assert text.count("> **Δικά μας λόγια (") == BOXES and "Own words" not in text
    assert "| Hip-Hop | 0.250" in text  # tables stay as they are
    (figure,) = re.findall(r"!\[All models \[both\]\]\(<(.+?)>\)", text)
    assert (path.parent / figure).resolve() == outputs / "step06_eval/scores.png"


def test_sources_are_the_labs_links_and_the_papers_that_are_named(outputs):
    text = draft().read_text().split("\n## Sources\n")[1]
    assert "\\[0\\] <https://www.kaggle" in text and "\\[20\\] <https://towards" in text
    assert "How Does Batch Normalization Help" in text and "Yosinski" in text
    assert "t-SNE" not in text  # no step that has run names it


def test_every_paper_that_a_step_names_has_its_full_reference():
    text = " ".join(path.read_text() for path in sorted(ROOT.glob("step*.py")))
    pattern = r"\b([A-Z][A-Za-zé]+)(?: et\s+al\.| & [A-Z][a-z]+)?,? \(?((?:19|20)\d\d)\b"
    named = {(name, int(year)) for name, year in re.findall(pattern, " ".join(text.split()))}
    assert ("Hochreiter", 1991) in named and named <= set(PAPERS), named - set(PAPERS)


@pytest.mark.slow
def test_word_draft(outputs):
    with zipfile.ZipFile(draft("a.docx", "--lang", "el")) as archive:
        page = archive.read("word/document.xml").decode()
        assert [name for name in archive.namelist() if name.startswith("word/media/")]
        assert 'w:instr="PAGE"' in archive.read("word/footer1.xml").decode()
        assert 'w:name w:val="Own words"' in archive.read("word/styles.xml").decode()
    assert page.count('w:val="OwnWords"') >= BOXES
    assert all(w in page for w in ("Σχήμα", "Περιεχόμενα", "ρ ≥ 0.5 &amp; &lt;more&gt;"))
    assert "cnn_lstm_ensemble" in page  # underscores are no emphasis
    places = [page.index(part) for part in ("TOC ", "<w:footerReference", "<w:pgSz", "<w:pgMar")]
    assert places == sorted(places)  # the order that Word wants


@pytest.mark.slow
def test_latex_draft_has_its_figures_and_fonts_beside_it(outputs):
    text = draft("report.tex").read_text()
    (size, name) = re.findall(r"includegraphics\[(.*?)\]\{(.+?)\}", text)[0]
    assert name == "report_files/outputs/step06_eval/scores.png"
    assert Path(name).read_bytes() == (outputs / "step06_eval/scores.png").read_bytes()
    assert float(re.search(r"width=([\d.]+)cm", size)[1]) == 5.2  # so that it is 13 cm high
    assert Path("report_files/DejaVuSerif.ttf").is_file() and "Path=report_files/" in text
    assert text.count(r"\begin{ownwords}") >= BOXES and r"\tableofcontents" in text
    widths = re.findall(r"\\real\{([\d.]+)\}", text)  # of the wide table's ten columns
    assert len(widths) >= 10 and sum(map(float, widths[:10])) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("lang, name, words", [
    ("en", "Own words", ("Laboratory 3", "Contents", "Step 1.")),
    ("el", "Δικά μας λόγια", ("3η εργαστηριακή", "Περιεχόμενα", "Βήμα 1.")),
])  # fmt: skip
def test_pdf_draft_is_refused_by_zip_until_its_boxes_are_filled(outputs, lang, name, words):
    pdf = draft("a.pdf", "--lang", lang).read_bytes()
    pages = pypdf.PdfReader(io.BytesIO(pdf)).pages
    assert len(pages) > 3 and sum(len(page.images) for page in pages) == 1
    for page, expected in zip(pages, words, strict=False):  # title page, contents, first chapter
        assert expected in page.extract_text()
    assert f"{name} (" not in pages[0].extract_text()
    pack = ["zip", "--id1", "1", "--report"]
    with pytest.raises(InputError, match=f"still has {BOXES} boxes"):
        handin.main([*pack, "a.pdf"])
    handin.main([*pack, "a.pdf", "--anyway"])
    assert zipfile.ZipFile("patrec_1.zip").read("a.pdf") == pdf

    text = draft("a.md", "--lang", lang).read_text().replace(f"**{name} (", "**Ours (")
    Path("written.md").write_text(text.replace("Ours (5b)", f"{name} (5b)"))
    handin.main(["convert", "written.md", "--to", "b.pdf"])
    with pytest.raises(InputError, match="still has 1 boxes"):
        handin.main([*pack, "b.pdf"])


@pytest.mark.slow
def test_a_report_keeps_its_figures_in_another_folder(outputs):
    draft("a.md")
    handin.main(["convert", "a.md", "--to", "elsewhere/a.docx"])
    with zipfile.ZipFile("elsewhere/a.docx") as archive:
        assert [name for name in archive.namelist() if name.startswith("word/media/")]


def test_a_box_is_counted_however_a_program_breaks_lines_and_writes_accents():
    text = "Δικά μας λόγια (10d) και Own\nwords(6) και Δικά μας λόγια (Πηγές), στα δικά μας λόγια"
    assert handin.count_boxes(text) == 3
    assert handin.count_boxes(unicodedata.normalize("NFD", text)) == 3


def test_a_missing_package_is_named_and_markdown_needs_none(outputs, monkeypatch):
    packages = {"a.pdf": "typst", "a.tex": "pypandoc_binary", "a.docx": "pypandoc_binary"}
    for name, package in packages.items():
        module = package.removesuffix("_binary")
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=f"pip install {package}$"):
            draft(name)
        assert not Path(name).exists()
    assert draft().is_file()


@pytest.mark.slow
def test_a_figure_that_is_cut_off_is_named(outputs):
    path = outputs / "step06_eval/scores.png"
    path.write_bytes(path.read_bytes()[:500])
    result = run_forked(TOOL, "draft", "--to", "a.docx", cwd=outputs.parent, check=False)
    assert_clean_error(result, "a.docx", "step06_eval/scores.png: no readable figure", "again")


def test_draft_never_overwrites_what_a_student_wrote(outputs):
    draft()
    draft("another.md")
    path = draft()  # untouched: made anew
    path.write_text(path.read_text().replace("Own words (5b):", "The loss falls to"))
    before = path.read_bytes()
    with pytest.raises(InputError, match="report_draft.md: was not made here, or was changed"):
        draft()
    assert path.read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    ("--to=a.html", ".docx"), ("--out-dir=nowhere", "nowhere: holds no outputs"), ("--na", "--help")
])  # fmt: skip
def test_bad_flags_of_a_draft_are_one_line(outputs, flags, words):
    result = run_forked(TOOL, "draft", flags, cwd=outputs.parent, check=False)
    assert_clean_error(result, words)
    assert not list(outputs.parent.glob("*.*"))


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A finished report, of one page without boxes."""
    monkeypatch.chdir(tmp_path)
    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    writer.write("report.pdf")
    return tmp_path / "report.pdf"


def test_unpacked_zip_has_the_layout_of_the_project(report):
    handin.main(["zip", "--id1", "03100001", "--id2", "03100002", "--report", str(report)])
    code = [path for part in ("", "patrec", "tools") for path in (ROOT / part).glob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in code} | {"tools/report.docx"}
    expected |= {"README.md", "requirements.txt", "report.pdf"}
    assert set(zipfile.ZipFile("patrec_03100001_03100002.zip").namelist()) == expected


@pytest.mark.slow
def test_unpacked_zip_runs_by_itself(report, tiny_data):
    handin.main(["zip", "--id1", "MariaNika", "--report", str(report)])
    zipfile.ZipFile("patrec_MariaNika.zip").extractall("unpacked")
    step = Path("unpacked/step07_cnn.py").resolve()
    flags = ("--overfit-batch", "--smoke", "--data-dir", tiny_data)
    run_forked(step, *flags, "--out-dir", Path("out").resolve(), cwd=step.parent)
    assert list(Path("out/step07_cnn").rglob("metrics.json"))


@pytest.mark.parametrize("content, words", [
    (None, ["No such file", "--report"]),
    (b"<html></html>%%EOF", ["is no whole PDF"]),
    (b"%PDF-1.7\n1 0 obj", ["is no whole PDF"]),
    (b"%PDF-1.7\nnothing\n%%EOF\n", ["not readable as PDF", "--anyway"]),
])  # fmt: skip
def test_reports_that_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "report.pdf").write_bytes(content)
    flags = ("--id1", "1", "--report", "report.pdf")
    result = run_forked(TOOL, "zip", *flags, cwd=tmp_path, check=False)
    assert_clean_error(result, "report.pdf", *words)
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("flags", ["--id1=../1", "--id1=Μαρία", "--id1=", "--id1=1 --id2=1"])
def test_ids_that_the_course_would_refuse(report, flags):
    with pytest.raises(InputError, match="id"):
        handin.main(["zip", *flags.split(), "--report", str(report)])
    assert not list(report.parent.rglob("*.zip"))
