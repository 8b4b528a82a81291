"""Tables, plots and the page of a comparison; the page in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import compared
import pytest

from unierase_plugin.compare.page import page, write_page
from unierase_plugin.compare.plots import draw
from unierase_plugin.compare.summary import answer, frontier
from unierase_plugin.compare.tables import filled, markdown, tex

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the page with")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_markdown_has_every_row_in_every_group_and_says_what_failed() -> None:
    results = compared.results()
    text = markdown(results)
    groups = {column.group for column in filled(results)}
    for label in (*compared.METHODS, compared.FAILED):
        assert text.count(f"| `{label}` |") == len(groups)
    assert "failed: out of memory" in text
    assert "0.040 ± 0.001" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in lines]
    heads = [at for at, line in enumerate(lines) if line.startswith("| method")]
    for start, stop in zip(heads, [*heads[1:], len(lines)], strict=True):
        assert len(set(widths[start:stop])) == 1


def test_tex_is_a_booktabs_table_whose_rows_are_as_wide_as_its_head() -> None:
    results = compared.results()
    text = tex(results)
    columns = len(filled(results))
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == 1
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == len(results["rows"])
    for line in body:
        assert line.count(" & ") == (1 if "failed" in line else columns)
    assert r"ga\_gd" in text
    assert not re.search(r"(?<!\\)[%_#](?!\s*needs)", text.replace(r"% needs \usepackage{booktabs}", ""))


def test_composites_are_last_and_nothing_is_ranked() -> None:
    results = compared.results()
    assert [column.key for column in filled(results)][-3:] == ["fe", "re", "balance"]
    order = [row["label"] for row in results["rows"]]
    body = [line.split("`")[1] for line in markdown(results).splitlines() if line.startswith("| `")]
    assert body[: len(order)] == order


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_answer_names_the_best_at_equal_retention_first_and_never_a_control() -> None:
    sentences = answer(compared.results())
    assert "unierase (ROUGE-L 0.04 ± 0.00) says least" in sentences[0]
    assert not any("prompt_guard" in each for each in sentences)
    joined = " ".join(sentences)
    assert "What the token adds on memit" in joined
    assert "0.67 times as long as the quickest training (ga_gd)" in joined
    assert "rmu (out of memory)" in joined
    assert "One seed" not in joined
    assert "One seed" in " ".join(answer(compared.results(seeds=1)))


def test_a_budget_that_nothing_was_searched_with_is_no_tuning() -> None:
    results = compared.results()
    assert "tries each" in page(results, {})
    assert "Nothing was tuned" not in " ".join(answer(results))
    nothing: dict[str, Any] = {"space": {}, "tries": [], "chosen": None, "rule": ""}
    results["searches"]["unierase"] = nothing
    assert "for 1 of the methods" in page(results, {})
    for searches in ({}, {"unierase": nothing}):
        results["searches"] = searches
        assert "tries each" not in page(results, {})
        assert "Nothing was tuned" in " ".join(answer(results))


def test_times_of_different_machines_are_not_compared() -> None:
    results = compared.results()
    row = next(row for row in results["rows"] if row["label"] == "ga_gd")
    row["device"] = "a kiln"
    joined = " ".join(answer(results))
    assert "an oven" in joined
    assert "a kiln" in joined
    assert "Time runs" not in joined
    assert "times as long" not in joined


def test_nobody_on_the_frontier_is_beaten_and_everybody_else_is() -> None:
    rows = compared.results()["rows"]
    best = frontier(rows, "forget_rouge", "keep_rouge")
    point = {
        row["label"]: (row["figures"]["forget_rouge"]["mean"], row["figures"]["keep_rouge"]["mean"]) for row in rows
    }
    names = {row["label"] for row in best}
    for label, (left, kept) in point.items():
        if left is not None:
            beaten = any(a <= left and b >= kept and (a, b) != (left, kept) for a, b in point.values() if a is not None)
            assert beaten == (label not in names), label


# --- plots -----------------------------------------------------------------------------------------------------------


def test_a_comparison_in_which_nothing_was_kept_has_its_charts(tmp_path: Path) -> None:
    """What is kept is relative to before, and so unknown where the unedited model answered nothing."""
    pytest.importorskip("adjustText")
    found = compared.results(steps=0)
    for row in found["rows"]:
        for key in ("keep_rouge", "keep_prob"):
            row["figures"][key]["mean"] = None
    assert "tradeoff" in draw(found, tmp_path)


def test_plots_are_drawn_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("adjustText")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw(compared.results(steps=3), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["cost.png", "cost.svg", "steps.png", "steps.svg", "tradeoff.png", "tradeoff.svg"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "unierase" in (tmp_path / "one" / "tradeoff.svg").read_text()


# --- the page --------------------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "data", "action") and value]


def test_the_page_needs_nothing_beside_itself_and_holds_all_without_a_script(tmp_path: Path) -> None:
    results = compared.results(steps=4)
    charts = draw(results, tmp_path)
    text = page(results, charts)
    links = _Links()
    links.feed(text)
    assert links.found == []
    # Parts of a chart refer to each other.
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", text)
    before_script = text.partition('<script type="application/json"')[0]
    for label in (*compared.METHODS, compared.FAILED):
        assert f'data-label="{label}"' in before_script
    assert "It needs 40 GiB &amp; more." in before_script
    assert "learning_rate = 0.0001" in before_script
    assert before_script.count("<svg") == len(charts)


def test_a_page_without_charts_says_what_draws_them() -> None:
    text = page(compared.results(), {})
    assert "<svg" not in text
    assert "unierase-plugin[plots]" in text


def test_what_is_read_from_files_is_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    results = compared.results()
    results["setup"]["model"] = results["answer"][0] = evil
    results["searches"] = {evil: {**results["searches"]["npo_gd"], "rule": evil, "space": {evil: [evil]}}}
    for row in results["rows"]:
        row.update(label=evil, title=evil, paper=evil, settings={evil: evil}, not_matched=evil, phases={evil: 1.0})
        row.update(audit={"verdict": evil}, failures=[{"seed": 0, "kind": evil, "error": evil}])
    assert evil not in page(results, {})


def test_what_models_say_cannot_end_the_data() -> None:
    text = page(compared.results(), {})
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert embedded
    assert json.loads(embedded[1])["answers"][2]["question"] == compared.QUESTIONS[2]


def browse(tmp_path: Path, address: str, *flags: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000", *flags]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture
def address(tmp_path: Path) -> str:
    pytest.importorskip("adjustText")
    results = compared.results(steps=4)
    write_page(tmp_path / "report.html", results, draw(results, tmp_path))
    return (tmp_path / "report.html").as_uri()


def labels(dom: str, hidden: bool = False) -> list[str]:
    body = dom.partition('id="rows"')[2].partition("</tbody>")[0].partition("<tbody>")[2]
    found = re.findall(r'<tr data-label="([^"]*)"([^>]*)>', body)
    return [label for label, rest in found if ('hidden=""' in rest) == hidden]


@needs_browser
def test_the_table_sorts_both_ways_with_what_has_no_figure_last(tmp_path: Path, address: str) -> None:
    figures: dict[str, Any] = {row["label"]: row["figures"] for row in compared.results(steps=4)["rows"]}
    for key, direction in (("forget_rouge", "ascending"), ("seconds", "descending")):
        found = labels(browse(tmp_path, f"{address}#sort={key}&dir={direction}", "--dump-dom"))
        values = [figures[label][key]["mean"] for label in found]
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=direction == "descending")
        assert values[: len(known)] == known
        assert len(found) == len(figures)


@needs_browser
def test_filters_and_answers_follow_the_address(tmp_path: Path, address: str) -> None:
    dom = browse(tmp_path, f"{address}#hide=ga_gd,npo_gd&q=1", "--dump-dom")
    assert labels(dom, hidden=True) == ["ga_gd", "npo_gd"]
    reading = dom.partition('id="reading"')[2].partition("</section>")[0]
    assert compared.QUESTIONS[1] in reading
    assert "unierase says" in reading
    assert "ga_gd says" not in reading
    assert "<mark>Fizz</mark>" in reading
    # Each chart shows what belongs to the rows that are shown.
    order = [row["label"] for row in compared.results()["rows"]]
    for chart in ("tradeoff", "steps", "cost"):
        found = re.findall(r'id="row-(\d+)-[^"]*"([^>]*)>', dom.partition(f'id="{chart}"')[2].partition("</svg>")[0])
        hidden = {order[int(at)] for at, rest in found if 'class="off"' in rest}
        assert hidden == {"ga_gd", "npo_gd"}
        assert {"unierase", *hidden} <= {order[int(at)] for at, _ in found}
    assert "unierase: ROUGE-L 0.040 left, 0.990 kept" in dom


@needs_browser
def test_what_models_say_is_shown_as_text(tmp_path: Path, address: str) -> None:
    dom = browse(tmp_path, f"{address}#role=keep", "--dump-dom")
    reading = dom.partition('id="reading"')[2].partition("</section>")[0]
    assert "&lt;/script&gt;&lt;b&gt;Bunt&lt;/b&gt;" in reading


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen(tmp_path: Path, address: str, width: int) -> None:
    """The table alone scrolls sideways, in a box of its own."""
    probe = tmp_path / "probe.html"
    frame = f'<iframe id="f" width="{width}" height="800" src="report.html"></iframe>'
    script = (
        "onload = () => { const root = f.contentDocument.documentElement;"
        " document.title = root.scrollWidth + ' ' + root.clientWidth; }"
    )
    probe.write_text(f"<!doctype html><title>?</title>{frame}<script>{script}</script>")
    dom = browse(tmp_path, probe.as_uri(), "--dump-dom", "--allow-file-access-from-files", "--window-size=1500,900")
    sizes = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert sizes, dom[:300]
    assert int(sizes[1]) <= int(sizes[2])
