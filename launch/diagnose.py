# SPDX-License-Identifier: Apache-2.0
"""Does local teachability collapse on a model pair? The paper's diagnosis, with three controls.

  python -m launch.diagnose --config=configs/quickstart.py --workdir=runs/diagnosis
  python -m launch.diagnose --config=configs/paper.py:1.7b --workdir=gs://BUCKET/diagnosis \
      --num_batches=1

Nothing is trained. The config's student answers training prompts, the teacher scores them, and the
margins are searched for a drop. A run's student: --config.student.path=WORKDIR/student, which
launch.export also makes from a checkpoint.
Controls: the teacher's own responses to the same prompts, correct responses only, and the same
sentences in random order. Writes WORKDIR/diagnosis.json and prints it beside the paper's figures.
"""

import shlex
import sys

import numpy as np
from absl import flags

from launch import columns, config_flags, launcher
from opd_jax.algorithm.change_point import STRONG_GAIN

PAPER = ("the paper, Qwen3-1.7B", "", "", "", "79 %", "24.0", "13 %", "", "", "")
SIDES = (1, 3)  # least segments on either side of a change: the paper's letter, and our advice


def define_flags() -> None:
    config_flags.define()
    launcher.define()
    flags.DEFINE_string("workdir", None, "where diagnosis.json is written", required=True)
    flags.DEFINE_integer("num_batches", 8, "batches of config.data.batch_size prompts", 1)


def main(_) -> None:
    values = flags.FLAGS
    launcher.initialize(values.workdir)
    import jax

    from opd_jax.workdir import owner, preemption, records

    try:
        found = diagnose(values.config, values.workdir, values.num_batches)
    except preemption.Preempted:
        print("stopped: nothing of a diagnosis is kept, run it again", file=sys.stderr)
        sys.exit(preemption.EXIT_PREEMPTED)
    except (ValueError, OSError) as error:
        launcher.fail(f"ERROR: {error}")
    if jax.process_index() == 0:
        command = shlex.join(["python", "-m", "launch.diagnose", *sys.argv[1:]])
        known = {"commit": owner.commit(), "command": command}
        records.write_json(values.workdir, "diagnosis.json", known | found)
        print(as_text(found))


def diagnose(config, workdir: str, num_batches: int) -> dict:
    """{"groups": name -> figures, "profiles": name -> signal -> mean by relative position}."""
    from etils import epath

    from opd_jax import build
    from opd_jax.workdir import owner

    if (epath.Path(workdir) / "metrics.jsonl").exists():
        raise ValueError(
            f"--workdir={workdir} holds a run, and a diagnosis would change its files: set "
            f"--workdir to a directory of its own, and --config.student.path={workdir}/student for "
            "what that run has trained (launch.export makes it from a checkpoint)"
        )
    config = config.copy_and_resolve_references()
    config.evaluate.teacher = True  # its sampler answers the control's prompts
    config.log.signals_every_steps = 1  # spans and every signal are wanted
    with owner.hold(workdir), build.build(config, workdir) as run:
        cursor, sampler = run.prompts.state(), run.suite.evaluator.sampler
        student = measure(run, sampler, run.start.state.params, num_batches)
        run.prompts.restore(cursor)
        assert run.teacher_suite is not None  # config.evaluate.teacher is set above
        sampler = run.teacher_suite.evaluator.sampler
        teacher = measure(run, sampler, run.stages.frozen.teacher, num_batches)
    tables, profiles = zip(student, teacher, strict=True)
    return {"groups": groups(*tables), "profiles": merge(*profiles)}


# ---------------------------------------------------------------- measuring


def measure(run, sampler, params, num_batches: int) -> tuple[dict, dict]:
    """Figures per rollout (name -> [N]) and signals by position, of answers to the next prompts."""
    import jax
    import tqdm

    from opd_jax import parallel

    tables, profiles = [], []
    for batch in tqdm.trange(num_batches, disable=jax.process_index() != 0):
        key = jax.random.fold_in(run.key, batch)
        taken = run.stages.observe(
            params, next(run.prompts), key, 0, check=run.guard.check, sampler=sampler
        )
        chosen, valid_bt = taken.supervision, taken.rollout.valid_bt
        correct_b = run.recorder.correct(taken.prompts, taken.rollout)
        table = rollout_figures(chosen.margin_bt, chosen.usable_bt, chosen.spans_b, valid_bt)
        table |= {"correct": correct_b.astype(float), "truncated": ~taken.rollout.finished_b}
        rows = np.stack([np.asarray(v, float) for v in table.values()], axis=1)
        rows = parallel.gather_rows(run.stages.mesh, rows)
        tables.append(dict(zip(table, rows.T, strict=True)))
        profiles.append(position_sums(run.stages.mesh, taken, correct_b))
    table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    return table, jax.tree.map(lambda *parts: sum(parts), *profiles)


