"""Scores by length of the text between image and question, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ...tuners.names import TOGETHER
from ...utils.plotting import line_look, new_figure, styled


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Score = tuple[float, float | None]  # a mean and its standard error, if that is known


def score_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers among lmms-eval's results.

    Args:
        results: For each task, `metric,filter` and `metric_stderr,filter`, beside names and counts.

    Returns:
        Rows of `task`, `metric`, `value` and `stderr`.
    """
    rows = []
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, filtering = key.partition(",")
            if not comma or "_stderr" in metric or not _is_number(value):
                continue
            stderr = entries.get(f"{metric}_stderr,{filtering}")
            name = metric if filtering == "none" else f"{metric} ({filtering})"
            rows.append(dict(task=task, metric=name, value=value, stderr=stderr if _is_number(stderr) else None))
    return rows


def curves(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, Score]]]:
    """Scores by task and metric, adapter, length. Several seeds are averaged; their error is that of the seeds' mean.

    Args:
        result: What `evaluate_lengths` returns.
    """
    found: dict[tuple[str, str], dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for row in result["scores"]:
        by_length = found.setdefault((row["task"], row["metric"]), {}).setdefault(row["adapter"], {})
        by_length.setdefault(row["length"], []).append(row)
    return {
        what: {
            adapter: {length: _score(rows) for length, rows in sorted(by_length.items())}
            for adapter, by_length in by_adapter.items()
        }
        for what, by_adapter in found.items()
    }


def labels(adapters: Sequence[str]) -> dict[str, str]:
    """A short name for each adapter, or several with `+` between: their folders' own, unless two are alike.

    Example:
        >>> labels(["base", "runs/pvm", "runs/pvm+adapters/dipe"])
        {'base': 'base', 'runs/pvm': 'pvm', 'runs/pvm+adapters/dipe': 'pvm+dipe'}
    """
    short = [TOGETHER.join(Path(part).name for part in adapter.split(TOGETHER)) for adapter in adapters]
    return {adapter: name if short.count(name) == 1 else adapter for adapter, name in zip(adapters, short)}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for every metric of every task: a row for each length, a column for each adapter.

    Args:
        result: What `evaluate_lengths` returns.
    """
    made, names = [], labels(result["adapters"])
    for (task, metric), by_adapter in curves(result).items():
        table = Table("tokens between", *map(names.__getitem__, by_adapter), title=f"{task}: {metric}")
        for column in table.columns:
            column.justify = "right"
        for length in sorted({length for scores in by_adapter.values() for length in scores}):
            table.add_row(f"{length:,}", *(_written(scores.get(length)) for scores in by_adapter.values()))
        made.append(table)
    return made


@styled
def draw(result: Mapping[str, Any]) -> Figure:
    """A panel for every metric of every task: scores over length, a line for each adapter.

    Args:
        result: What `evaluate_lengths` returns.

    Raises:
        ValueError: It holds no scores.
    """
    found = curves(result)
    if not found:
        raise ValueError("There are no scores to draw.")
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    figure, axes = new_figure(2.8 * rows, rows=rows, columns=columns)
    lengths, names = sorted(result["lengths"]), labels(result["adapters"])
    for panel, ((task, metric), by_adapter) in zip(axes.flat, found.items()):
        for number, (adapter, scores) in enumerate(by_adapter.items()):
            places = [lengths.index(length) for length in scores]
            values = [value for value, _ in scores.values()]
            errors = [stderr or 0.0 for _, stderr in scores.values()]
            panel.errorbar(places, values, yerr=errors, label=names[adapter], capsize=2, **line_look(number))
        panel.set(title=task, xlabel="Tokens between image and question", ylabel=metric)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    for panel in list(axes.flat)[len(found) :]:
        panel.remove()
    axes[0, 0].legend()
    return figure


def _score(rows: list[dict[str, Any]]) -> Score:
    values = [row["value"] for row in rows]
    if len(values) == 1:
        return values[0], rows[0]["stderr"]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def _written(score: Score | None) -> str:
    if score is None:
        return ""
    value, stderr = score
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
