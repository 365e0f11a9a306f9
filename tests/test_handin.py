"""handin.py: the zip that the course asks for, the draft and its PDF."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, assert_clean_error, run_forked, run_script, write_data_set

import handin

PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.pdf"
    path.write_bytes(PDF)
    return path


@pytest.fixture
def project(tmp_path):
    """A copy of the project's scripts, to break one."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run_copy(project, *args):
    return subprocess.run(
        [sys.executable, str(project / "handin.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=project.parent,
        timeout=60,
    )


# ---------------------------------------------------------------------------------- zip


def test_zip_holds_the_scripts_and_the_report_and_nothing_else(tmp_path, report):
    result = run_script(
        "handin.py",
        "zip",
        "--id1",
        "03100001",
        "--id2",
        "03100002",
        "--report",
        report,
        "--out-dir",
        tmp_path,
    )
    archive = zipfile.ZipFile(tmp_path / "patrec_03100001_03100002.zip")
    steps = {path.name for path in ROOT.glob("step*.py")}
    assert set(archive.namelist()) == steps | {"common.py", "make_dataset.py", "report.pdf"}
    assert archive.read("common.py") == (ROOT / "common.py").read_bytes()
    assert archive.read("report.pdf") == PDF
    assert all(name in result.stdout for name in archive.namelist())  # the listing


def test_one_person_has_one_id_in_the_name(tmp_path, report):
    run_script("handin.py", "zip", "--id1", "MariaPapadopoulou", "--report", report, cwd=tmp_path)
    assert (tmp_path / "patrec_MariaPapadopoulou.zip").is_file()


def test_what_a_step_imports_comes_along_and_tools_do_not(project, report):
    (project / "extra_models.py").write_text("import helper_of_extra\n")
    (project / "helper_of_extra.py").write_text("")
    (project / "unrelated.py").write_text("")
    (project / "step05_lstm.py").open("a").write("\nimport extra_models\n")
    assert (
        run_copy(project, "zip", "--id1", "1", "--report", report, "--out-dir", project).returncode
        == 0
    )
    names = zipfile.ZipFile(project / "patrec_1.zip").namelist()
    assert {"extra_models.py", "helper_of_extra.py"} <= set(names)
    assert not {"unrelated.py", "handin.py", "kaggle_kernel.py"} & set(names)


def test_unpacked_zip_runs_by_itself(tmp_path, report):
    data_dir = write_data_set(tmp_path / "data", per_class=(3, 1), n_emotion=(4, 2), n_frames=40)
    run_script("handin.py", "zip", "--id1", "1", "--report", report, "--out-dir", tmp_path)
    zipfile.ZipFile(tmp_path / "patrec_1.zip").extractall(tmp_path / "unpacked")
    step = min(path.name for path in ROOT.glob("step*.py"))
    flags = ("--smoke", "--data-dir", data_dir, "--out-dir", tmp_path / "out")
    run_forked(tmp_path / "unpacked" / step, *flags, cwd=tmp_path / "unpacked")
    assert (tmp_path / "out" / step.removesuffix(".py") / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "report.pdf", ["No such file", "--report"]),
        (b"<html></html>", "report.pdf", ["no PDF"]),
        (PDF, "report.html", ["no PDF"]),
        (b"", "report.pdf", ["no PDF"]),
        (PDF[:20], "report.pdf", ["cut off"]),
    ],
)
def test_reports_that_are_refused(tmp_path, content, name, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run_script(
        "handin.py", "zip", "--id1", "1", "--report", name, cwd=tmp_path, check=False
    )
    assert_clean_error(result, name, *words)
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("bad", ["../1", "03 1", "Μαρία", "", "a_b"])
def test_ids_with_odd_characters_are_refused(tmp_path, report, bad):
    assert_clean_error(
        run_script("handin.py", "zip", "--id1", bad, "--report", report, cwd=tmp_path, check=False),
        "letters and digits",
    )
    assert not list(tmp_path.rglob("*.zip"))


def test_the_same_id_twice_is_refused(tmp_path, report):
    result = run_script(
        "handin.py",
        "zip",
        "--id1",
        "1",
        "--id2",
        "1",
        "--report",
        report,
        cwd=tmp_path,
        check=False,
    )
    assert_clean_error(result, "--id2")


@pytest.mark.parametrize("broken", ["step05_lstm.py", "common.py"])
def test_script_that_does_not_compile_is_refused(project, report, broken):
    (project / broken).write_text("def main(:\n")
    assert_clean_error(
        run_copy(project, "zip", "--id1", "1", "--report", report),
        broken,
        "line 1",
        "does not compile",
    )
    assert not list(project.parent.rglob("*.zip"))


def test_return_outside_a_function_is_seen(project, report):
    (project / "step05_lstm.py").write_text("return 1\n")  # parses, and does not compile
    assert_clean_error(
        run_copy(project, "zip", "--id1", "1", "--report", report),
        "step05_lstm.py",
        "does not compile",
    )


# -------------------------------------------------------------------------------- draft


@pytest.fixture
def outputs(tmp_path):
    """Outputs as two steps leave them, one with an --overfit-batch run besides."""
    import matplotlib.pyplot as plt

    def leave(name, summary, **args):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        facts = {
            "seconds": 12.3,
            "data": {"demo": False},
            "environment": {"device": "cpu", "torch": "2.x", "librosa": "0.11"},
        }
        (folder / "metrics.json").write_text(json.dumps(facts))
        (folder / "args.json").write_text(json.dumps({"smoke": False, "subset": None} | args))
        (folder / "summary.md").write_text(summary)
        return folder

    classes = [f"| genre {i} | 0.{i:03d} |" for i in range(90)]
    wide = " | ".join(f"macro_precision_{i}" for i in range(9))
    folder = leave(
        "step06_eval",
        f"""# step06_eval

## 6a, c, d. All models

**Scores**

| model | {wide} |
|{" --- |" * 10}
| beat_mel | {" | ".join(["0.409 [0.380, 0.441]"] * 9)} |

![All models](scores.png)

*All models*

## Both test sets

Sentence without a letter. [A sound](sound.mp3), and https://example.org [.1, .2] (an interval).

## 6b. Per class

{chr(10).join(["| class | F1 |", "| --- | --- |", *classes])}

![Gone](gone.png)
""",
    )
    (folder / "sound.mp3").write_bytes(b"some sound")
    fig, ax = plt.subplots(figsize=(12, 30))  # taller than a page
    ax.plot([0, 1])
    fig.savefig(folder / "scores.png", dpi=60)
    plt.close(fig)
    leave(
        "step05_lstm",
        "# step05_lstm\n\n## 5c-f. Training\n\nSix LSTMs: ρ ≥ 0.5, <not a tag> & *so on*.\n\n```\n#"
        " no heading\n```\n\n- one\n  - two\n",
    )
    leave(
        "step04_dataset",
        "# step04_dataset\n\n## 4b, 4c. Samples per class\n\n## Audit of the arrays\n\nNone is"
        " broken.\n",
    )
    leave(
        "step03_chroma",
        "# step03_chroma\n\nBefore all headings.\n\n## 3, as 2a. Dimensions\n\n12 rows.\n",
    )
    leave(
        "step05_lstm_overfit",
        "# step05_lstm\n\n## 5b. Overfitting\n\nLearned by heart.\n",
        subset=64,
    )
    return tmp_path / "outputs"


def section(text, heading):
    return text.split(f"\n### {heading}. ")[1].split("\n### ")[0].split("\n## ")[0]


def test_draft_puts_measurements_under_the_labs_questions(outputs):
    run_script("handin.py", "draft", cwd=outputs.parent)
    text = (outputs.parent / "report_draft.md").read_text()
    labels = re.findall(r"^### (\d+[a-h]?)\. ", text, re.MULTILINE)
    expected = (
        "0 1a 1b 1c 2a 2b 3 4a 4b 4c 5a 5b 5c 5d 5e 5f 6a 6b 6c 6d 6 7a 7b 7c 7d 7e 8a 8b 8c 8d 8e"
        " 9a 9b 9c 9d 9e 10a 10b 10c 10d 11a 11b 11c 11d"
    )
    assert labels == expected.split()  # every lettered item of the lab, in its order
    assert text.count("> **✎ Own words (") == len(labels)
    assert "Learned by heart." in section(text, "5b")
    assert "Six LSTMs" in section(text, "5c") and "under 5c" in section(text, "5f")
    assert "| beat_mel | 0.409 [0.380, 0.441] |" in section(text, "6a")
    assert "Sentence without a letter." in section(text, "6a")  # it belongs to the item before it
    assert "![All models](<outputs/step06_eval/scores.png>)" in section(text, "6a")
    assert "under 6a" in section(text, "6d") and "genre 89" in section(text, "6b")
    assert "under 4b" in section(text, "4c") and "None is broken." in section(text, "4b")
    assert "#### Dimensions\n\n12 rows." in section(text, "3") and text.index(
        "Before all headings."
    ) < text.index("### 3. ")
    assert "figure missing" in section(text, "6b")
    assert "[A sound](<outputs/step06_eval/sound.mp3>)" in text
    assert "https://example.org [.1, .2] (an interval)" in text
    assert "python step01_spectrograms.py" in text  # not run yet
    assert "python step06_eval.py" not in text
    assert (
        "step 5 trained on a few clips only" in text
        and "forbids publishing" in text.split("---\n\n## Step 1")[0]
    )


def test_draft_never_overwrites_what_a_student_wrote(outputs):
    draft = outputs.parent / "report_draft.md"
    run_script("handin.py", "draft", cwd=outputs.parent)
    run_script("handin.py", "draft", cwd=outputs.parent)  # untouched: made anew
    draft.write_text(draft.read_text().replace("✎ Own words (5b):", "The loss falls to"))
    before = draft.read_text()
    assert_clean_error(
        run_script("handin.py", "draft", cwd=outputs.parent, check=False),
        "report_draft.md",
        "written on",
        "--to",
    )
    assert draft.read_text() == before


def test_draft_pdf_renders_wide_tables_tall_figures_and_signs(outputs):
    run_script("handin.py", "draft", cwd=outputs.parent)
    pdf = (outputs.parent / "report_draft.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type /Page\b", pdf)) > 6
    # Handing in the draft as it is gets a word of warning; a filled one does not.
    result = run_script(
        "handin.py", "zip", "--id1", "1", "--report", "report_draft.pdf", cwd=outputs.parent
    )
    assert re.search(r"draft with \d\d places", result.stderr)
    draft = outputs.parent / "report_draft.md"
    draft.write_text(draft.read_text().replace("✎ Own words", "Ours"))
    run_script("handin.py", "pdf", "report_draft.md", "--to", "report.pdf", cwd=outputs.parent)
    assert (
        run_script(
            "handin.py", "zip", "--id1", "1", "--report", "report.pdf", cwd=outputs.parent
        ).stderr
        == ""
    )


