"""The HTML of the report: one file without anything from elsewhere, light and dark, wide tables that scroll on a phone.

Whatever comes from a run (names, notes, paths) passes through `esc`. Figures are inlined as SVG whose text is text, so
they can be searched and enlarged; a click on a table's head sorts it, by a dozen lines of script in the page.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lowprec.scaling.draw import Drawing

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--muted:#68707a;--grid:#d9dde2;--paper:#fefefe;--panel:#f3f5f7;
--link:#0b62a8;--ok:#1a7f4b;--weak:#9a6700;--refuse:#b42318}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--muted:#9aa3ad;--grid:#363c43;--paper:#15181c;--panel:#1e2328;
--link:#6db3f2;--ok:#4cc38a;--weak:#e2b340;--refuse:#ff7b6b}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;
max-width:980px;padding:1.2em 1em 4em}p,ul{max-width:50em}h1{font-size:1.6em;line-height:1.2;margin:.2em 0 .4em}
h2{font-size:1.25em;margin:2.2em 0 .5em;padding-top:.5em;border-top:1px solid var(--grid)}
h3{font-size:1.05em;margin:1.5em 0 .3em}
a{color:var(--link)}.muted,figcaption{color:var(--muted)}nav a{margin-right:1em;white-space:nowrap}
.verdict{border-left:6px solid var(--muted);background:var(--panel);padding:.6em 1em;margin:.7em 0}
.verdict p{margin:.2em 0}.verdict.OK{border-color:var(--ok)}.verdict.WEAK{border-color:var(--weak)}
.verdict.REFUSE{border-color:var(--refuse)}.verdict.REFUSE.loud{border:3px solid var(--refuse);font-size:1.15em}
.OK>p>b:first-child{color:var(--ok)}.WEAK>p>b:first-child{color:var(--weak)}.REFUSE>p>b:first-child{color:var(--refuse)}
.wide{overflow-x:auto;margin:.8em 0}table{border-collapse:collapse;font-size:.82em;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--grid);padding:.2em .6em;text-align:right;white-space:nowrap}
td.text,th.text{text-align:left}th{background:var(--panel)}th[aria-sort]{cursor:pointer}
th[aria-sort=ascending]::after{content:" \\25B4"}th[aria-sort=descending]::after{content:" \\25BE"}
figure{margin:1.2em 0 2.4em;max-width:800px}figure .wide{margin:.3em 0}
figure svg{display:block;width:100%;min-width:560px;height:auto}
figure h3{margin:0}figcaption{font-size:.88em}ul{padding-left:1.3em}li{margin:.25em 0}
pre{background:var(--panel);padding:.7em 1em;overflow-x:auto;font-size:.82em}details summary{cursor:pointer}"""

SCRIPT = """document.querySelectorAll("th[aria-sort]").forEach(function(head){head.addEventListener("click",function(){
var up=head.getAttribute("aria-sort")!=="ascending",at=head.cellIndex,body=head.closest("table").tBodies[0];
var value=function(row){var cell=row.cells[at];return cell.dataset.v!==undefined?+cell.dataset.v:cell.textContent};
head.parentNode.querySelectorAll("th[aria-sort]").forEach(function(h){h.setAttribute("aria-sort","none")});
head.setAttribute("aria-sort",up?"ascending":"descending");
Array.from(body.rows).sort(function(a,b){var x=value(a),y=value(b);return (x<y?-1:x>y?1:0)*(up?1:-1)})
.forEach(function(row){body.appendChild(row)})})});"""


def esc(text: Any) -> str:
    """Text safe inside an element or a quoted attribute."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def prose(text: Any) -> str:
    """Escaped text in which arXiv ids are links: the only addresses a page points to."""
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", link, esc(text))


def paragraph(text: str) -> str:
    return f"<p>{prose(text)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences, or nothing."""
    items = "\n".join(f"<li>{prose(sentence)}</li>" for sentence in sentences)
    return f"<ul>\n{items}\n</ul>" if items else ""


def number(value: Any) -> str:
    """A number for a table: four significant digits; an empty cell for what is missing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return "" if value is None or value != value else str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e5):
        return f"{int(value)}"
    return f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, sortable: bool = False) -> str:
    """A table. A cell is text, a number, or (text, number): shown as the text, sorted by the number."""
    lines, texts = [], set[int]()
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            shown, value = cell if isinstance(cell, tuple) else (number(cell), cell)
            if isinstance(value, (int, float)) and value == value:
                cells.append(
                    f'<td data-v="{float(value):.9g}">{esc(shown)}</td>' if sortable else f"<td>{esc(shown)}</td>"
                )
            else:
                if shown:
                    texts.add(i)
                cells.append(f'<td class="text">{esc(shown)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    mark = ' aria-sort="none"' if sortable else ""
    classes = [' class="text"' if i in texts else "" for i in range(len(head))]
    names = "".join(f"<th{cls}{mark}>{esc(name)}</th>" for cls, name in zip(classes, head))
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def figure(drawing: Drawing, svg: str, *, files: bool = True) -> str:
    """A drawing with its title and caption, and with links to the `files` beside the page."""
    links = f' <a href="{drawing.name}.svg">SVG</a> <a href="{drawing.name}.png">PNG</a>' if files else ""
    svg = svg.replace("<svg ", f'<svg aria-label="{esc(drawing.title)}" ', 1)
    return (
        f'<figure id="{drawing.name}"><h3>{esc(drawing.title)}</h3>\n<div class="wide">{svg}</div>\n'
        f"<figcaption>{prose(drawing.caption)}{links}</figcaption></figure>"
    )


def verdict(name: str, grade: str, reasons: Sequence[str], *, loud: bool = False) -> str:
    """A box with the grade of one fit and why."""
    meaning = {
        "OK": "nothing speaks against using this fit within the range of its runs.",
        "WEAK": "use with care.",
        "REFUSE": "do not act on this fit.",
    }[grade]
    cls = f"verdict {grade}" + (" loud" if loud else "")
    return f'<div class="{cls}"><p><b>{grade}</b> {esc(name)}: {esc(meaning)}</p>{bullets(reasons)}</div>'


def document(title: str, intro: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The page. `sections`: (id, title, HTML); those without HTML are left out."""
    filled = [(key, name, body) for key, name, body in sections if body]
    links = "\n".join(f'<a href="#{key}">{esc(name)}</a>' for key, name, _ in filled)
    parts = [f'<section id="{key}"><h2>{esc(name)}</h2>\n{body}\n</section>' for key, name, body in filled]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>\n{head}\n</head><body>\n<h1>{esc(title)}</h1>\n{intro}\n'
        f"<nav>\n{links}\n</nav>\n" + "\n".join(parts) + f"\n<script>\n{SCRIPT}\n</script>\n</body></html>\n"
    )
