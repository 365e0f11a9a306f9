"""A report in Markdown -> Word, LaTeX or PDF, by pandoc and Typst.

Its first heading is the title, what stands before the first rule is the title page, quotes are the
boxes for own words, a bold line before a table and the alternative text of a figure are captions.
"""

import importlib
import io
import json
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

from patrec.errors import InputError
from patrec.files import make_folder, write_bytes
from tools.report_text import WORDS

FIGURE = re.compile(r"^!\[(.*)\]\(<?([^>\n]+?)>?\)$", re.MULTILINE)
MARKDOWN = (
    "markdown_strict+pipe_tables+table_captions+backtick_code_blocks+implicit_figures"
    "+link_attributes+all_symbols_escapable+intraword_underscores+tex_math_dollars-raw_html"
)
WIDTH, TALLEST = 17.0, 13.0  # of a figure, in cm: the text's width on A4, half a page
PIXELS = 63  # per cm: the steps draw at 120 per inch, and shrink by a quarter in a report
# What stands before the first rule is the title page; blockquotes are the boxes for own words.
FILTER = r"""
local raw = {docx = "openxml", latex = "latex", typst = "typst"}
local page = {docx = '<w:p><w:r><w:br w:type="page"/></w:r></w:p>', latex = "\\clearpage",
              typst = "#pagebreak(weak: true)"}
local open = {latex = "\\begin{ownwords}", typst = "#ownwords["}
local close = {latex = "\\end{ownwords}", typst = "]"}

local function block(text) return pandoc.Blocks{pandoc.RawBlock(raw[FORMAT], text)} end
local function styled(content, name) return pandoc.Div(content, {["custom-style"] = name}) end

function BlockQuote(quote)
  if FORMAT == "docx" then return styled(quote.content, "Own words") end
  return block(open[FORMAT]) .. quote.content .. block(close[FORMAT])
end

function Table(tab)
  if FORMAT ~= "docx" then return nil end
  local function small(cell) return styled({pandoc.Para(cell.content)}, "Table text") end
  local caption = tab.caption
  tab = tab:walk{Plain = small}
  tab.caption = caption
  return tab
end

function Pandoc(doc)
  for number, rule in ipairs(doc.blocks) do
    if rule.t == "HorizontalRule" then
      doc.meta.title = pandoc.MetaInlines(doc.blocks[1].content)
      local front = pandoc.Blocks{table.unpack(doc.blocks, 2, number - 1)}
      doc.meta["include-before"] = pandoc.MetaBlocks(front .. block(page[FORMAT]))
      doc.blocks = block(page[FORMAT]) .. {table.unpack(doc.blocks, number + 1)}
      return doc
    end
  end
end
"""
TYPST = r"""
#set text(font: ("Libertinus Serif", "DejaVu Sans"), hyphenate: false)
#show raw: set text(font: "DejaVu Sans Mono")
#show raw.where(block: true): set text(size: 0.9em)
#show figure.where(kind: table): it => layout(room => {
  set block(breakable: measure(it.body, width: room.width).height > 0.9 * room.height)
  it
})
#show figure.caption: set text(size: 0.9em)
#show table: set text(size: 0.82em)
#show table: set par(justify: false)
#show table.cell.where(y: 0): strong
#show list: set par(justify: false)
#show outline.entry: set block(spacing: 0.5em)
#set table(inset: (x: 4pt, y: 3pt))
#show heading: set block(above: 1.4em, below: 0.8em)
#let ownwords(body) = block(width: 100%, fill: rgb("#fff6d6"), stroke: 0.5pt + rgb("#d9b84a"),
  inset: 8pt, body)
"""
LATEX = r"""
\ifPDFTeX\PackageError{report}{Compile with XeLaTeX or LuaLaTeX}{pdfLaTeX lacks Greek letters.}\fi
\setmainfont{DejaVuSerif}[Path=FIGURES/,Extension=.ttf,BoldFont=*-Bold,ItalicFont=*-Italic,
  BoldItalicFont=*-BoldItalic,Scale=0.9]
\setmonofont{DejaVuSansMono}[Path=FIGURES/,Extension=.ttf,BoldFont=*-Bold,ItalicFont=*-Oblique,
  Scale=0.8]
\usepackage{float,etoolbox,framed}
\floatplacement{figure}{H}
\AtBeginDocument{\raggedright
  \renewcommand{\figurename}{@figure@}\renewcommand{\tablename}{@table@}}
\newcommand{\stay}{\vskip 0pt plus 8\baselineskip\penalty-200\vskip 0pt plus -8\baselineskip}
\pretocmd{\subsection}{\stay}{}{} % a heading stays with the table below it
\AtBeginEnvironment{longtable}{\scriptsize\setlength{\tabcolsep}{3pt}}
\RecustomVerbatimEnvironment{Highlighting}{Verbatim}{commandchars=\\\{\},fontsize=\footnotesize}
\definecolor{ownwords}{HTML}{FFF6D6}
\newenvironment{ownwords}{\def\FrameCommand{\fboxsep=6pt\colorbox{ownwords}}%
  \MakeFramed{\advance\hsize-\width\FrameRestore}}{\endMakeFramed}
"""
FONTS = "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic DejaVuSansMono"
FONTS = (FONTS + " DejaVuSansMono-Bold DejaVuSansMono-Oblique").split()


