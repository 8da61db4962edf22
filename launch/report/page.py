# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file: sections as functions from arms to HTML, put together by `build`.

Nothing is loaded from outside. A content security policy admits two scripts by their hash, so that
model output would not run even if it were not escaped.
"""

import base64
import hashlib
import html
import json
import pathlib
import string
from collections.abc import Sequence

import numpy as np

from launch.report import charts, sections
from launch.study import collect

HERE = pathlib.Path(__file__).parent
PAPER = {"release/position_median": "13 %", "bic/gain_above_6": "79 %", "bic/gain_mean": "24.0"}


def build(
    runs: Sequence[collect.Run],
    arms: Sequence[collect.Arm],
    trajectories: Sequence[dict],
    *,
    title: str,
    base_config: dict,
    left_out: int = 0,
    extra: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text. `extra`: sections (heading, HTML) after the first; runs may be []."""
    parts = list(extra)
    if runs:
        parts.insert(0, ("What was run", what_was_run(runs, arms, base_config)))
        parts += [
            ("Learning", sections.learning(arms)),
            ("Teachability", sections.teachability(arms)),
            ("Releases", sections.releases(arms)),
            ("Responses and time", sections.responses(arms)),
            ("Trajectories", viewer(trajectories, left_out)),
        ]
    parts = [(heading, body) for heading, body in parts if body]
    links = "".join(f'<a href="#s{i}">{html.escape(h)}</a>' for i, (h, _) in enumerate(parts))
    body = "".join(
        f'<section id="s{i}"><h2>{html.escape(h)}</h2>{b}</section>'
        for i, (h, b) in enumerate(parts)
    )
    scripts = [asset("charts.js"), asset("viewer.js")]
    hashes = " ".join(f"'sha256-{_sha256(s)}'" for s in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{asset('page.css')}</style></head><body>"
        f'<header class="top"><h1>{html.escape(title)}</h1>'
        f'<p class="lead">{headline(runs, arms)}</p>{tiles(arms)}'
        f"</header><nav><div>{links}</div></nav><main>{body}"
        "<footer>Bands: one run, 95 % bootstrap interval over problems; several seeds, 95 % t "
        "interval over seeds. Log-probabilities are in nats.</footer></main>"
        + "".join(f"<script>{s}</script>" for s in scripts)
        + "</body></html>\n"
    )


def asset(name: str) -> str:
    return (HERE / name).read_text()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def script_json(value) -> str:
    """JSON that cannot leave its script element, whatever the strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- head


def headline(runs: Sequence[collect.Run], arms: Sequence[collect.Arm]) -> str:
    if not runs:
        return "Diagnosis before training"
    commits = sorted({r.commit[:12] for r in runs})
    steps = sorted({r.rows[-1]["step"] for r in runs if r.rows})
    span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}" if steps else "no"
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs in {len(arms)} arms"
    return html.escape(f"{count}, {span} updates, commit {', '.join(commits)}")


def tiles(arms: Sequence[collect.Arm]) -> str:
    """The main figures of one arm; several arms are compared in tables instead."""
    if len(arms) != 1:
        return ""
    out = []
    for name, label, percent in (
        ("eval/accuracy", "held-out accuracy", True),
        ("eval/ood_accuracy", "out-of-domain accuracy", True),
        ("release/rate", "rollouts released", True),
        ("release/position_median", "median release position", True),
        ("bic/gain_above_6", "rollouts with BIC gain above 6", True),
        ("bic/gain_mean", "mean BIC gain", False),
        ("release/supervised_fraction", "of the tokens supervised", True),
    ):
        steps, values = arms[0].curve(name)
        if not values:
            continue
        ends = [
            charts.format_number(v.mean * (100 if percent else 1))
            for v in values[:: len(values) - 1 or 1]
        ]
        text = " → ".join(ends) + (" %" if percent else "")
        paper = f" (paper: {PAPER[name]})" if name in PAPER else ""
        out.append(
            f'<div class="tile"><b>{text}</b><span>{html.escape(label + paper)}</span></div>'
        )
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def what_was_run(runs, arms, base_config: dict) -> str:
    head = [
        "arm",
        "seeds",
        "updates",
        "commit",
        "started",
        "training time",
        "sampled tokens",
        "devices",
    ]
    body = []
    for arm in arms:
        info = arm.runs[0].info
        seconds = [r.rows[-1]["total/seconds"] for r in arm.runs if r.rows]
        tokens = [r.column("tokens/sampled")[1].sum() for r in arm.runs]
        body.append(
            [
                arm.label,
                ", ".join(str(r.seed) for r in arm.runs),
                ", ".join(sorted({str(r.rows[-1]["step"]) for r in arm.runs if r.rows})),
                arm.runs[0].commit[:12],
                str(info.get("started", "–"))[:19],
                f"{charts.format_number(sum(seconds))} s" if seconds else "–",
                charts.format_number(float(np.sum(tokens))) if np.sum(tokens) else "–",
                str(info.get("devices", "–")),
            ]
        )
    out = charts.table(head, body) + config_tables(arms, base_config)
    versions = runs[0].info.get("versions", {})
    if versions:
        listed = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
        out += f'<p class="note">Versions: {html.escape(listed)}</p>'
    full = json.dumps(runs[0].config, indent=1, default=str, sort_keys=True)
    out += f"<details><summary>whole configuration of {html.escape(runs[0].name)}</summary>"
    return out + f'<pre class="prompt">{html.escape(full)}</pre></details>'


def config_tables(arms: Sequence[collect.Arm], base_config: dict) -> str:
    """What the arms differ in, and what they share that is not as in configs/base.py."""
    configs = [arm.runs[0].config for arm in arms]
    keys = sorted({key for config in configs for key in config} - {collect.SEED_KEY})
    values = {key: [shown(config.get(key, "–")) for config in configs] for key in keys}
    differ = [[key, *values[key]] for key in keys if len(set(values[key])) > 1]
    common = [
        [key, shown(base_config.get(key, "–")), values[key][0]]
        for key in keys
        if len(set(values[key])) == 1 and values[key][0] != shown(base_config.get(key, "–"))
    ]
    out = ""
    if differ:
        out += "<h3>Configuration: what the arms differ in</h3>"
        out += charts.table(["key", *(arm.label for arm in arms)], differ, text=True)
    if common and base_config:
        out += "<h3>Configuration: all arms, where not as in configs/base.py</h3>"
        out += charts.table(["key", "base.py", "here"], common, text=True)
    return out


def shown(value) -> str:
    """A config value as text; a tuple reads the same as the list it is in JSON."""
    if isinstance(value, list | tuple | str):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


# ---------------------------------------------------------------- viewer


def viewer(trajectories: Sequence[dict], left_out: int) -> str:
    if not trajectories:
        return ""
    scores = [s for t in trajectories for s in t["scores"] or () if s is not None]
    scale = float(np.quantile(scores, 0.95)) if scores else 1.0
    return string.Template(asset("viewer.html")).substitute(
        data=script_json({"trajectories": trajectories, "scale": max(scale, 1e-6)}),
        scale=f"{scale:.2f}",
        more=f" {left_out} more are stored in the run directories." if left_out else "",
    )
