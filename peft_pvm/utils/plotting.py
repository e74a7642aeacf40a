"""How this package's pictures look: readable in print and by the colour-blind, the same bytes from the same numbers.

Drawing needs matplotlib, which the extra `lab` brings; importing this module does not.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .extras import require


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, without the yellow that paper swallows.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.parse_math": False,  # an adapter may have a dollar in its name
}
WIDTH = 7.5  # inches

T = TypeVar("T")


def styled(function: Callable[..., T]) -> Callable[..., T]:
    """Draw in this style, whatever the user's is.

    Raises:
        ImportError: When it is called and matplotlib is not installed.
    """

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> T:
        require("lab", "matplotlib")
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return function(*args, **kwargs)

    return draw


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, an array of `(rows, columns)`.

    Args:
        height: The height in inches.
        rows: Rows of axes.
        columns: Columns of axes.
        width: The width in inches, by default that of a page.
        kwargs: Further arguments of `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def as_png(figure: Figure) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_svg(figure: Figure) -> str:
    """An SVG element for an HTML page, which decides its font and background.

    It is also a whole SVG file. Several can be in one page: an id that occurs twice names the same thing.
    """
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "peft-pvm", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    return re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])


def line_look(number: int, every: float | int = 1) -> dict[str, Any]:
    """Keyword arguments of `plot`: lines that differ in colour, dashes and markers.

    Args:
        number: The number of the line, from 0.
        every: Matplotlib's `markevery`.
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "markevery": every,
        "linewidth": 1.4,
    }


def logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis, "x" or "y", with a few plain numbers on it. Comes after what is drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    decades = math.log10(high / low)
    axis = getattr(axes, f"{which}axis")
    marks = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)
    axis.set_major_locator(MaxNLocator(5) if decades < 0.8 else LogLocator(subs=marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