def test_without_the_pdf_packages_the_markdown_is_made_all_the_same(outputs):
    blocked = outputs.parent / "blocked"
    blocked.mkdir()
    (blocked / "markdown_it.py").write_text("raise ModuleNotFoundError('no', name='markdown_it')\n")
    result = run_script("handin.py", "draft", cwd=outputs.parent, PYTHONPATH=str(blocked))
    assert (outputs.parent / "report_draft.md").is_file() and not (
        outputs.parent / "report_draft.pdf"
    ).exists()
    assert [line for line in result.stderr.splitlines() if line] == [
        "no PDF: markdown_it is missing; pip install markdown-it-py reportlab"
    ]
    assert_clean_error(
        run_script(
            "handin.py",
            "pdf",
            "report_draft.md",
            cwd=outputs.parent,
            check=False,
            PYTHONPATH=str(blocked),
        ),
        "pip install",
    )


def test_draft_without_outputs_says_what_to_run(tmp_path):
    assert_clean_error(
        run_script("handin.py", "draft", cwd=tmp_path, check=False),
        "outputs",
        "run the steps first",
    )
    (tmp_path / "outputs").mkdir()
    assert_clean_error(run_script("handin.py", "draft", cwd=tmp_path, check=False), "summary.md")
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize(
    "file, flaw", [("args.json", {"smoke": True}), ("metrics.json", {"data": {"demo": True}})]
)
def test_draft_says_which_steps_are_no_results(outputs, file, flaw):
    path = next(outputs.glob(f"step05*/{file}"))
    path.write_text(json.dumps(json.loads(path.read_text()) | flaw))
    run_script("handin.py", "draft", cwd=outputs.parent)
    words = "step 5 ran with --smoke" if "smoke" in flaw else "step 5 ran on synthesised demo data"
    assert words in (outputs.parent / "report_draft.md").read_text()


def test_a_draft_elsewhere_finds_its_figures(outputs):
    """Paths lead from the draft, wherever the command was given."""
    draft = outputs.parent / "reports" / "draft.md"
    run_forked("handin.py", "draft", "--to", draft, cwd=outputs.parent)
    (target,) = re.findall(r"!\[All models\]\(<(.+?)>\)", draft.read_text())
    assert (draft.parent / target).resolve() == outputs / "step06_eval" / "scores.png"


def test_code_may_hold_any_sign(tmp_path):
    """A class named <b>, in backticks, would else end the PDF."""
    assert handin.render_pdf("Ranked `x <y> & z` over `</font>`.\n", tmp_path).startswith(b"%PDF-")
