"""From outputs to what the course wants: a report to write on, and the zip.

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

import argparse
import functools
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

from patrec.errors import InputError, end_in_one_line
from patrec.files import make_folder, write_bytes, write_text
from patrec.flags import Parser
from tools.render import FIGURE, RENDER, need
from tools.report_text import LINKS, PAPERS, WORDS, chapter_words
from tools.steps import STEPS

HERE = Path(__file__).resolve().parents[1]


def check_ids(*ids) -> list[str]:
    """The registration numbers that were given; as the course's file name wants them."""
    ids = [text for text in ids if text is not None]
    for text in ids:
        if not re.fullmatch("[A-Za-z0-9]+", text):
            cure = "without a number, write FirstNameLastName"
            raise InputError(f"id {text!r}: only Latin letters and digits are allowed; {cure}")
    if len(set(ids)) < len(ids):
        raise InputError(f"--id1 and --id2 are both {ids[0]}; leave out --id2 if you work alone")
    return ids


# ======================================================================================
# zip: the scripts with their folders, and the report
# ======================================================================================


def files_to_hand_in() -> list[Path]:
    """The code in its folders, so that it runs after unpacking; every script compiles."""
    scripts = [path for part in ("", "patrec", "tools") for path in (HERE / part).glob("*.py")]
    for path in scripts:
        try:
            compile(path.read_bytes(), str(path), "exec")
        except (SyntaxError, ValueError) as error:
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            fault = getattr(error, "msg", error)
            raise InputError(f"{path}{where}: does not compile ({fault}); mend it first") from None
    return sorted(scripts) + [HERE / name for name in ("README.md", "requirements.txt")]


def read_report(path) -> bytes:
    """The report's bytes, if it is a whole PDF."""
    try:
        pdf = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the report's PDF in --report") from None
    if not pdf.startswith(b"%PDF-") or path.suffix.lower() != ".pdf":
        raise InputError(f"{path}: is no PDF; the course wants the report as .pdf")
    if b"%%EOF" not in pdf[-2048:]:
        raise InputError(f"{path}: the PDF is cut off at its end; export it again")
    return pdf


def count_boxes(text) -> int:
    """How many boxes for own words a text still has, in either language.

    Spaces and accents do not count: programs that write PDF break lines and compose accents
    in ways of their own.
    """
    marks, items = (
        "|".join(words[key] for words in WORDS.values()) for key in ("own", "sources item")
    )
    pattern = rf"(?:{marks})\((?:\d+[a-h]?|{items})\)"
    plain, pattern = (
        "".join(c for c in unicodedata.normalize("NFKD", part) if not unicodedata.combining(c))
        for part in ("".join(text.split()), "".join(pattern.split()))
    )
    return len(re.findall(pattern, plain))


def make_zip(args):
    ids = check_ids(args.id1, args.id2)
    pdf = read_report(args.report)
    if not args.anyway:
        pypdf = need("pypdf", "pypdf")
        try:
            pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages]
        except Exception as error:  # a PDF may be damaged in many ways
            fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            cure = "export it again, or pack it with --anyway"
            raise InputError(f"{args.report}: not readable as PDF ({fault}); {cure}") from None
        if left := count_boxes("".join(pages)):
            fault = f"still has {left} boxes for your own words"
            raise InputError(f"{args.report}: {fault}; fill them, or pack it with --anyway")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files_to_hand_in():
            archive.write(path, path.relative_to(HERE))
        archive.writestr(args.report.name, pdf)
        listing = [(info.file_size, info.filename) for info in archive.infolist()]
    target = args.out_dir / f"patrec_{'_'.join(ids)}.zip"
    make_folder(args.out_dir)
    write_bytes(target, lambda file: file.write(buffer.getbuffer()))
    print("\n".join(f"{size:>10,}  {name}" for size, name in listing))
    print(f"{target}: {len(listing)} files, {len(buffer.getvalue()):,} bytes")


# ======================================================================================
# What the steps measured, by item of the lab
# ======================================================================================


class Table(NamedTuple):
    caption: str
    rows: list[list[str]]  # the header first


class Found(NamedTuple):
    """What a step's summary.md shows under one item."""

    tables: list[Table]
    figures: list[tuple[str, Path]]  # caption, file
    code: list[str]


