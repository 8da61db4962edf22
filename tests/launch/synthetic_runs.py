# SPDX-License-Identifier: Apache-2.0
"""Made-up run directories in the real format: a student that falls apart, and hostile text."""

import json

import numpy as np

from opd_jax.workdir import records

HOSTILE = (
    "</script><script>window.owned = 1</script><img src=x onerror=window.owned=1> & <b>bold</b>"
)
SENTENCES = (
    "Ann has seven plums .",
    " Then Bob adds four and we have eleven .",
    " Cara takes two , leaving nine .",
    " So nine is odd .",
    " Wait , perhaps the box holds ten ?",
    " Maybe we should look at it again .",
    " Some of it may be so .",
    " It could be more or less then .",
    " The answer is \\boxed{nine} .",
)
VOCABULARY = ["nine", "ten", "the", "<b>", "\n", "é", " plum", '"']


def make_run(path, *, config=None, seed=0, steps=40, gain=0.3, collapse=True, hostile=False):
    """Writes one run of `steps` updates whose accuracy rises by about `gain`."""
    rng = np.random.default_rng([seed, round(1000 * gain)])
    path.mkdir(parents=True)
    resolved = {"seed": seed, "num_steps": steps, "selector": {"kind": "bic"}} | (config or {})
    (path / "config.json").write_text(json.dumps(resolved))
    run = dict(commit="0123456789abcdef", started="2026-11-21T18:00:00Z", devices="1 cpu")
    (path / "run.json").write_text(json.dumps(run | {"versions": {"jax": "0.10.2"}}))
    with open(path / "metrics.jsonl", "w") as file:
        for row in metrics_rows(rng, steps, gain, collapse):
            file.write(json.dumps(row) + "\n")
    for step in range(1, steps + 1):
        share = step / steps
        records.write_signals(path, step, make_signals(rng, collapse * (1 - 0.7 * share)))
    for step in (1, steps):
        rollouts = [make_trajectory(rng, step, row, collapse, hostile) for row in range(4)]
        records.write_rollouts(path, step, rollouts)


def metrics_rows(rng, steps, gain, collapse):
    for step in range(steps + 1):
        share = step / steps
        accuracy = 0.3 + gain * (1 - np.exp(-3 * share)) + rng.normal(0, 0.015)
        row = {"step": step}
        if step % 5 == 0:
            row |= {"eval/accuracy": accuracy, "eval/ood_accuracy": accuracy - 0.1}
            row |= {f"eval/accuracy_{e}": accuracy + d for e, d in (("low", -0.05), ("high", 0.05))}
            row |= {f"eval/{f}/accuracy": accuracy + d for f, d in (("total", 0.1), ("sort", -0.1))}
        if step:
            row |= {
                "tokens/supervised": 800 if collapse else 2000,
                "tokens/sampled": 2500,
                "loss": 0.8 * np.exp(-2 * share) + rng.normal(0, 0.02),
                "release/rate": 0.7 * (1 - 0.6 * share) * collapse,
                "release/position_median": 0.2 + 0.2 * share if collapse else None,
                "release/supervised_fraction": 0.4 + 0.4 * share if collapse else 1.0,
                "bic/gain_above_6": 0.6 * (1 - 0.7 * share) if collapse else None,
                "bic/gain_mean": 20 * (1 - 0.5 * share) if collapse else None,
                "response/length_mean": 80 + rng.normal(0, 3),
                "response/truncation_rate": 0.05,
                "response/repetition_rate": 0.1 - 0.05 * share,
                "student/entropy": 0.5 - 0.3 * share,
                "sampler_gap/mean": 1e-6,
                "grad_norm": 1 + rng.normal(0, 0.1),
                "time/step": 1.6 + (8 if step == 1 else 0),
                "time/rollout": 0.9,
                "time/score": 0.2,
                "time/update": 0.5,
                "memory/peak_gib": 1.2,
            }
        yield row


def make_signals(rng, collapse, num_rollouts=32):
    x = (np.arange(20) + 0.5) / 20
    count = np.full(20, 100.0)
    margin = 3 + 6 * np.exp(-8 * x * collapse)
    by_position = {}
    for name, mean in (
        ("margin", margin),
        ("advantage_variance", 0.2 * margin**2),
        ("abs_advantage", 2 + x),
    ):
        by_position |= {
            f"{name}_sum": count * (mean + rng.normal(0, 0.2, 20)),
            f"{name}_count": count,
        }
    sentences = np.arange(1, rng.integers(12, 16))
    by_sentence = {
        "margin_sum": 90 * np.exp(-0.2 * sentences * collapse),
        "margin_count": 30.0 + 0 * sentences,
    }
    length = rng.integers(60, 140, num_rollouts)
    released = rng.random(num_rollouts) < 0.8 * collapse
    release = np.where(
        released, np.maximum(3, length * rng.beta(2, 6, num_rollouts)), length
    ).astype(int)
    return records.signals_arrays(
        by_position=by_position,
        by_sentence=by_sentence,
        length_b=length,
        release_b=release,
        gain_b=np.where(released, rng.gamma(3, 8, num_rollouts), rng.normal(-4, 2, num_rollouts)),
        rescale_b=length / release,
        num_segments_b=length // 8,
    )


def make_trajectory(rng, step, row, collapse, hostile):
    text = list(SENTENCES) * (1 + row)
    if hostile:
        text[1] = " " + HOSTILE
    words = [[w for w in _split(s)] for s in text]
    starts = np.cumsum([0, *(len(w) for w in words)])
    tokens = [w.encode() for sentence in words for w in sentence] + [b""]
    T, K = len(tokens), 4
    spans = [(int(a), int(b)) for a, b in zip(starts, starts[1:], strict=False)]
    spans[-1] = (spans[-1][0], T)
    change = 4 if collapse else len(spans)
    margin = (
        np.where(np.arange(T) < spans[min(change, len(spans) - 1)][0], 6.0, 1.0)
        if collapse
        else np.full(T, 6.0)
    )
    margin = margin * rng.uniform(0.6, 1.4, T)
    release = spans[change][0] if collapse else T
    return records.Trajectory(
        step=step,
        row=row,
        example_id=f"total-{row}",
        family="total",
        prompt="<|im_start|>user\nAnn has seven plums. Bob adds four. How many?<|im_end|>\n",
        answer="nine",
        correct=row % 2 == 0,
        finished=row != 3,
        token_t=np.arange(T) % len(VOCABULARY),
        token_bytes_t=tokens,
        name=lambda i: "<|im_end|>" if i == (T - 1) % len(VOCABULARY) else VOCABULARY[i],
        sampler_logp_t=-rng.gamma(1, 0.4, T),
        candidates_tk=rng.permuted(np.tile(np.arange(8), (T, 1)), axis=1)[:, :K],
        candidate_logp_tk=-np.sort(rng.gamma(1, 2, (T, K))),
        teacher_logp_t=-rng.gamma(1, 1.5, T),
        teacher_logp_tk=-rng.gamma(1, 4, (T, K)),
        margin_t=margin,
        supervised_t=np.arange(T) < release,
        weight_t=np.where(np.arange(T) < release, T / release, 0.0),
        spans=spans,
        score_s=[float(np.log1p(margin[a:b].mean())) for a, b in spans],
        change_point=change,
        release=release,
        gain=float(rng.gamma(3, 8)) if collapse else -3.0,
    ).as_json()


def _split(sentence):
    parts = sentence.split(" ")
    return [p if i == 0 else " " + p for i, p in enumerate(parts) if p or i]
