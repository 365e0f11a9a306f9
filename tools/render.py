"""A report in Markdown -> Word, LaTeX or PDF, by pandoc and Typst.

Its first heading is the title, the text before the first rule is the title page, quotes are the
boxes for own words, a bold line before a table and the alternative text of a figure are captions.

report.docx is the template of the Word file: pandoc's own, with A4 pages, page numbers, smaller
type and two styles more, "Own words" and "Table text". Open it in Word to change the look.
"""

import importlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from patrec.errors import InputError
from patrec.files import make_folder
from tools.report_text import WORDS

MARKDOWN = (
    "markdown_strict+pipe_tables+table_captions+backtick_code_blocks+implicit_figures"
    "+link_attributes+all_symbols_escapable+intraword_underscores+tex_math_dollars-raw_html"
)
FILTER = r"""
local raw = {docx = "openxml", latex = "latex", typst = "typst"}
local page = {docx = '<w:p><w:r><w:br w:type="page"/></w:r></w:p>', latex = "\\clearpage",
              typst = "#pagebreak(weak: true)"}
local open = {latex = "\\begin{ownwords}", typst = "#ownwords["}
local close = {latex = "\\end{ownwords}", typst = "]"}

local function block(text) return pandoc.Blocks{pandoc.RawBlock(raw[FORMAT], text)} end
local function styled(content, name) return pandoc.Div(content, {["custom-style"] = name}) end

-- A figure is at most as wide as the text on A4 (17 cm) and at most half a page high. The steps
-- draw 120 pixels per inch. 63 per cm show a figure at three quarters of that size.
function Image(img)
  local known, size = pcall(function()
    return pandoc.image.size(select(2, pandoc.mediabag.fetch(img.src)))
  end)
  if not known then error(img.src .. ": no readable figure; run its step again", 0) end
  local width = math.min(17, size.width / 63, 13 * size.width / size.height)
  img.attributes.width = string.format("%.1fcm", width)
  return img
end

function BlockQuote(quote)
  if FORMAT == "docx" then return styled(quote.content, "Own words") end
  return block(open[FORMAT]) .. quote.content .. block(close[FORMAT])
end

-- A line of a table holds 110 characters. Each column is as wide as its longest word, and what is
-- left of the line goes to the columns that would like more.
function Table(tab)
  local words, cells, numbers = {}, {}, {}
  for _, row in ipairs(tab.head.rows .. tab.bodies[1].body) do
    for c, cell in ipairs(row.cells) do
      local text = pandoc.utils.stringify(cell.contents)
      cells[c] = math.max(cells[c] or 0, utf8.len(text) + 2)
      for word in text:gmatch("%S+") do
        words[c] = math.max(words[c] or 3, utf8.len(word) + 2)
      end
      numbers[c] = (numbers[c] or 0) + (text:match("^[-+]?%d[^%a]*$") and 1 or -1)
    end
  end
  local narrow, wide = 0, 0
  for c, cell in ipairs(cells) do
    words[c] = words[c] or 3
    narrow, wide = narrow + words[c], wide + cell
  end
  local share = math.max(0, math.min(1, (110 - narrow) / (wide - narrow + 1)))
  local line = narrow + share * (wide - narrow)
  for c, cell in ipairs(cells) do
    local width = (words[c] + share * (cell - words[c])) / line
    local align = numbers[c] >= 0 and pandoc.AlignRight or pandoc.AlignLeft
    tab.colspecs[c] = {align, (FORMAT == "docx" or share < 1) and width or nil}
  end
  if FORMAT == "docx" then
    local caption = tab.caption
    tab = tab:walk{Plain = function(cell)
      return styled({pandoc.Para(cell.content)}, "Table text")
    end}
    tab.caption = caption
  end
  return tab
end

-- What stands before the first rule is the title page.
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
\usepackage{float,etoolbox,framed,needspace}
\floatplacement{figure}{H}
\AtBeginDocument{\raggedright
  \renewcommand{\figurename}{@figure@}\renewcommand{\tablename}{@table@}}
% A heading stays with the heading or the table of some ten rows below it.
\makeatletter
\newcommand{\stay}{\if@nobreak\else\Needspace*{16\baselineskip}\fi}
\makeatother
\pretocmd{\section}{\stay}{}{}\pretocmd{\subsection}{\stay}{}{}
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


def font_folder() -> Path:
    """matplotlib's fonts, which have Greek letters."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def pandoc(text, base, room, form, header="", figures="figures", flags=(), **settings) -> Path:
    """Convert a report whose figures' paths start at `base`; the file, in the folder `room`."""
    pypandoc = need("pypandoc", "pypandoc_binary")
    # pandoc sets the caption below a figure, and wants that of a table after it.
    text = re.sub(r"(!\[(.*)\]\(.+\))\n\n\*\2\*\n", r"\1\n", text)
    text = re.sub(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", r"\2\n: \1\n", text, flags=re.MULTILINE)
    lang = "el" if re.search("^# .*[α-ω]", text, re.MULTILINE) else "en"
    settings |= {"lang": lang, "toc-title": WORDS[lang]["contents"], "papersize": "a4"}
    for key in ("figure", "table"):
        header = header.replace(f"@{key}@", WORDS[lang][key])
    parts = {"filter.lua": FILTER, "header": header, "settings.json": json.dumps(settings)}
    for name, content in parts.items():
        (room / name).write_text(content, encoding="utf-8")
    flags = ["--standalone", "--toc", "--toc-depth=2", "--shift-heading-level-by=-1", *flags]
    flags += ["--lua-filter=filter.lua", "--include-in-header=header"]
    flags += ["--metadata-file=settings.json", f"--resource-path={base}"]
    flags += [f"--extract-media={figures}"]
    place = {"cworkdir": str(room), "outputfile": str(room / "report")}
    pypandoc.convert_text(text, form, MARKDOWN, extra_args=flags, **place)
    return room / "report"


def to_word(text, base, target) -> bytes:
    flags = [f"--reference-doc={Path(__file__).with_name('report.docx')}"]
    with tempfile.TemporaryDirectory() as room:
        return pandoc(text, base, Path(room), "docx+native_numbering", flags=flags).read_bytes()


def to_latex(text, base, target) -> bytes:
    """The .tex; its figures, and fonts that have Greek letters, go into a folder beside it."""
    name = f"{target.stem}_files"
    header, page = LATEX.replace("FIGURES", name), {"geometry": "margin=2cm", "fontsize": "10pt"}
    with tempfile.TemporaryDirectory() as room:
        files = Path(room) / name
        files.mkdir()
        for font in FONTS:
            shutil.copy(font_folder() / f"{font}.ttf", files)
        tex = pandoc(text, base, Path(room), "latex", header, name, **page).read_bytes()
        make_folder(target.parent / name)
        shutil.copytree(files, target.parent / name, dirs_exist_ok=True)
    return tex


def to_pdf(text, base, target) -> bytes:
    typst = need("typst", "typst")
    page = {"margin": {"x": "2cm", "y": "2cm"}, "fontsize": "10pt", "page-numbering": "1"}
    with tempfile.TemporaryDirectory() as room:
        source = pandoc(text, base, Path(room), "typst", TYPST, **page)
        return typst.compile(str(source), root=room, font_paths=[str(font_folder())])


RENDER = {".md": lambda text, *_: text.encode(), ".docx": to_word, ".tex": to_latex, ".pdf": to_pdf}