class Answer(NamedTuple):
    """What the draft shows for an item, where that is not simply the first table and figure.

    column, rows : the step's first table that has this column, and of it only these rows
    figure : name of the figure's file
    code : whether the item asks about the source code
    """

    column: str = ""
    rows: tuple[str, ...] = ()
    figure: str = ""
    code: bool = False


ANSWERS = {
    "2a": Answer(figure="lstm_cost"),
    "5a": Answer(code=True),
    "5c": Answer("test accuracy", ("mel", "plain_mel")),
    "5d": Answer("test accuracy", ("beat_mel",)),
    "5e": Answer("test accuracy", ("chroma", "beat_chroma")),
    "5f": Answer("test accuracy", ("fused", "beat_fused")),
    "7b": Answer("test accuracy", ("cnn_mel",), code=True),
    "7c": Answer(figure="block_operations"),
    "10b": Answer(code=True),
}
LINE = 110  # characters that a table may be wide before its cells take several lines
FENCE = re.compile(r"^```(\w*)\n.*?^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\*\*(.+)\*\*\n\n)?((?:^\|.*\|(?:\n|\Z)){3,})", re.MULTILINE)


def read_json(path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); run its step again") from None


def sections_of(summary) -> list[tuple[str, str]]:
    """Cut a summary.md at its '## ' headings, which code may hold too: [(heading, text)]."""
    sections, fenced = [("", [])], False
    for line in summary.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            sections.append((line[3:].strip(), []))
        else:
            sections[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in sections]


def item_of(heading, questions, current) -> str | None:
    """Which of the lab's items a heading names: '6a. Accuracy' -> '6a', '5c-f. ...' -> '5c'.

    A heading without an item belongs to the item before it, `current`; before the first, to none.
    """
    match = re.match(r"(\d+)\s*([a-h])?\b", heading)
    for label in (match[1] + (match[2] or ""), match[1]) if match else ():
        if label in questions:
            return label
    return current


def read_summary(path, questions, found) -> None:
    """Add what a summary.md shows to `found`, {item: Found}."""
    current = None
    for heading, text in sections_of(path.read_text(encoding="utf-8")):
        current = item_of(heading, questions, current)
        shown = found.setdefault(current, Found([], [], []))
        shown.code.extend(match[0] for match in FENCE.finditer(text) if match[1] == "python")
        text = FENCE.sub("", text)
        for caption, lines in TABLE.findall(text):
            cells = [re.split(r" (?<!\\)\| ", f"{line} ") for line in lines.splitlines()]
            rows = [[cell.strip(" |") for cell in row] for row in cells]
            shown.tables.append(Table(caption, [rows[0], *rows[2:]]))
        shown.figures.extend((words, path.parent / name) for words, name in FIGURE.findall(text))


def table_of_classes(metrics, words) -> Table | None:
    """Item 6b: precision, recall and F1 of each class for the best LSTM."""
    best = metrics.get("best_by_validation")
    scores = metrics["runs"].get(best, {}).get("test", {}).get("per_class", {})
    names = ("precision", "recall", "f1", "support")
    rows = [
        [label, *(f"{row[key]:.3f}" for key in names[:3]), str(row["support"])]
        for label, row in scores.items()
    ]
    return Table(words["per class"].format(best), [["class", *names], *rows]) if rows else None


def choose(item, found) -> tuple[Table | None, tuple | None, list[str]]:
    """The table, the figure and the source code that the draft shows for an item."""
    want, own = ANSWERS.get(item, Answer()), found.get(item, Found([], [], []))
    table = next(iter(own.tables), None)
    for other in [t for shown in found.values() for t in shown.tables] if want.column else []:
        rows = [row for row in other.rows[1:] if row[0] in want.rows]
        if want.column in other.rows[0] and rows:
            table = Table(other.caption, [other.rows[0], *rows])
            break
    named = [figure for figure in own.figures if figure[1].stem == want.figure]
    figure = next(iter(named + own.figures), None)
    return table, figure, own.code if want.code else []


# ======================================================================================
# draft: outputs -> one Markdown document
# ======================================================================================


