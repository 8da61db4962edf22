# SPDX-License-Identifier: Apache-2.0
"""One stored rollout through the five equations of the release rule, without a model.

python -m examples.release_rule                                     # the rollout beside this file
python -m examples.release_rule runs/mine/rollouts/step_000020.jsonl 3     # line 3 of a run's own

rollout.jsonl is a student's answer to a problem of the embedded task, as a run stores it under
WORKDIR/rollouts (`--config=configs/study.py:collapse --config.num_steps=1`): the student of that
pair was built to fall into aimless talk. Settings are the paper's; the sampler's log-probs stand
for the trainer's. docs/method.md has the equations and their sources.
"""

import argparse
import json
import pathlib

import numpy as np

from opd_jax.algorithm import change_point, margin, segments
from opd_jax.algorithm.weights import loss_weights

ROLLOUT = pathlib.Path(__file__).with_name("rollout.jsonl")
SHOWN = 6  # tokens of a table, where all would be too many


def main(argv: list[str] | None = None) -> int:
    """Prints the rollout and returns its release point, in tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "file", nargs="?", default=ROLLOUT, help="a step's file of WORKDIR/rollouts"
    )
    parser.add_argument("line", nargs="?", type=int, default=1, help="from 1")
    given = parser.parse_args(argv)
    row = json.loads(pathlib.Path(given.file).read_text().splitlines()[given.line - 1])

    print(f"{row['prompt'].strip()}\n")
    margin_t = show_margins(row)
    spans, score_s = show_sentences(row, margin_t)
    release = show_change_point(spans, score_s, len(margin_t))
    show_loss(row, release)
    return release


def show_margins(row: dict) -> np.ndarray:
    """Eq. (1). float[T], nats."""
    teacher_logp_tk = np.array([[logp for _, _, logp in k] for k in row["candidates"]])
    margin_t = margin.teacher_margin(teacher_logp_tk)
    title("(1)  M_t = log p_T(best) - log p_T(second best), of the student's K candidates")
    for t in range(SHOWN):
        candidates = sorted(row["candidates"][t], key=lambda candidate: -candidate[2])
        names = "  ".join(f"{name!r} {logp:.2f}" for name, _, logp in candidates)
        print(f"  t={t:<3} {row['pieces'][t]!r:14} M_t = {margin_t[t]:6.2f}    {names}")
    print(f"  ... {len(margin_t)} tokens, mean {margin_t.mean():.2f} nats")
    return margin_t


def show_sentences(row: dict, margin_t: np.ndarray) -> tuple[segments.Spans, np.ndarray]:
    """Eq. (2). The sentences' spans of tokens, and their scores."""
    # A special token has a name but no bytes.
    token_bytes = [b"" if piece.startswith("<|") else piece.encode() for piece in row["pieces"]]
    spans = segments.segment(token_bytes)
    score_s = segments.segment_scores(margin_t, spans)
    title("(2)  S_i = log(1 + mean of M_t over sentence i)")
    for i, ((start, end), score) in enumerate(zip(spans, score_s, strict=True)):
        text = "".join(row["pieces"][start:end])
        print(f"  i={i:<3} tokens {start:>3} to {end - 1:<3}  S_i = {score:.2f}  {text!r}")
    return spans, score_s


def show_change_point(spans: segments.Spans, score_s: np.ndarray, num_tokens: int) -> int:
    """Eq. (3). The index of the first token that is no longer supervised."""
    title("(3)  BIC_0 = n log((RSS_0+eps)/n) + log n;  BIC_1(tau), two means, with 3 log n")
    drop = change_point.find_drop(score_s)
    release = spans[drop.index][0] if drop.index < len(spans) else num_tokens
    curve = change_point.bic_curve(change_point.centred(score_s))
    print(f"  BIC_0 = {drop.bic_none:.2f}")
    for tau in range(1, len(spans)):
        mark = "  <- tau*" if tau == drop.best else ""
        rise = "" if curve.drop[tau] > 0 else "  (a rise, does not compete)"
        print(
            f"  tau={tau:<3} BIC_1 = {curve.bic_change[tau]:7.2f}   mean before - after = "
            f"{curve.drop[tau]:5.2f}{rise}{mark}"
        )
    if release < num_tokens:
        print(
            f"  BIC_0 - BIC_1(tau*) = {drop.gain:.2f} > 0: released after {drop.index} sentences,"
        )
    else:
        print(f"  BIC_0 - BIC_1(tau*) = {drop.gain:.2f}, not above 0: nothing is released,")
    print(f"  release point: token {release} of {num_tokens}")
    return release


def show_loss(row: dict, release: int) -> None:
    """Eq. (4) and (5), around the release point."""
    student_logp_t, teacher_logp_t = np.array(row["sampler_logp"]), np.array(row["teacher_logp"])
    num_tokens = len(student_logp_t)
    valid_1t = np.ones((1, num_tokens), bool)
    q_1t = np.arange(num_tokens)[None] < release
    weight_1t, _, factor_1 = loss_weights(q_1t, q_1t.astype(float), valid_1t)
    advantage_t = teacher_logp_t - student_logp_t
    title("(4)  L_t = -A'_t log p_S(y_t),  A_t = log p_T(y_t) - log p_S(y_t), held constant")
    title(f"(5)  A'_t = A_t q_t (sum l)/(sum l q) = A_t q_t * {num_tokens}/{release}")
    for t in range(max(0, release - SHOWN // 2), min(num_tokens, release + SHOWN // 2)):
        scaled = advantage_t[t] * factor_1[0] if q_1t[0, t] else 0.0
        print(
            f"  t={t:<3} {row['pieces'][t]!r:14} A_t = {advantage_t[t]:6.2f}   q_t = {q_1t[0, t]:d}"
            f"   A'_t = {scaled:6.2f}   L_t = {0.0 - scaled * student_logp_t[t]:5.2f}"
            f"   weight in the row's mean = {weight_1t[0, t]:.4f}"
        )
    print(f"  the {release} weights sum to {weight_1t.sum():.4f}: a mean over supervised tokens")


def title(text: str) -> None:
    print(f"\n{text}\n")


if __name__ == "__main__":
    main()
