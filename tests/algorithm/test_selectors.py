# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import re
import types

import numpy as np
import oracle
import pytest

from opd_jax.algorithm import selectors
from opd_jax.algorithm.selector import NEEDED_FOR, Selector, Signals, selection
from opd_jax.settings import number

LENGTH = np.array([30, 10, 0, 1, 22])
B, T, K = len(LENGTH), 32, 4
VALID = np.arange(T) < LENGTH[:, None]


def spans_of(length, step=3):
    return [(i, min(i + step, int(length))) for i in range(0, int(length), step)]


def signals(seed=0, **changes):
    rng = np.random.default_rng(seed)
    logp, logq = (np.log(rng.dirichlet(np.ones(9), (B, T))[..., :K]) for _ in range(2))
    made = dict(
        valid_bt=VALID,
        finished_b=np.array([True, False, False, True, True]),
        margin_bt=rng.exponential(size=(B, T)),
        advantage_bt=rng.normal(size=(B, T)),
        student_entropy_bt=rng.random((B, T)),
        candidate_logp_btk=logp,
        teacher_logp_btk=logq,
        spans_b=[spans_of(n) for n in LENGTH],
        rng=np.random.default_rng(seed),
    )
    return Signals(**(made | changes))


def with_drop(at_segment=4):
    """Row 0 loses its margin after `at_segment` segments of three tokens; the others never do."""
    margin = np.full((B, T), 2.0)
    margin[0, 3 * at_segment :] = 0.1
    return signals(margin_bt=margin)


@pytest.mark.parametrize("kind", selectors.SELECTORS)
def test_every_selector_keeps_to_valid_and_usable_tokens(kind):
    usable = VALID.copy()
    usable[0, 5] = usable[4, :] = False
    poisoned = {
        name: np.where(usable if value.ndim == 2 else usable[..., None], value, np.nan)
        for name, value in vars(signals()).items()
        if getattr(value, "dtype", None) == np.float64
    }
    chosen = selectors.build(kind)(signals(usable_bt=usable, **poisoned))
    assert chosen.supervised_bt.dtype == bool and chosen.weight_bt.dtype == np.float32
    assert not np.any(chosen.supervised_bt & ~usable)
    assert np.all(chosen.weight_bt[~usable] == 0) and np.all(np.isfinite(chosen.weight_bt))
    np.testing.assert_array_equal(chosen.weight_bt > 0, chosen.supervised_bt)
    assert np.all((0 <= chosen.release_b) & (chosen.release_b <= LENGTH))


@pytest.mark.parametrize("kind", selectors.SELECTORS)
def test_unusable_tokens_equal_deleted_ones(kind):
    # Row 0 with tokens 3..5 (a whole segment) unusable, against the row without them.
    if kind in ("fixed_prefix", "fixed_fraction", "suffix_only", "growing_prefix"):
        pytest.skip("these count tokens, bad or not: a position is a position")
    usable = VALID.copy()
    usable[0, 3:6] = False
    full = signals()
    masked = selectors.build(kind)(dataclasses.replace(full, usable_bt=usable))
    kept = np.r_[0:3, 6:T]

    def delete(x):
        if not isinstance(x, np.ndarray) or x.ndim < 2:
            return x
        x = x.copy()
        x[0, : T - 3] = x[0, kept]
        x[0, T - 3 :] = 0
        return x

    fields = {k: delete(v) for k, v in vars(full).items() if k not in ("rng", "usable_bt")}
    spans = [spans_of(27), *full.spans_b[1:]]
    deleted = selectors.build(kind)(
        Signals(**(fields | dict(spans_b=spans, rng=np.random.default_rng(0))))
    )
    if kind in ("shuffled_bic", "random_bic"):  # shares of another length: only the gain is equal
        np.testing.assert_allclose(masked.gain_b, deleted.gain_b)
        return
    np.testing.assert_array_equal(masked.supervised_bt[0, kept], deleted.supervised_bt[0, : T - 3])
    np.testing.assert_allclose(masked.weight_bt[0, kept], deleted.weight_bt[0, : T - 3], rtol=1e-6)
    np.testing.assert_array_equal(masked.supervised_bt[1:], deleted.supervised_bt[1:])


