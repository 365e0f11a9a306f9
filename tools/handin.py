"""From outputs to what the course wants: a draft of the report, and the zip.

    python -m tools.handin draft                                      # -> report_draft.md
    python -m tools.handin draft --to report.docx --lang el --name1 "Μαρία Νίκα" --id1 03100001
    python -m tools.handin convert report_draft.md --to report.pdf    # or .docx, .tex
    python -m tools.handin zip --id1 03100001 --id2 03100002 --report report.pdf

The draft asks the lab's questions in order. Under each question stand the table and the figure that
answer it, and a marked box for your own words. The rest is in each step's summary.md. A draft
is made as Markdown (.md), Word (.docx), LaTeX (.tex, for XeLaTeX or LuaLaTeX) or PDF.

Markdown needs no package; Word and LaTeX need pypandoc_binary, PDF also needs typst, and zip needs
pypdf to see whether a report still has empty boxes (requirements-dev.txt).
"""

import collections
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
import zipfile
from pathlib import Path

import pandas as pd

from patrec.errors import InputError, end_in_one_line
from patrec.files import make_folder, write_bytes, write_text
from patrec.flags import Parser
from patrec.tables import markdown_table
from tools.render import RENDER, need
from tools.report_text import (
    GREEK_TITLES,
    LANGUAGES,
    LINKS,
    PAPERS,
    QUESTIONS,
    TITLE_PAGE,
    WORDS,
)
from tools.steps import STEPS

HERE = Path(__file__).resolve().parents[1]
HANDED_IN = ["*.py", "patrec/*.py", "tools/*.py", "tools/report.docx"]
HANDED_IN += ["README.md", "requirements.txt"]

# ======================================================================================
# zip: the scripts with their folders, and the report
# ======================================================================================


def zip_name(ids) -> str:
    """The file name that the course wants, of one or two registration numbers."""
    for text in ids:
        if not re.fullmatch("[A-Za-z0-9]+", text):
            cure = "without a number, write FirstNameLastName"
            raise InputError(f"id {text!r}: only Latin letters and digits are allowed; {cure}")
    if len(set(ids)) < len(ids):
        raise InputError(f"--id1 and --id2 are both {ids[0]}; leave out --id2 if you work alone")
    return f"patrec_{'_'.join(ids)}.zip"


