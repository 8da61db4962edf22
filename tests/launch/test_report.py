# SPDX-License-Identifier: Apache-2.0
"""The report: what it shows, that nothing outside is needed, and that model output stays text."""

import html.parser
import json
import re

import chromium
import numpy as np
import pytest
import synthetic_runs

from launch import diagnose
from launch.report import __main__ as report
from launch.report import charts
from launch.study import collect


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    synthetic_runs.make_run(path, hostile=True)
    report.main([f"--workdir={path}", "--title=<b>A & B</b>"])
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for kind, gain in (("full", 0.34), ("bic", 0.2)):
        for seed in range(3):
            config = {"selector": {"kind": kind}}
            path = root / f"{kind}-{seed}"
            synthetic_runs.make_run(
                path, config=config, seed=seed, gain=gain, collapse=kind != "full", steps=20
            )
    return root


class Parser(html.parser.HTMLParser):
    """Tags that hold something, the text outside scripts, and the content of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._in_script = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        (self.scripts if self._in_script else self.text).append(data)


def test_the_page_needs_nothing_from_outside_and_closes_every_script_itself(hostile_run):
    parsed = Parser((hostile_run / "report.html").read_text())
    names = [name for name, _ in parsed.tags]
    assert not {"img", "link", "iframe", "object"} & set(names)
    assert all(not {"src", "href"} & set(a) for n, a in parsed.tags if n != "a")
    assert not [k for _, a in parsed.tags for k in a if k.startswith("on")]
    assert names.count("script") == 3  # the data and our two scripts
    assert "window.owned" in parsed.scripts[0] and "<" not in parsed.scripts[0]
    assert json.loads(parsed.scripts[0])["trajectories"][0]["pieces"]
    assert "<b>A & B</b>" in parsed.text  # the title is text too


def test_every_chart_has_axes_with_names_and_its_numbers_as_a_table(hostile_run):
    text = (hostile_run / "report.html").read_text()
    figures = re.findall(r"<figure.*?</figure>", text, re.S)
    assert len(figures) > 15
    for figure in figures:
        assert "<table>" in figure
        if "data-chart" in figure:
            assert figure.count('class="label mid"') == 2, re.findall("<figcaption>.*?<", figure)


def test_the_head_says_what_was_run_and_what_differs_from_the_base_config(hostile_run):
    text = " ".join(Parser((hostile_run / "report.html").read_text()).text)
    for expected in ("1 run, 40 updates, commit 0123456789ab", "num_steps", "jax 0.10.2", "79 %"):
        assert expected in text


def test_seeds_of_one_config_are_one_arm_named_by_what_differs(study):
    arms = collect.arms(collect.find_runs([study]))
    assert {a.label: [r.seed for r in a.runs] for a in arms} == {
        "kind=full": [0, 1, 2],
        "kind=bic": [0, 1, 2],
    }
    steps, values = arms[0].curve("eval/accuracy")
    assert steps.tolist() == [0, 5, 10, 15, 20]
    final = [r.rows[-1]["eval/accuracy"] for r in arms[0].runs]
    assert values[-1].mean == pytest.approx(np.mean(final))
    half = 4.302653 * np.std(final, ddof=1) / np.sqrt(3)  # t table, 2 degrees of freedom
    assert values[-1].high - values[-1].mean == pytest.approx(half, rel=1e-5)


def test_seeds_from_before_and_after_a_new_key_are_one_arm(tmp_path):
    """Seeds 0 and 1 are older than the key; 2 has its default, 3 another value."""
    for seed, knobs in enumerate(({}, {}, {"trim": 0.1}, {"trim": 0.2})):
        config = {"selector": {"kind": "bic"} | knobs}
        synthetic_runs.make_run(tmp_path / f"{seed}", config=config, seed=seed, steps=2)
    arms = collect.arms(collect.find_runs([tmp_path]))
    assert {a.label: [r.seed for r in a.runs] for a in arms} == {
        "trim=0.1": [0, 1, 2],
        "trim=0.2": [3],
    }


def test_curves_against_tokens_and_seconds_use_the_runs_own_totals(study):
    full = next(a for a in collect.arms(collect.find_runs([study])) if a.label == "kind=full")
    tokens, _ = full.curve("eval/accuracy", "total/supervised_tokens")
    np.testing.assert_allclose(tokens, [0, 10000, 20000, 30000, 40000])
    seconds, _ = full.curve("eval/accuracy", "total/seconds")
    np.testing.assert_allclose(seconds, [0, 8, 16, 24, 32])  # 1.6 a step; not the first one's 9.6


def test_signals_are_pooled_as_sums_and_counts(study):
    arm = collect.arms(collect.find_runs([study]))[0]
    sums, counts = arm.pooled("by_position")["margin"]
    assert counts.tolist() == [100.0 * 20 * 3] * 20  # 20 steps, 3 seeds
    by_hand = sum(s.by_position["margin"][0] for r in arm.runs for s in r.signals)
    np.testing.assert_allclose(sums, by_hand)
    assert arm.pooled("by_position", collect.early)["margin"][1][0] == 100.0 * 2 * 3
    ragged, _ = arm.pooled("by_sentence")["margin"]
    assert len(ragged) == max(len(s.by_sentence["margin"][0]) for r in arm.runs for s in r.signals)


def test_few_trajectories_are_spread_over_the_run_and_the_rest_is_counted(study):
    runs = collect.find_runs([study])
    chosen, left_out = collect.trajectories(runs, limit=12, max_tokens=10**6)
    assert len(chosen) == 12 and left_out == 6 * 2 * 4 - 12
    assert len({t["run"] for t in chosen}) == 6
    few, _ = collect.trajectories(runs, limit=12, max_tokens=200)
    assert 0 < sum(len(t["ids"]) for t in few) <= 200


def test_a_folder_without_a_run_says_what_a_run_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([f"--workdir={tmp_path}"])
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_run_with_nothing_but_a_first_row_still_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.25}\n')
    report.main([f"--workdir={tmp_path}"])
    assert "25 %" in (tmp_path / "report.html").read_text()


def test_a_diagnosis_alone_makes_a_page_beside_the_papers_figures(tmp_path):
    figures = {"rollouts": 8, "accuracy": 0.5, "truncated": 0.0, "tokens": 90.0, "segments": 9.0}
    for side in diagnose.SIDES:
        figures |= {f"above_6_min_side_{side}": 0.375, f"gain_mean_min_side_{side}": None}
        figures |= {f"median_release_min_side_{side}": 0.2}
    found = {
        "groups": {"student's rollouts": figures},
        "profiles": {"student": {"margin": [3.0] * 10 + [None] * 10}},
    }
    (tmp_path / "diagnosis.json").write_text(json.dumps(found))
    report.main([f"--workdir={tmp_path}"])
    text = (tmp_path / "report.html").read_text()
    assert "38 %" in text and "79 %" in text and "Teacher margin among" in text
    assert "What was run" not in text


@pytest.mark.parametrize(
    "span,axis,expected",
    [
        ((0, 1), charts.Axis("x"), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ((1, 14), charts.Axis("x", whole=True), [2, 4, 6, 8, 10, 12, 14]),
        ((0, 2), charts.Axis("x", whole=True), [0, 1, 2]),
        ((1, 1000), charts.Axis("x", log=True), [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round_and_inside(span, axis, expected):
    np.testing.assert_allclose(charts.ticks(span, axis), expected)


def test_numbers_read_short():
    numbers = [0.01234, 12345, 2.5e6, -3.0, float("nan"), 1234]
    assert [charts.format_number(n) for n in numbers] == [
        "0.0123", "12.3k", "2.5M", "−3", "–", "1234",
    ]  # fmt: skip
    assert charts.format_number(0.1301, percent=True) == "13 %"


# ---------------------------------------------------------------- in a browser

VIEWS = {
    "light": dict(),
    "dark": dict(dark=True),
    "phone": dict(width=390, height=844, mobile=True),
}


@pytest.mark.browser
@pytest.mark.parametrize("view", VIEWS)
def test_the_page_opens_without_errors_or_requests_and_fits(hostile_run, tmp_path, view):
    page = hostile_run / "report.html"
    with chromium.Browser(**VIEWS[view]) as browser:
        browser.open(page)
        assert browser.run("window.owned === undefined")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        background = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(19, 21, 24)") == (view == "dark")
        browser.move('[data-token="6"]', click=True)
        panel = browser.run("document.querySelector('[data-part=panel]').innerText")
        assert "teacher log p" in panel and "token 7 of" in panel
        browser.photograph(tmp_path / "page.png", whole_page=True)
        assert browser.errors == []
        assert browser.requests == [f"file://{page}"]
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.browser
def test_the_viewer_shows_hostile_text_as_text_and_greys_what_is_not_supervised(hostile_run):
    with chromium.Browser() as browser:
        browser.open(hostile_run / "report.html")
        text = browser.run("document.querySelector('.response').innerText")
        assert synthetic_runs.HOSTILE in text
        released = browser.run(
            "[...document.querySelectorAll('.token')].map((t) => !!t.closest('.released'))"
        )
        first = released.index(True)
        assert all(released[first:]) and not any(released[:first])
        before = browser.run(
            "document.querySelector('.cut').previousElementSibling.lastChild.dataset.token"
        )
        assert int(before) == first - 1  # the line is drawn where supervision ends
        assert browser.errors == []


@pytest.mark.browser
def test_the_viewer_by_keyboard_search_and_sort(hostile_run):
    facts = "document.querySelector('.facts').innerText"
    count = "document.querySelector('[data-part=count]').textContent"
    gain = re.compile(r"BIC gain ([\d.]+)")
    with chromium.Browser() as browser:
        browser.open(hostile_run / "report.html")
        browser.key("ArrowRight")
        assert browser.run(count) == "1 / 8"  # the viewer is not in view: keys scroll the page
        browser.run("document.querySelector('#viewer').scrollIntoView()")
        gains = [float(gain.search(browser.run(facts))[1])]
        for _ in range(7):
            browser.key("ArrowRight")
            gains.append(float(gain.search(browser.run(facts))[1]))
        assert gains == sorted(gains, reverse=True) and browser.run(count) == "8 / 8"
        browser.key("ArrowLeft")
        assert browser.run(count) == "7 / 8"
        browser.key(".")
        browser.key(".")
        assert browser.run("document.querySelector('.token.on').dataset.token") == "1"
        browser.key("Escape")
        assert browser.run("document.querySelector('.token.on')") is None
        browser.key("/")
        assert browser.run("document.activeElement.dataset.part") == "search"
        for letter in "zebra":
            browser.key(letter)
        assert browser.run(count) == "0 / 0"
        assert browser.errors == []


@pytest.mark.browser
def test_a_chart_reads_out_under_the_pointer_and_by_keyboard(hostile_run):
    tip = "document.querySelector('figure .tip')"
    with chromium.Browser() as browser:
        browser.open(hostile_run / "report.html")
        browser.move("figure svg")
        assert "updates: 20" in browser.run(f"{tip}.innerText")
        browser.move("h1")
        assert browser.run(f"{tip}.hidden")
        browser.run("document.querySelector('figure svg').focus()")
        for _ in range(2):
            browser.key("ArrowRight")
        assert "updates: 5" in browser.run(f"{tip}.innerText")
        assert browser.errors == []