def test_the_release_rule_row_by_row_against_the_loops():
    found = signals(3)
    chosen = selectors.build("bic")(found)
    for b in range(B):
        scores = [
            oracle.segment_score(list(found.margin_bt[b, start:end]))
            for start, end in spans_of(LENGTH[b])
        ]
        index, gain, *_ = oracle.find_drop(scores)
        release = spans_of(LENGTH[b])[index][0] if index < len(scores) else LENGTH[b]
        assert chosen.release_b[b] == release
        assert chosen.gain_b[b] == pytest.approx(gain, rel=1e-6)
        np.testing.assert_array_equal(chosen.supervised_bt[b], np.arange(T) < release)


def test_a_drop_releases_its_suffix_and_no_drop_releases_nothing():
    chosen = selectors.build("bic")(with_drop())
    np.testing.assert_array_equal(chosen.release_b, [12, 10, 0, 1, 22])
    np.testing.assert_array_equal(chosen.supervised_bt.sum(1), [12, 10, 0, 1, 22])
    np.testing.assert_array_equal(np.isfinite(chosen.gain_b), [True, False, False, False, False])


def test_a_segment_without_usable_tokens_moves_the_release_to_the_next_one_kept():
    usable = VALID.copy()
    usable[0, 12:15] = False  # the first segment after the drop
    chosen = selectors.build("bic")(dataclasses.replace(with_drop(), usable_bt=usable))
    assert chosen.release_b[0] == 15
    assert chosen.supervised_bt[0].sum() == 12


def test_mask_knobs():
    found = with_drop()
    eos = selectors.build("bic", keep_eos=True)(found)
    assert eos.supervised_bt[0, 29] and eos.supervised_bt[0].sum() == 13
    least = selectors.build("bic", min_supervised_tokens=20)(found)
    np.testing.assert_array_equal(least.release_b, [20, 10, 0, 1, 22])
    tail = selectors.build("bic", tail_weight=0.25)(found)
    np.testing.assert_array_equal(tail.weight_bt[0], [1.0] * 12 + [0.25] * 18 + [0.0] * 2)
    assert tail.supervised_bt[0].sum() == 12
    fixed = selectors.build("bic", on_no_change="prefix", no_change_length=5)(found)
    np.testing.assert_array_equal(fixed.release_b, [12, 5, 0, 1, 5])
    strict = selectors.build("bic", min_gain=1e6)(found)
    np.testing.assert_array_equal(strict.release_b, LENGTH)
    robust = selectors.build("bic", robust=True)(found)
    assert robust.release_b[0] == 12


def test_bic_knobs_reach_the_search():
    found = with_drop(at_segment=1)
    assert selectors.build("bic")(found).release_b[0] == 3
    assert selectors.build("bic", min_side=2)(found).release_b[0] == 6
    assert selectors.build("bic", min_segments=11)(found).release_b[0] == 30
    assert selectors.build("bic", min_drop=5.0)(found).release_b[0] == 30
    assert selectors.build("bic", penalty_change=1e3)(found).release_b[0] == 30
    raw = selectors.build("bic", transform="none", aggregate="median", eps=1.0)(found)
    assert 0 < raw.gain_b[0] < selectors.build("bic")(found).gain_b[0]


def test_prefixes_and_suffixes():
    found = signals()

    def sums(kind, **knobs):
        return list(selectors.build(kind, **knobs)(found).supervised_bt.sum(1))

    assert sums("full") == [30, 10, 0, 1, 22]
    assert sums("fixed_prefix", length=8) == [8, 8, 0, 1, 8]
    assert sums("fixed_fraction", fraction=0.1) == [3, 1, 0, 1, 3]
    assert sums("fixed_fraction", fraction=0) == [9, 3, 0, 1, 7]  # 0: the kind's own default
    suffix = selectors.build("suffix_only", fraction=0.1)(found)
    np.testing.assert_array_equal(np.flatnonzero(suffix.supervised_bt[0]), [27, 28, 29])


@pytest.mark.parametrize("step, length", [(0, 4), (5, 14), (9, 22), (50, 22)])
def test_the_growing_prefix_grows_over_its_steps(step, length):
    selector = selectors.build("growing_prefix", start_length=4, end_length=22, grow_steps=10)
    chosen = selector(signals(step=step, num_steps=100))
    np.testing.assert_array_equal(chosen.release_b, np.minimum(LENGTH, length))


