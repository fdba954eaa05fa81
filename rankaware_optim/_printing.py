"""This module prints text and tables. In a terminal, the package rich draws the tables.
Notebooks show the tables as HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The page sets no colours, so that it is readable in light and dark notebooks.
_HTML = """\
{% macro style(loop) -%}
{% set right = headings and headings[loop.index0] not in left -%}
style="text-align: {{ 'right' if right else 'left' }}; vertical-align: top; padding: 0.2em 0.5em;
{{- ' min-width: 12em' if loop.last and not right else ' white-space: nowrap' }}"
{%- endmacro %}
<div style="overflow-x: auto">
<table style="border-collapse: collapse">
{% if title %}
<caption style="caption-side: top; color: inherit; text-align: left">{{ title }}</caption>
{% endif %}
{% if headings %}
<thead style="border-bottom: 1px solid"><tr>
{% for heading in headings %}
<th {{ style(loop) }}>{{ heading }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr>
{% for cell in row %}
{% set tag = "td" if headings or not loop.first else "th" %}
<{{ tag }} {{ style(loop) }}>{{ cell }}</{{ tag }}>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% for line in lines %}
<p style="margin: 0.2em 0">{{ line }}</p>
{% endfor %}
</div>
"""


def printable(text: str) -> str:
    """Remove control characters, direction marks and surrogates from a string, because they can
    change how a terminal behaves. For example, the names and notes of a recipe may come from a file
    that the user does not trust.

    >>> printable("\\x1b[2Ja note")
    '[2Ja note'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def give_or_take(octaves: float) -> str:
    """Describe an uncertainty of log2(learning rate) in words.

    >>> give_or_take(0.5)
    'give or take a factor of 1.41'
    """
    return f"give or take a factor of {2.0**octaves:.3g}"


@dataclass(frozen=True)
class Table:
    """A table with a title above it and lines of text below it.

    headings: empty if the first cell of each row is its name. left: the headings of left-aligned
    columns.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()
    title: str = ""
    left: Sequence[str] = ()

    def text(self, width: int = 120) -> str:
        """Return the table as text. The rows of the table are at most `width` characters wide."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title or None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
        )
        for heading in self.headings:
            table.add_column(
                heading, justify="left" if heading in self.left else "right"
            )
        for row in self.rows:
            table.add_row(*row)
        console = Console(
            width=width,
            color_system=None,
            highlight=False,
            markup=False,
            force_terminal=False,
            force_jupyter=False,  # where it would draw by itself, beside the cell's result
        )
        with console.capture() as capture:
            console.print(table)
            for line in self.lines:
                console.print(line, soft_wrap=True)
        return printable(capture.get()).rstrip()

    def html(self) -> str:
        """Return the table as HTML. All values are escaped."""
        from jinja2 import Template

        template = Template(
            _HTML, autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return printable(template.render(vars(self)))
