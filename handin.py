"""From outputs to what the course wants: a report to write on, and the zip.

    python handin.py draft                    # outputs/ -> report_draft.md and report_draft.pdf
    python handin.py pdf report_draft.md      # after writing on it: the PDF anew
    python handin.py zip --id1 03100001 --id2 03100002 --report report.pdf

The draft holds the lab's questions in order, the tables and figures that the steps left,
and marked room for one's own words. It is a start and no report: the course asks for the
students' own work, and forbids publishing solutions.

The PDF needs two packages besides (requirements-dev.txt): markdown-it-py and reportlab.
"""

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import uuid
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent

# Step -> its title and what the lab asks there, by letter, in short.
LAB = {
    1: (
        "Mel spectrograms",
        {
            "0": "What does the data folder hold, and what does a GPU change?",
            "1a": "Which two clips of different genres were drawn?",
            "1b": "How are their mel spectrograms read, and what do the arrays hold?",
            "1c": "What do the two pictures tell, and how do the two genres differ in them?",
        },
    ),
    2: (
        "Beat-synchronised spectrograms",
        {
            "2a": "How many time steps has a spectrogram, is an LSTM efficient on them, and why?",
            "2b": "What changes when frames are joined beat by beat?",
        },
    ),
    3: (
        "Chromagrams",
        {
            "3": (
                "Steps 1 and 2 again with chromagrams: what do they show, what does the beat"
                " change?"
            ),
        },
    ),
    4: (
        "The data set and its classes",
        {
            "4a": (
                "What does the PyTorch Dataset do, operation by operation, and what does it return?"
            ),
            "4b": "Which classes are merged, which are dropped, and why?",
            "4c": "How many clips has each class before and after that?",
        },
    ),
    5: (
        "Genre recognition with LSTMs",
        {
            "5a": "How does the LSTM of the second lab read these spectrograms?",
            "5b": "Can the network learn a few batches by heart, and what does that prove?",
            "5c": "An LSTM on mel spectrograms",
            "5d": "An LSTM on beat-synchronised spectrograms",
            "5e": "An LSTM on chromagrams",
            "5f": "An LSTM on spectrograms and chromagrams together (extra credit)",
        },
    ),
    6: (
        "Evaluation",
        {
            "6a": "Accuracy of every model on the test sets",
            "6b": "Precision, recall and F1 of each class",
            "6c": "Their macro averages",
            "6d": "Their micro averages",
            "6": (
                "What does each metric tell, when do they disagree, and which one suits this task?"
            ),
        },
    ),
    7: (
        "Genre recognition with a 2D CNN",
        {
            "7a": "What does a CNN respond to, layer by layer? (screenshots of ConvNetJS, digits)",
            "7b": "How well does a CNN of four layers recognise genres?",
            "7c": "What are convolution, batch normalisation, ReLU and max pooling for?",
            "7d": "Can the CNN learn a few batches by heart?",
            "7e": "How does the CNN compare with the LSTM of 5a?",
        },
    ),
    8: (
        "Emotion by regression",
        {
            "8a": "How do the best LSTM and the CNN become regressors?",
            "8b": "Valence",
            "8c": "Energy",
            "8d": "Danceability",
            "8e": "Mean Spearman correlation over the three axes",
        },
    ),
    9: (
        "Transfer learning",
        {
            "9a": "What does the paper on transferable features conclude? (Yosinski et al., 2014)",
            "9b": "Which model was chosen for the transfer, and why?",
            "9c": "Which epoch was kept, judged by which metric on which set, and why?",
            "9d": "Fine-tuning on one axis of emotion",
            "9e": "How do the results compare with step 8?",
        },
    ),
    10: (
        "Multitask learning",
        {
            "10a": (
                "What does the paper on one model for many tasks conclude? (Kaiser et al., 2017)"
            ),
            "10b": "How does the loss join the three axes, and how are they weighted?",
            "10c": "Training one model for all three axes",
            "10d": "How do the results compare with step 8?",
        },
    ),
    11: (
        "Latent representations (optional)",
        {
            "11a": "Which vectors are taken from which models?",
            "11b": "How far does PCA separate the genres, and how do the models' spaces differ?",
            "11c": "What is different with the worst LSTM of step 5?",
            "11d": "Which other method of dimensionality reduction serves these data best?",
        },
    ),
}
ROOM = "✎ Own words"  # marks what a student still has to write
NOTICE = (
    "**This is a draft that a program put together.** Tables and figures were measured by the"
    " scripts; the sentences between them come from the scripts too. The course grades the own"
    " work of the one or two people named above: check every statement, say things in your own"
    f" words in place of every *{ROOM}*, name the sources you used, and delete this box. The course"
    " forbids publishing solutions of the lab, on GitHub or anywhere else."
)