def test_shuffled_release_points_are_the_batchs_own_shares():
    margin = np.full((B, T), 2.0)
    margin[0, 12:], margin[4, 6:] = 0.1, 0.1
    found = signals(margin_bt=margin, rng=np.random.default_rng(3))
    plain = selectors.build("bic")(found).release_b / np.maximum(LENGTH, 1)
    share = [12 / 30, 1.0, 1.0, 1.0, 6 / 22]  # an empty row releases nothing and says so
    np.testing.assert_allclose(plain, [12 / 30, 1, 0, 1, 6 / 22])
    chosen = selectors.build("shuffled_bic")(found)
    order = np.random.default_rng(3).permutation(B)
    wanted = [math.ceil(share[o] * n - 1e-9) for o, n in zip(order, LENGTH, strict=True)]
    np.testing.assert_array_equal(chosen.release_b, wanted)
    assert list(order) != sorted(order)
    np.testing.assert_array_equal(chosen.gain_b, selectors.build("bic")(found).gain_b)


@pytest.mark.parametrize(
    "kind", [kind for kind, cls in selectors.SELECTORS.items() if cls.scope == "batch"]
)
def test_two_hosts_select_what_one_would(kind):
    """Each half of the batch, with a gather that answers from the whole."""
    whole, half = signals(5), 2
    rows = {k: v for k, v in vars(whole).items() if isinstance(v, np.ndarray | list)}
    alone = selectors.build(kind)(dataclasses.replace(whole, rng=np.random.default_rng(9)))

    def host(first, stop):
        asked = []

        def gather(mine):
            asked.append(mine)
            return gathered[len(asked) - 1]

        part = {k: v[first:stop] for k, v in rows.items()}
        made = Signals(**part, gather=gather, first_row=first, rng=np.random.default_rng(9))
        return made, asked

    # First pass: learn what each host hands to gather; the whole is their concatenation.
    gathered = []

    def record(mine):
        gathered.append(mine)
        return mine

    recorded = dataclasses.replace(whole, gather=record, rng=np.random.default_rng(9))
    selectors.build(kind)(recorded)
    for first, stop in ((0, half), (half, B)):
        made, asked = host(first, stop)
        chosen = selectors.build(kind)(made)
        np.testing.assert_array_equal(chosen.supervised_bt, alone.supervised_bt[first:stop])
        for mine, all_rows in zip(asked, gathered, strict=True):
            np.testing.assert_array_equal(mine, all_rows[first:stop])


def test_position_weights_equal_the_loop():
    found = signals()
    chosen = selectors.build("iw_opd", gamma=0.5)(found)
    for b, n in enumerate(LENGTH):
        wanted = oracle.iw_weights(list(found.advantage_bt[b, :n]), 0.5) if n else []
        np.testing.assert_allclose(chosen.weight_bt[b, :n], wanted, rtol=1e-6)
    zero = selectors.build("iw_opd")(signals(advantage_bt=np.zeros((B, T))))
    np.testing.assert_array_equal(zero.weight_bt[VALID], np.float32(1.5))


def top(score_bt, fraction):
    """The rule as loops: sort all valid tokens by score, first comes first among equals."""
    places = [(-score_bt[b][t], b, t) for b in range(B) for t in range(LENGTH[b])]
    num = max(1, math.ceil(fraction * len(places) - 1e-9))
    return {(b, t) for _, b, t in sorted(places)[:num]}


def unit(values, low, high):
    return {k: min(max((v - low) / (high - low), 0.0), 1.0) for k, v in values.items()}


def test_top_entropy_equals_the_loop_and_ties_go_to_the_first():
    found = signals()
    chosen = selectors.build("entropy", fraction=0.3)(found)
    wanted = top(found.student_entropy_bt.astype(np.float32), 0.3)
    assert {tuple(bt) for bt in np.argwhere(chosen.supervised_bt)} == wanted
    flat = selectors.build("entropy", fraction=0.1)(signals(student_entropy_bt=np.ones((B, T))))
    np.testing.assert_array_equal(np.argwhere(flat.supervised_bt), [[0, t] for t in range(7)])


