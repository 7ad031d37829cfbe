"""Pieces of HTML. Text is escaped here, and only here."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

_CSS = """
:root { --ink: #1b1f24; --soft: #5b6470; --line: #dfe3e8; --card: #f6f7f9; --accent: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 24px 60px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .1em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2em 0 .3em; padding-top: .6em; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4em 0 .3em; }
p { margin: .4em 0; max-width: 46em; }
.soft, figcaption, small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 18px 0; padding: 0; }
.cards > div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.cards dt { font-size: .85rem; color: var(--soft); }
.cards dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.cards small { display: block; font-weight: 400; font-size: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 18px 28px; }
figure { margin: 0; min-width: 0; }
figure > img { width: 100%; max-width: 460px; height: auto; display: block; }
figcaption { font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 6px 8px; width: 172px; font-size: .84rem; }
.tile.wide { width: 300px; }
.tile img { width: 100%; height: auto; display: block; }
.tile b { display: block; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .35em;
  border: 1px solid #0003; }
.legend { white-space: nowrap; display: inline-block; margin-right: .8em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; }
.heat td { min-width: 52px; text-align: center; border: 1px solid #fff; }
.heat th[scope=row] { padding: 2px 8px; font-weight: 400; }
.heat img { width: 120px; height: 66px; display: block; }
details pre { overflow-x: auto; background: var(--card); padding: 12px; border-radius: 8px; font-size: .82rem; }
@media (max-width: 640px) {
  body { padding: 14px 12px 40px; }
  .tile { width: calc(50% - 5px); }
  .tile.wide { width: 100%; }
  .heat td { min-width: 44px; padding: 4px 3px; }
  .heat th { padding: 2px 4px; }
  .heat img { width: 80px; height: 44px; }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page that needs no other file."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else browsers ask for one
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def text(words: str, tag: str = "p", kind: str = "") -> str:
    """Words in an element."""
    return f"<{tag}{_class(kind)}>{escape(words)}</{tag}>"


def section(title: str, *parts: str | None) -> str:
    """A chapter; parts that are None are left out."""
    return f"<section>\n{text(title, 'h2')}\n" + "\n".join(part for part in parts if part) + "\n</section>"


def image(svg: str, alt: str) -> str:
    """An SVG, on its own: ids in it do not meet those of others."""
    return f'<img src="data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}" alt="{escape(alt)}">'


def figure(svg: str | None, alt: str, caption: str) -> str | None:
    """A figure with a caption; None where there is nothing to show."""
    return None if svg is None else f"<figure>{image(svg, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def grid(*figures: str | None) -> str:
    """Figures beside each other, as many as fit."""
    return '<div class="grid">' + "\n".join(one for one in figures if one) + "</div>"


def cards(facts: Sequence[tuple[str, str, str]]) -> str:
    """Facts: a name, a value, and a word on it."""
    inner = "".join(
        f"<div>{text(name, 'dt')}<dd>{escape(value)}{text(note, 'small') if note else ''}</dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="cards">{inner}</dl>'


def tiles(inner: Iterable[str], wide: bool = False) -> str:
    """Small boxes beside each other."""
    kind = "tile wide" if wide else "tile"
    return '<div class="tiles">' + "".join(f'<div class="{kind}">{one}</div>' for one in inner) + "</div>"


def legend(color: str, words: str) -> str:
    """A round mark and what it stands for."""
    return f'<span class="legend"><span class="dot" style="background:{color}"></span>{text(words, "small")}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], prose: bool = False) -> str:
    """A table of words; `prose`: the last column is to be read as such, and may be broken into lines."""
    return _table(_cells('th scope="col"', head, prose), (_cells("td", row, prose) for row in rows))


def heat_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """Shares from 0 to 1 as shades of blue; each row has a head of its own, in HTML."""
    shaded = (f'<th scope="row">{title}</th>' + "".join(map(_shaded, shares)) for title, shares in rows)
    return _table(_cells('th scope="col"', head), shaded, "heat")


def _table(head: str, rows: Iterable[str], kind: str = "") -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table{_class(kind)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """Text that is shown when one asks for it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(content)}</pre></details>"


def _cells(tag: str, words: Sequence[str], prose: bool = False) -> str:
    kinds = [""] * (len(words) - 1) + [_class("text" if prose else "")]
    return "".join(f"<{tag}{kind}>{escape(word)}</{tag[:2]}>" for word, kind in zip(words, kinds, strict=True))


def _shaded(share: float) -> str:
    red, green, blue = (round(255 + share * (part - 255)) for part in (0, 90, 156))
    ink = "#fff" if share > 0.5 else "#1b1f24"
    shown = f"{share:.0%}" if share >= 0.005 else ""
    return f'<td style="background:rgb({red},{green},{blue});color:{ink}">{shown}</td>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