def letters(text) -> str:
    """Programs that write PDF break lines and compose accents in ways of their own."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isalnum())


def count_boxes(text) -> int:
    """How many boxes for own words a text still has, in either language."""
    marks, lists = (
        "|".join(letters(words[key]) for words in WORDS.values()) for key in ("own", "sources")
    )
    return len(re.findall(rf"(?:{marks})(?:\d|{lists})", letters(text)))


def read_pdf(path) -> bytes:
    try:
        pdf = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the report's PDF in --report") from None
    if not (pdf.startswith(b"%PDF-") and b"%%EOF" in pdf[-2048:]):
        raise InputError(f"{path}: is no whole PDF; export the report as .pdf again")
    return pdf


def text_of(pdf, path) -> str:
    pypdf = need("pypdf", "pypdf")
    try:
        return "".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages)
    except Exception as error:  # a PDF may be damaged in many ways
        cure = "export it again, or pack it with --anyway"
        raise InputError(f"{path}: not readable as PDF ({error!r}); {cure}") from None


def make_zip(args):
    target = args.out_dir / zip_name([text for text in (args.id1, args.id2) if text is not None])
    pdf = read_pdf(args.report)
    if not args.anyway and (left := count_boxes(text_of(pdf, args.report))):
        fault = f"still has {left} boxes for your own words"
        raise InputError(f"{args.report}: {fault}; fill them, or pack it with --anyway")

    def pack(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in [path for pattern in HANDED_IN for path in sorted(HERE.glob(pattern))]:
                archive.write(path, path.relative_to(HERE))
            archive.writestr(args.report.name, pdf)
            archive.printdir()

    make_folder(args.out_dir)
    write_bytes(target, pack)
    print(f"{target}: {target.stat().st_size:,} bytes")


# ======================================================================================
# What the steps measured, by item of the lab
# ======================================================================================

# By item: what the draft shows, where that is not simply the item's first table and figure.
MODELS = {  # these rows of the step's first table with the test accuracy
    "5c": ("mel", "plain_mel"),
    "5d": ("beat_mel",),
    "5e": ("chroma", "beat_chroma"),
    "5f": ("fused", "beat_fused"),
    "7b": ("cnn_mel",),
}
FIGURES = {"2a": "lstm_cost.png", "7c": "block_operations.png"}
SOURCE_CODE = ("5a", "7b", "10b")  # items that ask about it
FENCE = re.compile(r"^```(\w*)\n.*?^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\*\*.+\*\*\n\n)?^\|.*\|\n\| ---.*\n(?:^\|.*\|(?:\n|\Z))+", re.MULTILINE)
FIGURE = re.compile(r"^!\[(.*)\]\((.+)\)$", re.MULTILINE)


def read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def sections_by_item(summary) -> dict[str, str]:
    """What a summary.md shows under each of the lab's items.

    A heading may name several: '5c-f. ...' is 5c's. One without an item belongs to the item
    before it.
    """
    found, item, fenced = collections.defaultdict(str), "", False
    for line in summary.splitlines(keepends=True):
        fenced ^= line.startswith("```")  # code may have lines that look like headings
        if line.startswith("## ") and not fenced:
            named = re.match(r"## ((\d+)[a-h]?)\b", line)
            item = next((n for n in named.groups() if n in QUESTIONS), item) if named else item
        else:
            found[item] += line
    return found


def scores_by_class(folder, words) -> str:
    """Item 6b: precision, recall and F1 of each class for the best LSTM."""
    metrics = read_json(folder / "metrics.json")
    best = metrics.get("best_by_validation")
    if best not in metrics["runs"]:  # outputs of an older edition
        return ""
    scores = pd.DataFrame(metrics["runs"][best]["test"]["per_class"]).T.rename_axis("class")
    table = markdown_table(scores.astype({"support": int}))
    return f"**{words['per class'].format(best)}**\n\n{table}\n"


def answer(item, found, folder) -> list[str]:
    """The source code, the table and the figure that the draft shows for an item."""
    code = [block[0] for block in FENCE.finditer(found[item]) if block[1] == "python"]
    own = FENCE.sub("", found[item])
    tables, figures = TABLE.findall(own), FIGURE.findall(own)
    if item in MODELS:
        tables = rows_of(MODELS[item], "".join(found.values())) or tables
    figures.sort(key=lambda figure: figure[1] != FIGURES.get(item))  # that one first
    parts = code if item in SOURCE_CODE else []
    parts += [table.strip() for table in tables[:1]]
    return parts + [f"![{words}](<{folder}/{name}>)\n\n*{words}*" for words, name in figures[:1]]


def rows_of(models, summary) -> list[str]:
    """The tables of test accuracies, with the rows of some models only."""
    tables = []
    for table in TABLE.findall(summary):
        head, rule, rows = re.split(r"^(\| ---.*\n)", table, flags=re.MULTILINE)
        chosen = [row for row in rows.splitlines() if row.split("|")[1].strip() in models]
        if chosen and "| test accuracy |" in head:
            tables.append(head + rule + "\n".join(chosen))
    return tables


# ======================================================================================
# draft: outputs -> one Markdown document
# ======================================================================================


def find_folder(outputs, script) -> Path | None:
    """The folder of a step that has finished: it writes metrics.json last.

    What --overfit-batch leaves counts as long as there is no full run, which has that check too.
    """
    folders = (outputs / script, outputs / script / "overfit_batch")
    return next((folder for folder in folders if (folder / "metrics.json").is_file()), None)


def flaws_of(folder) -> list[str]:
    """Reasons why the outputs of a step are no result."""
    if folder is None:
        return ["not run"]
    metrics, args = (read_json(folder / name) for name in ("metrics.json", "args.json"))
    args["demo"] = metrics["data"]["demo"]
    return [flaw for flaw in ("demo", "smoke", "subset") if args.get(flaw)]


def chapter(number, folder, base, lang) -> str:
    """One step of the lab; folder None: it has not run."""
    words, step = WORDS[lang], STEPS[number]
    title = step.title if lang == "en" else GREEK_TITLES[number]
    parts = [f"## {words['step']} {number}. {title}"]
    found, place = collections.defaultdict(str), ""
    if folder:
        place = Path(os.path.relpath(folder, base)).as_posix()
        found = sections_by_item((folder / "summary.md").read_text(encoding="utf-8"))
        if number == 6:
            found["6b"] = scores_by_class(folder, words) + found["6b"]
    else:
        parts.append(f"**{words['not run']}:** `python {step.script}.py`")
    for item, question in QUESTIONS.items():
        if (int(item.rstrip("abcdef")) or 1) == number:  # 0, the data folder, is in step 1
            parts += [f"### {item}. {question[lang]}", *answer(item, found, place)]
            parts.append(f"> **{words['own']} ({item}):** …")
    if folder:
        parts.append(f"*{words['more']}:* `{place}/summary.md`")
    return "\n\n".join(parts)


def title_page(args, folders) -> str:
    """Title, course, names and numbers, the notice that this is a draft, and what it lacks."""
    words = WORDS[args.lang]
    people = {key: getattr(args, key) or "." * 30 for key in ("name1", "id1", "name2", "id2")}
    parts = [TITLE_PAGE[args.lang].format(**people).rstrip()]
    flaws = {number: flaws_of(folder) for number, folder in folders.items()}
    for flaw in ("not run", "demo", "smoke", "subset"):
        if steps := [str(number) for number in folders if flaw in flaws[number]]:
            parts.append(f"> **{words[flaw]}:** {words['step']} {', '.join(steps)}")
    return "\n\n".join([*parts, "---"])


def sources(words, text) -> str:
    """The lab's links, and the papers that a text names by first author and year."""
    flat, papers = " ".join(text.split()), []
    for (name, year), paper in PAPERS.items():
        if re.search(rf"\b{name}\b[^.;]{{0,40}}(?:al\.)?,? \(?{year}\b", flat):
            papers.append(paper)
    return "\n".join(
        [
            f"## {words['sources']}\n",
            f"> **{words['own']} ({words['sources']}):** {words['used']} …\n",
            f"### {words['links']}\n",
            *(f"- \\[{number}\\] <{link}>" for number, link in enumerate(LINKS)),
            f"\n### {words['papers']}\n",
            *papers,
        ]
    )