def test_teachability_equals_the_loop():
    found = signals()
    divergence, mass = {}, {}
    for b, t in map(tuple, np.argwhere(VALID)):
        p = oracle.renormalised(found.candidate_logp_btk[b, t])
        q = oracle.renormalised(found.teacher_logp_btk[b, t])
        divergence[b, t] = np.float32(oracle.kl(q, p))
        mass[b, t] = np.float32(sum(math.exp(x) for x in found.teacher_logp_btk[b, t]))
    scaled = [
        unit(x, *np.quantile(np.array(list(x.values()), np.float64), [0.05, 0.95]))
        for x in (divergence, mass)
    ]
    score = np.zeros((B, T))
    for place in divergence:
        score[place] = scaled[0][place] * scaled[1][place]
    wanted = top(score, 0.1)
    for b in (0, 1, 3, 4):  # at least one token per row
        wanted.add((b, int(np.argmax(score[b, : LENGTH[b]]))))
    chosen = selectors.build("ta_opd", fraction=0.1)(found)
    assert {tuple(map(int, bt)) for bt in np.argwhere(chosen.supervised_bt)} == {
        (int(b), int(t)) for b, t in wanted
    }


def test_tip_equals_the_loop():
    found = signals()
    entropy, divergence = {}, {}
    for b, t in map(tuple, np.argwhere(VALID)):
        p = [math.exp(x) for x in found.candidate_logp_btk[b, t]]
        q = [math.exp(x) for x in found.teacher_logp_btk[b, t]]
        entropy[b, t] = np.float32(found.student_entropy_bt[b, t])
        divergence[b, t] = np.float32(oracle.kl([*p, 1 - sum(p)], [*q, 1 - sum(q)]))
    h, d = (unit(x, min(x.values()), max(x.values())) for x in (entropy, divergence))
    score = np.zeros((B, T))
    for place in h:
        score[place] = h[place] + d[place] - h[place] * d[place]
    chosen = selectors.build("tip", fraction=0.5)(found)
    assert {tuple(bt) for bt in np.argwhere(chosen.supervised_bt)} == top(score, 0.5)


@pytest.mark.parametrize("field, need", NEEDED_FOR.items())
def test_reading_a_signal_that_was_not_asked_for_is_refused_and_says_what_to_add(field, need):
    with pytest.raises(AttributeError, match=f"signals.{field}.*add '{need}' to its `needs`"):
        getattr(Signals(valid_bt=VALID), field)
    assert getattr(signals(), field) is not None


@pytest.mark.parametrize("kind", selectors.SELECTORS)
def test_every_selector_names_what_it_reads(kind):
    """With nothing else handed out. Catches a name that is missing in `needs`."""
    selector = selectors.build(kind)
    dropped = {field: None for field, need in NEEDED_FOR.items() if need not in selector.needs}
    selector(signals(**dropped))


def test_a_setting_of_another_kind_is_refused_unless_it_is_at_its_default():
    section = dict(selectors.DEFAULTS)
    for kind in selectors.SELECTORS:
        assert selectors.of({"kind": kind, **section}) == selectors.build(kind)
    assert selectors.of({"kind": "bic", **section, "min_side": 3}).min_side == 3
    assert selectors.of({"kind": "tip", **section, "fraction": 0.25}).fraction == 0.25
    for kind, name, value, works in (
        ("full", "min_side", 3, "selector.min_side=1, or --config.selector.kind=bic"),
        ("bic", "length", 64, "selector.length=1024, or --config.selector.kind=fixed_prefix"),
        ("iw_opd", "fraction", 0.5, "selector.fraction=0.0, or --config.selector.kind=fixed_f"),
    ):
        given = f"config.selector.{name}={value} is not read by kind={kind}. Set --config.{works}"
        with pytest.raises(ValueError, match=re.escape(given)):
            selectors.of({"kind": kind, **section, name: value})


def test_a_selector_of_ones_own_needs_no_key_in_the_config(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class EveryOther(Selector):
        step: int = number(2, least=1)

        def __call__(self, signals):
            return selection(signals, signals.valid_bt & (signals.position_1t % self.step == 0))

    monkeypatch.setitem(selectors.SELECTORS, "every_other", EveryOther)
    monkeypatch.setattr(selectors, "Kind", lambda kind: types.SimpleNamespace(kind=kind))
    chosen = selectors.of({"kind": "every_other", **selectors.DEFAULTS})(signals())
    np.testing.assert_array_equal(chosen.supervised_bt.sum(1), [15, 5, 0, 1, 11])
