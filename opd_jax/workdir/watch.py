# SPDX-License-Identifier: Apache-2.0
"""Named warnings for the known ways in which on-policy distillation goes wrong, with what to try.

Each compares the last `WINDOW` steps with the first `WINDOW` of the run, or with a fixed bound.
They look and speak; they change nothing.
"""

import math

WINDOW = 5  # steps; one odd batch is no trend


def warnings(rows: list[dict]) -> dict[str, str]:
    """Warnings that hold after the last of `rows` (metrics by step, oldest first), by name."""
    found = {}
    rows = [row for row in rows if "response/length_mean" in row]
    if len(rows) < WINDOW:
        return found
    first, last = rows[:WINDOW], rows[-WINDOW:]

    def mean(key, of):
        values = [row[key] for row in of if row.get(key) is not None and math.isfinite(row[key])]
        return sum(values) / len(values) if values else math.nan

    now, then = mean("response/length_mean", last), mean("response/length_mean", first)
    if len(rows) >= 2 * WINDOW and now > 1.5 * then:
        found["length_inflation"] = (
            f"responses grew from {then:.0f} to {now:.0f} tokens; see response/repetition_rate, "
            "lower --config.optim.learning_rate, or keep EOS supervised with "
            "--config.selector.keep_eos=True"
        )
    if (rate := mean("response/repetition_rate", last)) > 0.5:
        found["repetition_saturation"] = (
            f"{rate:.0%} of the 4-grams repeat earlier ones; lower --config.optim.learning_rate or "
            "cap the advantage with --config.objective.advantage_clip=5.0"
        )
    if mean("response/truncation_rate", last) > 0.9:
        found["truncation"] = (
            "over 90% of the responses hit the length limit and never train their end; raise "
            "--config.rollout.response_len"
        )
    rate = mean("release/rate", last)
    if rate in (0.0, 1.0) and math.isfinite(mean("bic/gain_mean", last)):
        what = "no row is" if rate == 0.0 else "every row is"
        hint = "0.0, or look at margin/mean" if rate == 0.0 else "6.0, or selector.min_side=3"
        found[f"release_rate_stuck_at_{rate:.0f}"] = (
            f"{what} released in the last {WINDOW} steps; try --config.selector.min_gain={hint}"
        )
    now, then = mean("student/entropy", last), mean("student/entropy", first)
    if len(rows) >= 2 * WINDOW and now < 0.1 * then:
        found["entropy_collapse"] = (
            f"the student's entropy fell from {then:.3f} to {now:.3f} nats; lower "
            "--config.optim.learning_rate, or compare eval/accuracy with an earlier checkpoint"
        )
    now, then = mean("sampler_gap/mean", last), mean("sampler_gap/mean", first)
    if now > 0.05 and now > 2 * then:
        found["sampler_gap"] = (
            f"sampler and trainer log-probs differ by {now:.3f} nats (at first {then:.3f}); use "
            "--config.model.compute_dtype=float32, or --config.objective.is_threshold=5.0"
        )
    return found