def stop(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """A mistyped flag is bad input too: one line, without the usage before it."""

    def error(self, message):
        stop(f"{message}; --help lists all flags")


def write(path, data, cure="name another place"):
    """Write bytes whole or not at all; kaggle_kernel.py writes with it too."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # there may not even be a folder
            partial.unlink()
        stop(f"{path}: {error.strerror}; {cure}")


# ======================================================================================
# zip: scripts + report
# ======================================================================================


def scripts_to_hand_in() -> list[Path]:
    """The steps and whatever of this folder they import or run; no tools, no tests.

    make_dataset.py comes along because common.py runs it where no data set is found, so
    that the unpacked zip runs by itself.
    """
    files = sorted(HERE.glob("step[0-9][0-9]_*.py"))
    if not files:
        stop(f"{HERE}: no step scripts beside handin.py")
    files += [path for path in (HERE / "common.py", HERE / "make_dataset.py") if path.exists()]
    for path in files:  # grows while it runs: what a file imports is looked through too
        try:
            tree = ast.parse(path.read_bytes(), str(path))
            compile(tree, str(path), "exec")
        except (SyntaxError, ValueError) as error:
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            stop(
                f"{path}{where}: does not compile ({getattr(error, 'msg', error)}); mend it before"
                " you hand it in"
            )
        for node in ast.walk(tree):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            local = [HERE / f"{name.split('.')[0]}.py" for name in names if name]
            files += [path for path in local if path.exists() and path not in files]
    return sorted(files)


def make_zip(args):
    ids = [name for name in (args.id1, args.id2) if name is not None]
    for name in ids:
        if not re.fullmatch("[A-Za-z0-9]+", name):
            stop(
                f"id {name!r}: only Latin letters and digits, as the course's file name wants (no"
                " number yet: FirstNameLastName)"
            )
    if len(set(ids)) < len(ids):
        stop(f"--id1 and --id2 are both {ids[0]}; leave out --id2 if you work alone")
    try:
        pdf = args.report.read_bytes()
    except OSError as error:
        stop(f"{args.report}: {error.strerror}; give the report's PDF in --report")
    if not pdf.startswith(b"%PDF-") or args.report.suffix.lower() != ".pdf":
        stop(
            f"{args.report}: no PDF; the course wants the report as .pdf (no .ipynb, .html, .docx)"
        )
    if b"%%EOF" not in pdf[-2048:]:
        stop(f"{args.report}: the PDF is cut off at its end; export it again")
    if open_places := re.search(rb"places for own words left: (\d+)", pdf):
        print(
            f"careful: {args.report} is a draft with {int(open_places[1])} places still to fill",
            file=sys.stderr,
        )

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*scripts_to_hand_in(), args.report]:
            archive.write(path, path.name)
        listing = [(info.file_size, info.filename) for info in archive.infolist()]
    target = args.out_dir / f"patrec_{'_'.join(ids)}.zip"
    write(target, buffer.getvalue())
    print("\n".join(f"{size:>10,}  {name}" for size, name in listing))
    print(f"{target}: {len(listing)} files, {len(buffer.getvalue()):,} bytes")


# ======================================================================================
# draft: outputs -> one Markdown document
# ======================================================================================


def read_json(path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        stop(f"{path}: not readable ({error}); run its step again")


def sections_of(summary) -> list[tuple[str, str]]:
    """Cut a summary.md at its '## ' headings: [(heading, text)], '' for what precedes them."""
    sections, fenced = [("", [])], False
    for line in summary.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("# ") and not fenced:
            continue  # the file's title; the draft has its own
        if line.startswith("## ") and not fenced:
            sections.append((line[3:].strip(), []))
        else:
            sections[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in sections]


def item_of(heading, items, number, current) -> str | None:
    """Which of the lab's items a heading names: '6a, c, d. All models' -> '6a'.

    A heading without a letter belongs to the item before it.
    """
    match = re.match(r"(\d+)\s*\(?([a-h])?\b", heading)
    for label in (match[1] + (match[2] or ""), match[1]) if match else ():
        if label in items:
            return label
    if match and int(match[1]) == number and not match[2]:
        return next(iter(items))
    return current


def letters_of(heading) -> list[str]:
    """All items that a heading names: '5c-f. Training' -> 5c, 5d, 5e, 5f; '4b, 4c.' -> 4b, 4c."""
    match = re.match(r"(\d+)\s*\(?([a-h](?:\s*(?:,|-|–|and|to)\s*\d*[a-h]\b)*)", heading)
    if not match:
        return []
    named = []
    for first, last in re.findall(r"([a-h])\b(?:\s*(?:-|–|to)\s*([a-h])\b)?", match[2]):
        named += [chr(code) for code in range(ord(first), ord(last or first) + 1)]
    return [match[1] + letter for letter in named]


def place_figures(text, folder, base) -> str:
    """Make paths of figures, sounds and pages relative to the draft; name missing figures."""

    def place(match):
        mark, words, target = match.groups()
        path = Path(os.path.relpath(folder / target, base)).as_posix()
        if (folder / target).is_file():
            return f"{mark}[{words}](<{path}>)"
        return f"*(figure missing: {path})*" if mark else match[0]

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)]+)\)", place, text)


def step_chapter(number, outputs, base) -> tuple[list[str], list[dict]]:
    """One step of the lab as lines of Markdown, and facts on each of its runs."""
    title, items = LAB[number]
    script = next(iter(sorted(HERE.glob(f"step{number:02d}_*.py"))), None)
    stem = script.stem if script else f"step{number:02d}"
    lines = [f"## Step {number}. {title}", ""]
    # The step's own folder first, then those of its other runs.
    # What --overfit-batch left beside a full run is in that run too.
    whole = sorted(outputs.glob(f"{stem}*/summary.md"))
    others = [
        path
        for path in sorted(outputs.glob(f"{stem}*/*/summary.md"))
        if not whole or path.parent.name != "overfit_batch"
    ]
    summaries = whole + others
    found, facts, covered, preface = {}, [], {}, []
    for summary in summaries:
        folder, current = summary.parent, None
        metrics, args = read_json(folder / "metrics.json"), read_json(folder / "args.json")
        facts.append(
            {
                "step": number,
                "demo": metrics["data"]["demo"],
                "smoke": args.get("smoke"),
                "subset": args.get("subset"),
                "seconds": metrics["seconds"],
                **metrics["environment"],
            }
        )
        for heading, text in sections_of(summary.read_text(encoding="utf-8")):
            current = item_of(heading, items, number, current)
            text = place_figures(
                re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE), folder, base
            )
            own = (
                re.sub(r"^\d+\s*\(?[a-h]?[^.:]*[.:]\)?\s*", "", heading)
                if re.match(r"\d", heading)
                else heading
            )
            (found.setdefault(current, []) if current else preface).extend(
                [f"#### {own}\n"] * bool(own) + [text + "\n"]
            )
            covered |= dict.fromkeys(letters_of(heading), current)
    if not summaries:
        lines += [f"**Not run yet:** `python {script.name if script else f'{stem}_....py'}`", ""]
    lines += preface
    for label, question in items.items():
        lines += [f"### {label}. {question}", ""]
        lines += found.get(label, [])
        if label not in found and covered.get(label) in found:
            lines += [f"Measured under {covered[label]}.", ""]
        lines += [f"> **{ROOM} ({label}):** …", ""]
    return lines, facts


def make_draft(args):
    if args.to.suffix.lower() != ".md":
        stop(f"--to {args.to}: the draft is Markdown; give a name that ends in .md")
    if not args.out_dir.is_dir():
        stop(
            f"{args.out_dir}: no such folder; run the steps first, or name their output folder in"
            " --out-dir"
        )
    base = args.to.resolve().parent
    chapters = {number: step_chapter(number, args.out_dir.resolve(), base) for number in LAB}
    facts = [run for _, runs in chapters.values() for run in runs]
    if not facts:
        stop(
            f"{args.out_dir}: no step has left a summary.md there; run a step, e.g. python"
            " step01_spectrograms.py"
        )
    flaws = {
        "ran on synthesised demo data": [f["step"] for f in facts if f["demo"]],
        "ran with --smoke, which is only a trial": [f["step"] for f in facts if f["smoke"]],
        "trained on a few clips only (--subset)": [
            f["step"] for f in facts if f["subset"] and not f["smoke"]
        ],
    }
    warnings = [
        f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))} {flaw}"
        for flaw, steps in flaws.items()
        if steps
    ]
    lines = [
        "# Genre classification and emotion recognition in music",
        "",
        (
            "Pattern Recognition, Laboratory 3 · School of Electrical and Computer Engineering,"
            " National Technical University of Athens"
        ),
        "",
        "| | name | registration number |",
        "| --- | --- | --- |",
        "| first partner | … | … |",
        "| second partner | … | … |",
        "",
        f"> {NOTICE}",
        "",
    ]
    if warnings:
        lines += ["> **Not fit to hand in:** " + "; ".join(warnings) + ".", ""]
    missing = [str(number) for number, (_, runs) in chapters.items() if not runs]
    if missing:
        lines += [
            f"> **Steps not run yet:** {', '.join(missing)}. Their chapters name the command.",
            "",
        ]
    lines += ["---", ""]
    for chapter, _ in chapters.values():
        lines += chapter
    lines += [
        "## Origin of the numbers",
        "",
        "| step | device | torch | librosa | run time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for f in facts:
        lines.append(
            f"| {f['step']} | {f.get('gpu', f['device'])} | {f['torch']} | {f['librosa']} |"
            f" {f['seconds']:.0f} s |"
        )
    lines += [
        "",
        "## Sources",
        "",
        f"> **{ROOM}:** every source used besides the course's books and materials",
        "",
    ]
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))

    # The last line tells whether anybody has written on the draft since.
    if args.to.exists() and not is_untouched(args.to):
        stop(
            f"{args.to}: was written on since it was made; name another file in --to, or move it"
            " away"
        )
    write(args.to, f"{body}\n<!-- draft {digest(body)} -->\n".encode())
    print(
        f"{args.to}: {len(LAB) - len(missing)} of {len(LAB)} steps, {body.count(ROOM) - 1} places"
        " for your own words"
    )
    make_pdf(argparse.Namespace(markdown=args.to, to=args.to.with_suffix(".pdf")), required=False)


def digest(text) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]


def is_untouched(path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"<!-- draft (\w+) -->\s*$", text)
    return bool(match) and digest(text[: match.start()]) == match[1]


# ======================================================================================
# pdf: Markdown -> PDF
# ======================================================================================

PAGE_WIDTH, PAGE_HEIGHT = 595.28, 841.89  # A4, in points of 1/72 inch
MARGIN = 56  # 2 cm
WIDTH = PAGE_WIDTH - 2 * MARGIN  # room for text, tables and figures
TALLEST = 0.78 * (PAGE_HEIGHT - 2 * MARGIN)  # a figure leaves room for its heading and caption


def make_pdf(args, required=True):
    """Render a Markdown file; without the packages for it, say so in one line."""
    try:
        text = args.markdown.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{args.markdown}: not readable ({getattr(error, 'strerror', None) or error})")
    target = args.to or args.markdown.with_suffix(".pdf")
    try:
        pdf = render_pdf(text, args.markdown.resolve().parent)
    except ModuleNotFoundError as error:
        message = f"no PDF: {error.name} is missing; pip install markdown-it-py reportlab"
        if required:
            stop(message)
        print(message, file=sys.stderr)
        return
    write(target, pdf)
    print(f"{target}: {len(pdf):,} bytes")


def render_pdf(text, base) -> bytes:
    """Render Markdown (CommonMark and tables) as an A4 PDF.

    A line '---' begins a new page. Images are looked up relative to `base`.
    """
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode
    from reportlab.platypus import SimpleDocTemplate

    body = re.sub(r"<!-- draft \w+ -->\s*$", "", text)
    tree = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(body))
    styles = make_styles()
    story = [flowable for node in tree.children for flowable in block(node, styles, base)]
    title = next((plain(node) for node in tree.children if node.type == "heading"), "Report")
    n_open = len(re.findall(rf"\*\*{ROOM}[^*]*\*\*", body))

    def page(canvas, document):
        if document.page > 1:
            canvas.setFont("Body", 8)
            canvas.drawCentredString(PAGE_WIDTH / 2, MARGIN / 2, str(document.page))

    buffer = io.BytesIO()  # 6: the frame's padding
    SimpleDocTemplate(
        buffer,
        pagesize=(PAGE_WIDTH, PAGE_HEIGHT),
        leftMargin=MARGIN - 6,
        rightMargin=MARGIN - 6,
        topMargin=MARGIN,
        bottomMargin=MARGIN,
        title=title,
        subject=f"places for own words left: {n_open}" if n_open else "",
    ).build(story, onFirstPage=page, onLaterPages=page)
    return buffer.getvalue()


def make_styles() -> dict:
    """Paragraph styles, in DejaVu Sans: it ships with matplotlib and has Greek and signs."""
    import matplotlib
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name, file in {
        "Body": "",
        "Bold": "-Bold",
        "Italic": "-Oblique",
        "BoldItalic": "-BoldOblique",
        "Mono": "Mono",
    }.items():
        pdfmetrics.registerFont(TTFont(name, fonts / f"DejaVuSans{file}.ttf"))
    pdfmetrics.registerFontFamily("Body", "Body", "Bold", "Italic", "BoldItalic")
    pdfmetrics.registerFontFamily("Bold", "Bold", "Bold", "BoldItalic", "BoldItalic")
    body = ParagraphStyle(
        "body", fontName="Body", fontSize=9.5, leading=13.5, spaceAfter=6, splitLongWords=1
    )

    def heading(size, before):
        return ParagraphStyle(
            f"h{size}",
            body,
            fontName="Bold",
            fontSize=size,
            leading=1.25 * size,
            spaceBefore=before,
            spaceAfter=5,
            keepWithNext=1,
        )

    return {
        "body": body,
        "item": ParagraphStyle("item", body, spaceAfter=2),
        "kept": ParagraphStyle("kept", body, keepWithNext=1),
        "h1": heading(20, 120),
        "h2": heading(15, 18),
        "h3": heading(11, 12),
        "h4": heading(9.5, 6),
        "h5": heading(9, 4),
        "h6": heading(9, 4),
        "caption": ParagraphStyle(
            "caption", body, fontSize=8, leading=11, alignment=1, spaceAfter=10
        ),
        "box": ParagraphStyle(
            "box",
            body,
            backColor="#FFF6D6",
            borderColor="#D9B84A",
            borderWidth=0.6,
            borderPadding=(5, 6, 6, 6),
            leftIndent=6,
            rightIndent=6,
            spaceBefore=10,
            spaceAfter=16,
        ),
        "code": ParagraphStyle(
            "code",
            body,
            fontName="Mono",
            fontSize=7.5,
            leading=10,
            backColor="#F2F2F2",
            borderPadding=4,
            spaceBefore=4,
            spaceAfter=8,
        ),
    }


def plain(node) -> str:
    """Text of a node without its marks."""
    if node.type in ("text", "code_inline"):
        return node.content
    return (
        " "
        if node.type in ("softbreak", "hardbreak")
        else "".join(plain(child) for child in node.children)
    )


def inline(node) -> str:
    """Inline Markdown -> the markup of reportlab's Paragraph."""
    if node.type == "inline":
        return "".join(inline(child) for child in node.children)
    if node.type == "code_inline":
        return f'<font face="Mono" size="-1">{escape(node.content)}</font>'
    if node.type in ("softbreak", "hardbreak"):
        return " " if node.type == "softbreak" else "<br/>"
    if node.type == "image":
        return escape(f"[{plain(node)}]")
    inner = (
        "".join(inline(child) for child in node.children) if node.children else escape(node.content)
    )
    if node.type == "link":
        return (
            f'<link href="{escape(node.attrs["href"], {chr(34): "&quot;"})}"'
            f' color="#0B57A4">{inner}</link>'
        )
    mark = {"strong": "b", "em": "i"}.get(node.type)
    return f"<{mark}>{inner}</{mark}>" if mark else inner


def only_child(node, kind) -> bool:
    """Does a paragraph consist of nothing but one `kind` of inline node?"""
    inner = [
        child
        for child in node.children[0].children
        if child.type != "softbreak" and (child.type != "text" or child.content)
    ]
    return bool(inner) and all(child.type == kind for child in inner)


def block(node, styles, base, style="body") -> list:
    """One block of Markdown -> flowables."""
    from reportlab.platypus import ListFlowable, ListItem, PageBreak, Paragraph, Preformatted

    if node.type == "heading":
        return [Paragraph(inline(node.children[0]), styles[node.tag])]
    if node.type == "paragraph":
        if only_child(node, "image"):
            return [
                figure(child, styles, base)
                for child in node.children[0].children
                if child.type == "image"
            ]
        if style == "body" and only_child(node, "em"):
            style = "caption"
        elif style == "body" and only_child(node, "strong"):
            style = "kept"  # a table's title stays with the table
        return [Paragraph(inline(node.children[0]), styles[style])]
    if node.type in ("bullet_list", "ordered_list"):
        items = [
            ListItem([f for child in item.children for f in block(child, styles, base, "item")])
            for item in node.children
        ]
        kind = (
            {"bulletType": "bullet", "start": "•"}
            if node.type == "bullet_list"
            else {"bulletType": "1"}
        )
        return [ListFlowable(items, leftIndent=14, bulletFontName="Body", bulletFontSize=9, **kind)]
    if node.type == "blockquote":
        return [f for child in node.children for f in block(child, styles, base, "box")]
    if node.type in ("fence", "code_block"):
        return [
            Preformatted(node.content.rstrip(), styles["code"], maxLineLength=104, newLineChars="")
        ]
    if node.type == "table":
        return [table(node)]
    return [PageBreak()] if node.type == "hr" else [Paragraph(escape(node.content), styles["body"])]


def figure(node, styles, base):
    """An image at its size of print, or as large as the page lets it be."""
    from reportlab.lib.utils import ImageReader
    from reportlab.platypus import Image, Paragraph

    path = base / node.attrs["src"]
    try:
        width, height = ImageReader(path).getSize()
    except OSError as error:
        if path.exists():
            stop(
                f"{path}: not readable as an image ({str(error).splitlines()[0]}); run its step"
                " again"
            )
        return Paragraph(escape(f"(figure missing: {node.attrs['src']})"), styles["body"])
    scale = min(72 / 120, WIDTH / width, TALLEST / height)  # the steps draw at 120 dots per inch
    image = Image(path, width * scale, height * scale)
    image.keepWithNext = 1  # its caption
    return image


def table(node):
    """A table as wide as it needs, in smaller type where the page is too narrow."""
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase.pdfmetrics import stringWidth
    from reportlab.platypus import Paragraph, Table

    rows = [row.children for part in node.children for row in part.children]
    texts = [[plain(cell) for cell in row] for row in rows]
    texts[0][1:] = [
        text.replace("_", " ") for text in texts[0][1:]
    ]  # macro_precision may then take two lines
    columns = list(zip(*texts, strict=True))
    padding = 8

    share = max(
        90, WIDTH / (len(columns) + 1)
    )  # a longer word, such as a file's name, may be broken

    def widths_at(size, longest):
        widths = [
            max(
                stringWidth(part, "Bold", size)
                for text in column
                for part in ([text] if longest else text.split() or [""])
            )
            + padding
            for column in columns
        ]
        return widths if longest else [min(width, share) for width in widths]

    for size, whole_cells in (
        (8.5, True),
        (7.5, True),
        (6.5, True),
        (7.5, False),
        (6.5, False),
        (5.5, False),
    ):
        narrow, wide = widths_at(size, False), widths_at(size, True)
        if sum(wide if whole_cells else narrow) <= WIDTH:
            break
    if sum(wide) <= WIDTH:
        widths = wide
    elif sum(narrow) <= WIDTH:  # what is left goes to the columns that would like more
        spare = (WIDTH - sum(narrow)) / (sum(wide) - sum(narrow))
        widths = [low + spare * (high - low) for low, high in zip(narrow, wide, strict=True)]
    else:
        widths = [low * WIDTH / sum(narrow) for low in narrow]
    numeric = [
        sum(bool(re.match(r"[-+]?\d.{,23}$", text)) for text in column[1:]) > len(column[1:]) / 2
        for column in columns
    ]
    cells = [
        [
            Paragraph(
                (inline(cell.children[0]) if y else escape(texts[0][x])) if cell.children else "",
                ParagraphStyle(
                    "cell",
                    fontName="Body" if y else "Bold",
                    fontSize=size,
                    leading=1.25 * size,
                    alignment=2 if numeric[x] else 0,
                    splitLongWords=1,
                ),
            )
            for x, cell in enumerate(row)
        ]
        for y, row in enumerate(rows)
    ]
    lines = [
        ("LINEBELOW", (0, 0), (-1, 0), 0.8, "#444444"),
        ("LINEBELOW", (0, 1), (-1, -1), 0.25, "#BBBBBB"),
        ("VALIGN", (0, 0), (-1, -1), "MIDDLE"),
        ("LEFTPADDING", (0, 0), (-1, -1), padding / 2),
        ("RIGHTPADDING", (0, 0), (-1, -1), padding / 2 - 0.5),
        ("TOPPADDING", (0, 0), (-1, -1), 1.5),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5),
    ]
    flowable = Table(
        cells, widths, style=lines, repeatRows=1, hAlign="LEFT", spaceBefore=2, spaceAfter=10
    )
    if flowable.wrap(WIDTH, PAGE_HEIGHT)[1] < TALLEST / 2:
        flowable.setStyle([("NOSPLIT", (0, 0), (-1, -1))])  # only long tables go over two pages
    return flowable