def make_draft(args):
    outputs, base = args.out_dir.resolve(), args.to.resolve().parent
    folders = {number: find_folder(outputs, step.script) for number, step in STEPS.items()}
    summaries = [f / "summary.md" for f in folders.values() if f]
    if not summaries:
        cure = "run a step first, e.g. python step01_spectrograms.py, or name the folder"
        raise InputError(f"{args.out_dir}: holds no outputs of a step; {cure} in --out-dir")
    chapters = [chapter(number, f, base, args.lang) for number, f in folders.items()]
    named = [question["en"] for question in QUESTIONS.values()]
    named += [path.read_text(encoding="utf-8") for path in summaries]
    parts = [title_page(args, folders), *chapters, sources(WORDS[args.lang], "\n".join(named))]
    text = "\n\n".join(parts) + "\n"
    save_report(text, base, args.to)
    boxes = count_boxes(text)
    print(f"{args.to}: {len(summaries)} of {len(STEPS)} steps, {boxes} boxes for your own words")


def save_report(text, base, target):
    """Write a report in the format of its name, but never over a file that was edited since.

    A hidden file in the same folder keeps the checksum of what was written.
    """
    form, memory = target.suffix.lower(), target.parent / ".handin.json"
    if form not in RENDER:
        raise InputError(f"--to {target}: the name must end in {', '.join(RENDER)}")
    made = read_json(memory) if memory.exists() else {}
    if target.exists() and made.get(target.name) != checksum(target.read_bytes()):
        cure = "name another file in --to, or move it away"
        raise InputError(f"{target}: was not made here, or was changed since; {cure}")
    make_folder(target.parent)
    try:
        data = RENDER[form](text, base, target)
    except RuntimeError as error:  # of pandoc and Typst: a student's own Markdown may be at fault
        fault = " ".join(str(error).partition("stack traceback")[0].split())
        raise InputError(f"{target}: cannot be made ({fault})") from None
    write_bytes(target, lambda file: file.write(data))
    write_text(memory, json.dumps(made | {target.name: checksum(data)}, indent=1))


def checksum(data) -> str:
    return hashlib.sha256(data).hexdigest()


def convert(args):
    """A report in Markdown, written on or not -> Word, LaTeX or PDF."""
    try:
        text = args.markdown.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or error
        raise InputError(f"{args.markdown}: not readable ({fault})") from None
    save_report(text, args.markdown.resolve().parent, args.to)
    print(f"{args.to}: {count_boxes(text)} boxes for your own words left")


def main(argv=None):
    parser = Parser(prog="python -m tools.handin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    draft = commands.add_parser("draft", help="gather outputs/ into a report to write on")
    draft.flag("--out-dir", "where the steps wrote", type=Path, default=Path("outputs"))
    draft.flag(
        "--to", "the draft: .md, .docx, .tex or .pdf", type=Path, default=Path("report_draft.md")
    )
    draft.flag("--lang", "language of the report", choices=LANGUAGES, default="en")
    for number in "12":
        draft.flag(f"--name{number}", f"name of partner {number} for the title page")
        draft.flag(f"--id{number}", f"registration number of partner {number}")
    other = commands.add_parser("convert", help="turn a report in Markdown into another form")
    other.add_argument("markdown", type=Path, help="the report, e.g. report_draft.md")
    other.flag("--to", "the new file: .docx, .tex or .pdf", type=Path, required=True)
    archive = commands.add_parser("zip", help="pack scripts and report as the course wants")
    archive.flag("--id1", "registration number of partner 1, or FirstNameLastName", required=True)
    archive.flag("--id2", "of partner 2")
    archive.flag("--report", "the report as PDF, made by any program", type=Path, required=True)
    archive.flag("--anyway", "pack a report that still has boxes too", action="store_true")
    archive.flag("--out-dir", "where the zip goes", type=Path, default=Path())
    args = parser.parse_args(argv)
    {"draft": make_draft, "convert": convert, "zip": make_zip}[args.command](args)


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