def markdown_of(table) -> str:
    """A table as Markdown; pandoc takes the dashes of a wide one as its columns' widths."""
    header = [name.replace("_", " ") for name in table.rows[0]]  # macro_f1 may take two lines
    columns = list(zip(header, *table.rows[1:], strict=True))
    words = [[word for cell in column for word in cell.split()] or [""] for column in columns]
    narrow = [max(map(len, column)) + 2 for column in words]
    wide = [max(map(len, column)) + 2 for column in columns]
    # What is left of a line goes to the columns that would like more.
    share = min(1.0, max(0, LINE - sum(narrow)) / max(1, sum(wide) - sum(narrow)))
    rules = []
    for low, high, (_, *cells) in zip(narrow, wide, columns, strict=True):
        numbers = sum(bool(re.match(r"[-+]?\d[^A-Za-z]{0,24}$", cell)) for cell in cells)
        dashes = "-" * round(low + share * (high - low))
        rules.append(f"{dashes}:" if numbers > len(cells) / 2 else f":{dashes}")
    lines = [header, rules, *table.rows[1:]]
    caption = f"**{table.caption}**\n\n" if table.caption else ""
    return caption + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chapter(number, outputs, base, lang) -> tuple[list[str], list[dict], str]:
    """One step of the lab: lines of Markdown, facts on each of its runs, and its summaries."""
    words, (title, questions) = WORDS[lang], chapter_words(number, lang)
    script = STEPS[number].script
    lines = [f"## {words['step']} {number}. {title}", ""]
    # The step's own folder first, then those of its other runs.
    # What --overfit-batch left beside a full run is in that run too.
    whole = sorted(outputs.glob(f"{script}*/summary.md"))
    others = sorted(outputs.glob(f"{script}*/*/summary.md"))
    summaries = whole + [p for p in others if not whole or p.parent.name != "overfit_batch"]
    found, facts = {}, []
    for path in summaries:
        metrics, args = (read_json(path.parent / name) for name in ("metrics.json", "args.json"))
        flags = {"smoke": args.get("smoke"), "subset": args.get("subset")}
        run = {"step": number, "demo": metrics["data"]["demo"], "seconds": metrics["seconds"]}
        facts.append(run | flags | metrics["environment"])
        if number == 6 and (table := table_of_classes(metrics, words)):
            found.setdefault("6b", Found([table], [], []))
        read_summary(path, questions, found)
    if not summaries:
        lines += [f"**{words['not run']}:** `python {script}.py`", ""]
    for item, question in questions.items():
        table, figure, code = choose(item, found)
        lines += [f"### {item}. {question}", "", *(f"{part}\n" for part in code)]
        if table:
            lines += [markdown_of(table), ""]
        if figure:
            caption, path = figure
            name = Path(os.path.relpath(path, base)).as_posix()
            shown = f"![{caption}](<{name}>)\n\n*{caption}*"
            lines += [shown if path.is_file() else f"*({words['lost']}: {name})*", ""]
        lines += [f"> **{words['own']} ({item}):** …", ""]
    if summaries:
        names = ", ".join(f"`{Path(os.path.relpath(p, base)).as_posix()}`" for p in summaries)
        lines += [f"*{words['more']}:* {names}", ""]
    return lines, facts, "".join(path.read_text(encoding="utf-8") for path in summaries)


def title_page(args, facts, missing) -> list[str]:
    """Title, course, names and numbers, and the notice that this is a draft."""
    words, blank = WORDS[args.lang], "." * 30
    people = zip(words["partners"], ((args.name1, args.id1), (args.name2, args.id2)), strict=True)
    rows = [[who, name or blank, number or blank] for who, (name, number) in people]
    lines = [f"# {words['title']}", "", f"**{words['course']}**", "", words["school"], ""]
    lines += [markdown_of(Table("", [["", words["name"], words["id"]], *rows])), ""]
    lines += [f"> {words['notice']}", ""]
    flaws = {flaw: [f["step"] for f in facts if f[flaw]] for flaw in ("demo", "smoke", "subset")}
    unfit = [
        f"{words['step']} {', '.join(map(str, dict.fromkeys(steps)))}: {words[flaw]}"
        for flaw, steps in flaws.items()
        if steps
    ]
    if unfit:
        lines += [f"> **{words['unfit']}.** {'; '.join(unfit)}.", ""]
    if missing:
        lines += [f"> **{words['missing']}:** {', '.join(map(str, missing))}.", ""]
    return [*lines, "---", ""]


