# SPDX-License-Identifier: Apache-2.0
"""Sections that compare: a study's tables, and the diagnosis of a model pair beside the paper's."""

import html
from collections.abc import Sequence

from configs import study
from launch import diagnose
from launch.report import charts, sections
from launch.study import collect, tables

CURVES = ("margin", "advantage_variance", "abs_advantage")


def comparison(runs: Sequence[collect.Run]) -> str:
    """The study's tables of two arms or more; "" otherwise."""
    try:
        found = tables.Study(tables.results(runs, study.arm_of), list(study.ARMS))
    except ValueError as error:
        return f'<p class="note">No comparison: {html.escape(str(error))}.</p>'
    if len(found.arms) < 2:
        return ""
    parts = (
        f"<h3>{html.escape(caption)}</h3>{charts.table(head, rows)}"
        for caption, head, rows in tables.tables(found)
    )
    return f'{"".join(parts)}<p class="note">{html.escape(tables.says(found))}</p>'


def diagnosis(found: dict[str, dict]) -> str:
    """Tables and curves of `launch.diagnose`, by the directory they come from."""
    out = []
    for name, result in found.items():
        heading = f"<h3>{html.escape(name)}</h3>" if len(found) > 1 else ""
        out.append(heading + charts.table(*diagnose.table(result)))
        figures = [profile_chart(result["profiles"], signal) for signal in CURVES]
        out.append(sections.grid(figures))
    note = (
        "Before training. Gain: BIC of no change minus BIC of the best drop in the sentences' "
        "margins. min_side: least sentences on either side of a change; the paper names none, and "
        "1 finds drops in noise more often."
    )
    return "".join(out) + f'<p class="note">{html.escape(note)}</p>' if out else ""


def profile_chart(profiles: dict, signal: str) -> str:
    """One signal against the position in the response, one line per group of rollouts."""
    title, y_label = sections.SIGNALS[signal]
    lines = {group: means[signal] for group, means in profiles.items() if signal in means}
    series = [
        charts.Series(
            group,
            [(i + 0.5) / len(means) for i in range(len(means))],
            [float("nan") if v is None else v for v in means],
            colour=i,
        )
        for i, (group, means) in enumerate(lines.items())
    ]
    return charts.line_chart(title, series, sections.POSITION, charts.Axis(y_label))
