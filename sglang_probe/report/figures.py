"""Figures as inline SVG: dots with intervals, bars, lines, a heatmap, small multiples, graphs, and token strips.

Each function takes a frame and the names of its columns (the token strip: spans) and gives a `Figure`: two drawings of
the same numbers (one for columns 720 px wide and for print, one for phones, so that text keeps its size), and the
numbers themselves. Colours come from classes that page.html.j2 defines for light and dark; series take them in order,
so give arms the same order in every figure. A duplicate, an overlap or a missing column raises `ValueError`: a figure
never picks one of two numbers. Missing values are drawn as missing.

One file per figure: _dots.py, _bars.py, _lines.py, _heatmap.py, _panels.py (small multiples), _strip.py,
_graph.py (nodes and edges in rows and columns), and _tokens.py (a map of tokens, which is a table). They share the
result (_figure.py), the reading of frames (_frame.py), axes (_axes.py), and the SVG canvas with its text measuring
(_svg.py).
"""

from sglang_probe.report._bars import grouped_bars
from sglang_probe.report._dots import dots
from sglang_probe.report._figure import Figure, fold
from sglang_probe.report._graph import layered_graph
from sglang_probe.report._heatmap import heatmap
from sglang_probe.report._lines import lines
from sglang_probe.report._panels import panel_lines, panel_scatter
from sglang_probe.report._strip import FATES, Span, request_strips, token_strip
from sglang_probe.report._svg import NARROW, WIDE
from sglang_probe.report._tokens import token_map, visible

__all__ = [
    "FATES",
    "NARROW",
    "WIDE",
    "Figure",
    "Span",
    "dots",
    "fold",
    "grouped_bars",
    "heatmap",
    "layered_graph",
    "lines",
    "panel_lines",
    "panel_scatter",
    "request_strips",
    "token_map",
    "token_strip",
    "visible",
]