def need(module, package):
    """Import a package that only this command needs, or name the pip command for it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"{package} is missing; pip install {package}") from None


def for_pandoc(text, base, folder) -> str:
    """The report as pandoc wants it: sized figures, copied into a folder, and table captions."""
    from PIL import Image, UnidentifiedImageError

    def figure(match):
        caption, path = match[1], base / match[2]
        try:
            with Image.open(path) as image:
                width, height = image.size
                image.verify()
        except FileNotFoundError:
            raise InputError(f"{path}: no such figure; run its step again") from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            fault = str(error).splitlines()[0]
            raise InputError(f"{path}: not readable ({fault}); run its step again") from None
        name = f"{path.parent.name}_{path.name}"
        (folder / name).write_bytes(path.read_bytes())
        shown = min(WIDTH, width / PIXELS, TALLEST * width / height)
        return f"![{caption}](<{folder.name}/{name}>){{width={shown:.1f}cm}}"

    text = re.sub(r"(!\[(.*)\]\(.+\))\n\n\*\2\*\n", r"\1\n", text)  # pandoc sets the caption
    text = re.sub(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", r"\2\n: \1\n", text, flags=re.MULTILINE)
    return FIGURE.sub(figure, text)


def pandoc(text, base, folder, form, header="", **settings) -> Path:
    """Convert a report with pandoc; returns the file, beside the folder of its figures."""
    pypandoc = need("pypandoc", "pypandoc_binary")
    folder.mkdir()
    text = for_pandoc(text, base, folder)
    lang = "el" if re.search("^# .*[α-ω]", text, re.MULTILINE) else "en"
    settings |= {"lang": lang, "toc-title": WORDS[lang]["contents"], "papersize": "a4"}
    for key in ("figure", "table"):
        header = header.replace(f"@{key}@", WORDS[lang][key])
    parts = {"filter.lua": FILTER, "header": header, "settings.json": json.dumps(settings)}
    room = folder.parent
    for name, content in parts.items():
        (room / name).write_text(content, encoding="utf-8")
    flags = ["--standalone", "--toc", "--toc-depth=2", "--shift-heading-level-by=-1"]
    # pandoc gives a table widths where a line is longer than this: in Word, all tables need them.
    flags += [f"--columns={20 if form.startswith('docx') else 100}"]
    flags += [f"--lua-filter={room / 'filter.lua'}", f"-H{room / 'header'}"]
    flags += [f"--metadata-file={room / 'settings.json'}", f"--resource-path={room}"]
    if form.startswith("docx"):
        flags.append(f"--reference-doc={word_styles(room, pypandoc.get_pandoc_path())}")
    target = room / "report"
    pypandoc.convert_text(text, form, MARKDOWN, extra_args=flags, outputfile=str(target))
    return target


def to_word(text, base, target) -> bytes:
    with tempfile.TemporaryDirectory() as room:
        return pandoc(text, base, Path(room) / "figures", "docx+native_numbering").read_bytes()


def to_latex(text, base, target) -> bytes:
    """The .tex; its figures, and fonts that have Greek letters, go into a folder beside it."""
    import matplotlib

    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / f"{target.stem}_files"
        header, page = LATEX.replace("FIGURES", folder.name), {"geometry": "margin=2cm"}
        tex = pandoc(text, base, folder, "latex", header, fontsize="10pt", **page).read_bytes()
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        beside = target.parent / folder.name
        make_folder(beside)
        for path in [*folder.iterdir(), *(fonts / f"{name}.ttf" for name in FONTS)]:
            write_bytes(beside / path.name, lambda file, path=path: file.write(path.read_bytes()))
        return tex


def to_pdf(text, base, target) -> bytes:
    import matplotlib

    typst = need("typst", "typst")
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    with tempfile.TemporaryDirectory() as room:
        page = {"margin": {"x": "2cm", "y": "2cm"}, "fontsize": "10pt", "page-numbering": "1"}
        source = pandoc(text, base, Path(room) / "figures", "typst", TYPST, **page)
        return typst.compile(str(source), root=room, font_paths=[str(fonts)])


RENDER = {".md": lambda text, *_: text.encode(), ".docx": to_word, ".tex": to_latex, ".pdf": to_pdf}
PARAGRAPH = """<w:style w:type="paragraph" w:customStyle="1" w:styleId="{id}">
<w:name w:val="{name}"/><w:basedOn w:val="BodyText"/><w:qFormat/>
<w:pPr>{paragraph}</w:pPr><w:rPr>{text}</w:rPr></w:style>"""
BORDER = '<w:{0} w:val="single" w:sz="4" w:space="{1}" w:color="{2}"/>'
FOOTER = """<w:ftr xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">
<w:p><w:pPr><w:jc w:val="center"/></w:pPr>
<w:fldSimple w:instr="PAGE"><w:r><w:t>1</w:t></w:r></w:fldSimple></w:p></w:ftr>"""


def changes_to_word() -> dict[str, list[tuple[str, str]]]:
    """What we change in pandoc's Word template: {its part: [(pattern, replacement)]}."""
    sides = "".join(BORDER.format(side, 4, "D9B84A") for side in ("top", "left", "bottom", "right"))
    box = f'<w:pBdr>{sides}</w:pBdr><w:shd w:val="clear" w:color="auto" w:fill="FFF6D6"/>'
    tight = '<w:spacing w:before="20" w:after="20"/>'
    small = '<w:sz w:val="{}"/>'
    ours = PARAGRAPH.format(id="OwnWords", name="Own words", paragraph=box, text="")
    ours += PARAGRAPH.format(
        id="TableText", name="Table text", paragraph=tight, text=small.format(15)
    )
    lines = "".join(BORDER.format(side, 0, "BBBBBB") for side in ("top", "bottom", "insideH"))
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footer"
    margins = " ".join(f'w:{side}="1134"' for side in ("top", "right", "bottom", "left"))
    return {
        "word/styles.xml": [
            ('<w:sz w:val="24" />', small.format(20)),  # half points
            ("</w:styles>", f"{ours}</w:styles>"),
            ('<w:tblInd w:w="0" w:type="dxa" />', f"\\g<0><w:tblBorders>{lines}</w:tblBorders>"),
            ('(<w:(?:left|right)) w:w="108"', '\\1 w:w="50"'),  # margins of cells
            (
                '(?s)(w:styleId="CaptionedFigure".*?<w:keepNext />)',
                '\\1<w:spacing w:before="160"/>',
            ),
            ('(?s)(w:styleId="VerbatimChar".*?<w:sz w:val=)"\\d+"', '\\1"15"'),
        ],
        "word/document.xml": [
            (
                "(?s)<w:sectPr>(.*?)</w:sectPr>",  # Word wants its parts in this order
                '<w:sectPr><w:footerReference w:type="default" r:id="rIdFooter"/>\\1'
                f'<w:pgSz w:w="11906" w:h="16838"/><w:pgMar {margins} w:header="567"'
                ' w:footer="567" w:gutter="0"/></w:sectPr>',
            )
        ],
        "word/_rels/document.xml.rels": [
            (
                "</Relationships>",
                f'<Relationship Type="{kind}" Id="rIdFooter" Target="footer1.xml"/>'
                "</Relationships>",
            )
        ],
        r"[Content_Types].xml": [
            (
                "</Types>",
                '<Override PartName="/word/footer1.xml" ContentType="application/vnd.openxmlformats'
                '-officedocument.wordprocessingml.footer+xml"/></Types>',
            )
        ],
    }


def word_styles(room, program) -> Path:
    """pandoc's own Word template with the page, its number, smaller type and the styles we add."""
    default = subprocess.run(
        [program, "--print-default-data-file=reference.docx"], capture_output=True, check=True
    )
    changes, target = changes_to_word(), room / "reference.docx"
    with (
        zipfile.ZipFile(io.BytesIO(default.stdout)) as old,
        zipfile.ZipFile(target, "w") as new,
    ):
        for name in old.namelist():
            text = old.read(name).decode()
            for pattern, replacement in changes.get(name, []):
                text = re.sub(pattern, replacement, text)
            new.writestr(name, text)
        new.writestr("word/footer1.xml", FOOTER)
    return target