def sources(words, text) -> list[str]:
    """The lab's links, and the papers that a text names by author and year."""
    flat = " ".join(text.split())
    papers = [
        paper
        for (name, year), paper in PAPERS.items()
        if re.search(rf"\b{name}\b[^.;]{{0,40}}(?:al\.)?,? \(?{year}\b", flat)
    ]
    lines = [f"## {words['sources']}", "", f"> **{words['own']} ({words['sources item']}):**"]
    lines[-1] += f" {words['used']} …"
    links = [f"- \\[{number}\\] <{link}>" for number, link in enumerate(LINKS)]
    lines += ["", f"### {words['links']}", "", *links, ""]
    return [*lines, f"### {words['papers']}", "", *(f"- {paper}" for paper in papers), ""]


def make_draft(args):
    check_ids(args.id1, args.id2)
    for name in (args.name1, args.name2):
        if name is not None and not re.fullmatch(r"[^\W\d_]+(?:[ .'’-]+[^\W\d_]+)*\.?", name):
            raise InputError(f"name {name!r}: only letters, spaces, hyphens and dots are allowed")
    outputs, base, words = args.out_dir.resolve(), args.to.resolve().parent, WORDS[args.lang]
    chapters = {number: chapter(number, outputs, base, args.lang) for number in STEPS}
    facts = [run for _, runs, _ in chapters.values() for run in runs]
    if not facts:
        cure = "run a step first, e.g. python step01_spectrograms.py, or name the folder"
        raise InputError(f"{args.out_dir}: holds no outputs of a step; {cure} in --out-dir")
    missing = [number for number, (_, runs, _) in chapters.items() if not runs]
    lines = title_page(args, facts, missing)
    for text, *_ in chapters.values():
        lines += text
    lines += [
        f"## {words['origin']}",
        "",
        words["origin columns"],
        "| ---: | --- | --- | --- | ---: |",
    ]
    for f in facts:
        device = f.get("gpu", f["device"])
        row = f"| {f['step']} | {device} | {f['torch']} | {f['librosa']} | {f['seconds']:.0f} s |"
        lines.append(row)
    questions = [q for step in STEPS.values() for q in step.questions.values()]
    named = "\n".join([*questions, *(summary for *_, summary in chapters.values())])
    text = "\n".join([*lines, "", *sources(words, named)])
    save_report(text, base, args.to)
    done, boxes = len(STEPS) - len(missing), count_boxes(text)
    print(f"{args.to}: {done} of {len(STEPS)} steps, {boxes} boxes for your own words")


def save_report(text, base, target):
    """Write a report in the form that its name asks for, but never over what was edited since.

    What was made is remembered by its checksum in a hidden file beside it.
    """
    form, memory = target.suffix.lower(), target.parent / ".handin.json"
    if form not in RENDER:
        raise InputError(f"--to {target}: the name must end in {', '.join(RENDER)}")
    try:
        made = json.loads(memory.read_text())
    except (OSError, ValueError):
        made = {}
    if target.exists() and made.get(target.name) != checksum(target.read_bytes()):
        cure = "name another file in --to, or move it away"
        raise InputError(f"{target}: was not made here, or was changed since; {cure}")
    make_folder(target.parent)
    try:
        data = RENDER[form](text, base, target)
    except RuntimeError as error:  # of pandoc and Typst: a student's own Markdown may be at fault
        raise InputError(f"{target}: cannot be made ({' '.join(str(error).split())})") from None
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
    form = argparse.RawDescriptionHelpFormatter
    make = functools.partial(Parser, allow_abbrev=False, formatter_class=form)
    parser = make(prog="python -m tools.handin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=make)
    draft = commands.add_parser("draft", help="gather outputs/ into a report to write on")
    draft.flag("--out-dir", "where the steps wrote", type=Path, default=Path("outputs"))
    draft.flag(
        "--to", "the draft: .md, .docx, .tex or .pdf", type=Path, default=Path("report_draft.md")
    )
    draft.flag("--lang", "language of the report", choices=list(WORDS), default="en")
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
