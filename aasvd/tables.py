"""Tables of text cells, written as HTML, Markdown, LaTeX or plain text by the ending of the file's name."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from aasvd.artifacts import replacing

_STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em}"
    "table{border-collapse:collapse}"
    "td,th{padding:.3em 1em;text-align:right;border-bottom:1px solid #ddd}"
    ".name{text-align:left}"
    "tr.group td{border-top:2px solid #888}"
)
_LATEX = str.maketrans(
    {
        "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
        "±": r"$\pm$", "–": "--", "×": r"$\times$", "′": "'", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)  # fmt: skip


_PAGE = 40  # rows that fit a page


class Table(NamedTuple):
    """A table as people read it.

    Attributes:
        title: One line.
        columns: Heads.
        rows: Cells as text, as many per row as there are columns.
        notes: Sentences: what the text above the table says.
        groups: Numbers of rows before which a rule is drawn.
        names: How many columns, from the first, hold names and are set flush left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    groups: Sequence[int] = ()
    names: int = 1

    def html(self) -> str:
        """Return the table as a page of its own."""
        return page(self.title, self.section())

    def section(self) -> str:
        """Return the table as a part of an HTML page, with its title and notes."""

        def line(cells: Sequence[str], tag: str = "td", attributes: str = "") -> str:
            kinds = [' class="name"' if column < self.names else "" for column in range(len(cells))]
            inner = "".join(
                f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
            )
            return f"<tr{attributes}>{inner}</tr>"

        body = "\n".join(
            line(row, attributes=' class="group"' if number in self.groups else "")
            for number, row in enumerate(self.rows)
        )
        title = html.escape(self.title)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<h1>{title}</h1>{notes}<table>{line(self.columns, 'th')}\n{body}\n</table>"

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

        kinds = [*["---"] * self.names, *["---:"] * (len(self.columns) - self.names)]
        rule = "| " + " | ".join(kinds) + " |"
        notes = [part for note in self.notes for part in (note, "")]
        lines = [f"## {self.title}", "", *notes, line(self.columns), rule, *map(line, self.rows)]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return the table in LaTeX: a float, for booktabs; of many rows a longtable."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

        body: list[str] = []
        for number, row in enumerate(self.rows):
            body += [r"\midrule"] * (number in self.groups and number > 0) + [line(row)]
        caption = rf"\caption{{{' '.join([self.title.rstrip('.') + '.', *self.notes]).translate(_LATEX)}}}"
        kinds = "{" + "l" * self.names + "r" * (len(self.columns) - self.names) + "}"
        head = [r"\toprule", line(self.columns), r"\midrule"]
        if len(self.rows) > _PAGE:
            begin = [r"\begingroup\scriptsize", rf"\begin{{longtable}}{kinds}", caption + r" \\"]
            body = [*begin, *head, r"\endhead", *body, r"\bottomrule"]
            end = [r"\end{longtable}", r"\endgroup"]
        else:
            body = [
                r"\begin{table}",
                r"\centering",
                rf"\begin{{tabular}}{kinds}",
                *head,
                *body,
                r"\bottomrule",
            ]
            end = [r"\end{tabular}", caption, r"\end{table}"]
        return "\n".join([*body, *end]) + "\n"

    def text(self) -> str:
        """Return the table for a terminal."""
        table = [self.columns, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        lines = [
            "  ".join(
                f"{cell:<{width}}" if column < self.names else f"{cell:>{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)

    def write(self, *outputs: Path) -> None:
        """Write the table to files, each in the format of its ending: .html, .md, .tex or .txt.

        Raises:
            ValueError: If an ending names no format, or a row has another number of cells than the head.
        """
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: row {row} does not have {len(self.columns)} cells")
        formats = {".html": self.html, ".md": self.markdown, ".tex": self.latex, ".txt": self.text}
        for output in outputs:
            if output.suffix not in formats:
                raise ValueError(f"{output}: a table can be written as {', '.join(formats)}")
            with replacing(output) as temporary:
                temporary.write_text(formats[output.suffix]())


def page(title: str, *sections: str) -> str:
    """Return an HTML page of parts that are HTML already."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )


def counted(found: Iterable[tuple[str, int | None]]) -> str:
    """Say on how much each text or task was measured: `wikitext2 40, ptb 20 or 24`; None: not at all."""
    counts: dict[str, set[int]] = {}
    for name, count in found:
        counts.setdefault(name, set()).update([] if count is None else [count])
    return ", ".join(f"{name} {' or '.join(map(str, sorted(some))) or 0}" for name, some in counts.items())


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with a fixed number of decimals; scientific where it is huge, – for None."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"
    return re.sub(r"e\+0*", "e", text)


def percent(value: float | None, error: float | None = None) -> str:
    """Return a share in percent, with its standard error where there is one."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