def main(argv=None):
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    draft = commands.add_parser(
        "draft", help="gather outputs/ into a report to write on", allow_abbrev=False
    )
    draft.add_argument(
        "--out-dir",
        type=Path,
        default=Path("outputs"),
        help="where the steps wrote (default: %(default)s)",
    )
    draft.add_argument(
        "--to",
        type=Path,
        default=Path("report_draft.md"),
        help="the draft; the PDF lies beside it (default: %(default)s)",
    )
    pdf = commands.add_parser("pdf", help="render a Markdown report as PDF", allow_abbrev=False)
    pdf.add_argument("markdown", type=Path, help="the report, e.g. report_draft.md")
    pdf.add_argument("--to", type=Path, help="the PDF; else the same name with .pdf")
    archive = commands.add_parser(
        "zip", help="pack scripts and report as the course wants", allow_abbrev=False
    )
    archive.add_argument(
        "--id1",
        required=True,
        help="registration number of the first partner, or FirstNameLastName",
    )
    archive.add_argument("--id2", help="of the second partner")
    archive.add_argument("--report", type=Path, required=True, help="the report as PDF")
    archive.add_argument(
        "--out-dir", type=Path, default=Path("."), help="where the zip goes (default: this folder)"
    )
    args = parser.parse_args(argv)
    {"draft": make_draft, "pdf": make_pdf, "zip": make_zip}[args.command](args)


if __name__ == "__main__":
    main()