def rollout_figures(margin_bt, usable_bt, spans_b, valid_bt) -> dict[str, np.ndarray]:
    """Gain and release position of every rollout, and of its sentences in random order.

    `gain_S` and `position_S` for S = least segments on a side; position is the share of the
    response that stays supervised, nan where nothing is released. `shuffled_*` likewise.
    """
    from opd_jax.algorithm import change_point, segments

    length_b = valid_bt.sum(axis=1)
    out = {"length": length_b, "num_segments": np.array([len(s) for s in spans_b])}
    for kind in ("", "shuffled_"):
        for side in SIDES:
            gain_b, position_b = np.full((2, len(spans_b)), np.nan)
            for b, spans in enumerate(spans_b):
                score_s = segments.segment_scores(margin_bt[b], spans, usable_bt[b])
                first_s = np.array([start for start, _ in spans])[np.isfinite(score_s)]
                score_s = score_s[np.isfinite(score_s)]
                if kind:
                    score_s = np.random.default_rng(b).permutation(score_s)
                drop = change_point.find_drop(score_s, min_side=side)
                gain_b[b] = drop.gain
                if drop.index < len(score_s):
                    position_b[b] = first_s[drop.index] / length_b[b]
            out |= {f"{kind}gain_{side}": gain_b, f"{kind}position_{side}": position_b}
    return out


def position_sums(mesh, taken, correct_b) -> dict[str, dict]:
    """Sums and counts by relative position, of all rollouts and of the correct ones."""
    from opd_jax import parallel, recorder
    from opd_jax.algorithm import profiles

    found = recorder.token_signals(taken)
    wanted = ("margin", "advantage_variance", "abs_advantage", "student_entropy")
    found = {name: found[name] for name in wanted if name in found}
    out = {}
    for name, keep_b in (("all", np.ones_like(correct_b)), ("correct", correct_b)):
        kept = {k: (value, where & keep_b[:, None]) for k, (value, where) in found.items()}
        sums = profiles.by_position(kept, taken.rollout.valid_bt)
        out[name] = {k: parallel.sum_over_host_groups(mesh, v) for k, v in sums.items()}
    return out


# ---------------------------------------------------------------- figures


def groups(student: dict, teacher: dict) -> dict[str, dict]:
    """Figures of the student's rollouts and of each control."""
    correct = student["correct"] == 1
    return {
        "student's rollouts": figures(student),
        "  of these, wrong": figures(student, ~correct),
        "  of these, correct (control)": figures(student, correct),
        "  sentences shuffled (control)": figures(student, kind="shuffled_"),
        "teacher's own rollouts (control)": figures(teacher),
    }


def figures(table: dict, where=slice(None), kind: str = "") -> dict:
    """What is said of a group of rollouts; None where it is empty."""
    out: dict[str, float | None] = {"rollouts": len(table["correct"][where])}
    out["accuracy"] = _mean(table["correct"][where])
    out["truncated"] = _mean(table["truncated"][where])
    out["tokens"] = _mean(table["length"][where])
    out["segments"] = _mean(table["num_segments"][where])
    for side in SIDES:
        gain, position = (table[f"{kind}{name}_{side}"][where] for name in ("gain", "position"))
        finite = np.isfinite(gain)
        out[f"above_6_min_side_{side}"] = _mean(gain > STRONG_GAIN)
        out[f"gain_mean_min_side_{side}"] = _mean(gain[finite])
        released = position[np.isfinite(position)]
        out[f"released_min_side_{side}"] = _mean(np.isfinite(position))
        out[f"median_release_min_side_{side}"] = (
            float(np.median(released)) if len(released) else None
        )
    return out


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def merge(student: dict, teacher: dict) -> dict[str, dict[str, list]]:
    """Group -> signal -> mean per bin of relative position; None where a bin is empty."""
    sources = {
        "student": student["all"],
        "student, correct": student["correct"],
        "teacher's own": teacher["all"],
    }
    out = {}
    for group, sums in sources.items():
        names = [k.removesuffix("_sum") for k in sums if k.endswith("_sum")]
        out[group] = {
            name: [
                float(total / count) if count else None
                for total, count in zip(sums[f"{name}_sum"], sums[f"{name}_count"], strict=True)
            ]
            for name in names
        }
    return out


def table(found: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the diagnosis beside the paper's figures."""
    head = [
        "rollouts of",
        "number",
        "accuracy",
        "cut off",
        "gain > 6",
        "mean gain",
        "median release",
    ]
    head += ["gain > 6, min_side 3", "mean gain, min_side 3", "median release, min_side 3"]
    rows: list[list[str]] = [list(PAPER)]
    for name, f in found["groups"].items():
        cells = [name, str(f["rollouts"]), _percent(f["accuracy"]), _percent(f["truncated"])]
        for side in SIDES:
            gain = f[f"gain_mean_min_side_{side}"]
            cells += [
                _percent(f[f"above_6_min_side_{side}"]),
                "–" if gain is None else f"{gain:.1f}",
                _percent(f[f"median_release_min_side_{side}"]),
            ]
        rows.append(cells)
    return head, rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def as_text(found: dict) -> str:
    head, rows = table(found)
    return columns.align([head, *rows])


if __name__ == "__main__":
    define_flags()
    config_flags.run(main)
