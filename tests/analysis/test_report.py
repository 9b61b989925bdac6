"""The report is complete in every format, and its page works in a real browser without network requests."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from markupsafe import escape
from rich.console import Console

from analysis import escaping
from analysis.comparison import Contrast, Interval
from analysis.figures import FIGURES, NothingToShow
from analysis.guards import Finding
from analysis.report import (
    Heading,
    Paragraph,
    Picture,
    Warnings,
    Written,
    content,
    print_summary,
    write_report,
)
from analysis.report import page as render
from analysis.results import Results, analyse
from analysis.tables import TABLES, Table
from analysis.trials import load_study
from scripts.report import main as report
from tests.analysis.browser import Page, find_chromium
from tests.analysis.synthetic import write_run, write_study


@pytest.fixture(scope="module")
def written(results: Results) -> Written:
    assert results.study.directory is not None
    return write_report(results, results.study.directory)


def test_bits_per_byte_stand_beside_nats_where_the_records_have_them(results: Results) -> None:
    assert "bits per byte" not in TABLES["final-losses"](results).columns
    study = results.study
    trials = [
        replace(one, run=replace(one.run, summary={**(one.run.summary or {}), "final_val_bits_per_byte": 1.25}))
        if one.run
        else one
        for one in study.trials
    ]
    shown = TABLES["final-losses"](replace(results, study=replace(study, trials=trials)))
    assert "1.2500" in set(shown.frame["bits per byte"])


class Collector(HTMLParser):
    """Links, anchors and sources of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name == "href" and tag == "a" and value:
                self.links.append(value)
            if (name == "src" or (name == "href" and tag == "link")) and value:
                self.sources.append(value)


@pytest.fixture(scope="module")
def parsed(written: Written) -> Collector:
    collector = Collector()
    collector.feed(written.html.read_text())
    return collector


def test_every_link_leads_somewhere(written: Written, parsed: Collector) -> None:
    """To an anchor of the page, or to the row of a trial; the page loads nothing."""
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(source.startswith("data:") for source in parsed.sources)
    rows = (written.html.parent / "trials.csv").read_text().splitlines()
    assert len(parsed.links) > 100
    for link in set(parsed.links):
        if link.startswith("#"):
            assert link[1:] in parsed.ids, link
        else:
            file, _, line = link.partition("#L")
            assert file == "trials.csv"
            assert rows[int(line) - 1].startswith(("tiny-", "small-")), link


def test_page_and_markdown_have_the_same_content_in_one_order(results: Results, written: Written) -> None:
    page, text = written.html.read_text(), written.markdown.read_text()
    places = []
    for block in content(results, written.figures):
        match block:
            case Heading(title) | Paragraph(title) | Table(title=title):
                shown = (str(escape(title)), escaping.markdown(title))
            case Picture() as picture:
                shown = (f'id="figure-{picture.name}"', f"/{picture.name}.png)")
                assert (written.markdown.parent / "figures" / picture.path.name).is_file()
            case _:
                continue
        after = places[-1] if places else (-1, -1)
        places.append((page.index(shown[0], after[0] + 1), text.index(shown[1], after[1] + 1)))
    assert len(places) > 40


def test_serious_warnings_come_before_the_verdict_and_no_fewer_than_three_doubts(results: Results) -> None:
    doubts = [Finding("code", "note", f"doubt {number}", "detail") for number in range(5)]
    for serious, shown in ((0, 3), (1, 3), (4, 4)):
        findings = [replace(one, severity="serious") for one in doubts[:serious]] + doubts[serious:]
        blocks = content(replace(results, findings=findings))
        kinds = [type(block).__name__ for block in blocks]
        first = blocks[kinds.index("Warnings")]
        assert isinstance(first, Warnings)
        assert [one.title for one in first.findings] == [f"doubt {number}" for number in range(shown)]
        assert kinds.index("Warnings") < kinds.index("Table")


def test_the_first_lines_say_who_is_faster_by_how_much_how_sure_and_at_what_scale(written: Written) -> None:
    top = written.markdown.read_text().split("### ")[0]
    assert re.search(
        r"\*\*tiny, after 400 steps \(1.0M parameters, 0.41M tokens, 0.41 tokens per parameter\)\*\*: faster", top
    )
    assert re.search(r"faster than AdamW: Sophia-G \(-0.\d+ \[-0.\d+, -0.\d+\]\); slower than AdamW: Lion", top)
    assert "The paper's 2×: not tested. Differences of final loss in nats, 3 seeds, 97.5% intervals." in top


def test_one_table_has_the_verdict_in_one_cell(results: Results) -> None:
    table = TABLES["verdict"](results)
    assert table.frame["verdict"].tolist() == ["", "slower", "faster"] * 2
    assert table.frame["arm"].tolist() == ["AdamW", "Lion", "Sophia-G"] * 2
    sophia = table.frame.iloc[2]
    assert sophia["minus AdamW [interval]"] == results.verdict("sophiag", "tiny").at.same.interval.text  # type: ignore
    assert sophia["with half the steps"].endswith("(200)")
    assert sophia["ratio in steps"].endswith("] (200)"), "at the baseline's longest horizon it would be censored"


def test_ablations_have_plain_intervals_and_say_so(results: Results) -> None:
    table = TABLES["ablations"](results)
    assert "95% interval" in table.columns[5]
    assert "NOT corrected" in table.note
    assert not {"p", "verdict"} & {*table.columns}
    assert all(one.interval.level == 0.95 for one in results.ablations if one.interval)


def test_a_cell_that_tells_nothing_shows_no_absurd_number(results: Results) -> None:
    verdict = results.verdict("lion", "tiny")
    assert verdict.at is not None
    assert isinstance(verdict.at.same, Contrast)
    wild = replace(verdict.at.same, differences=np.array([1e6, -2e6, 3e6]), interval=Interval(7e5, -6e6, 7e6, 0.975))
    results = replace(results, compared=[replace(verdict.at, same=wild)])
    assert "> 10" in TABLES["final-losses"](results).frame["would be found"].tolist()


def test_the_terminal_summary_has_serious_warnings_sentences_one_table_and_titles(tmp_path: Path) -> None:
    for seed in (1, 2):
        for optimizer in ("adamw", "lion"):
            clip = {"train.grad_clip": 9.0} if (optimizer, seed) == ("lion", 1) else {}
            options = {"optimizer": optimizer, "seed": seed, "train_lines": False, "config": clip}
            write_run(tmp_path / f"{optimizer}{seed}", **options)  # type: ignore[arg-type]
    results = analyse(load_study([tmp_path]))
    console = Console(width=160, record=True, force_terminal=False)
    with console.capture() as capture:
        print_summary(results, console)
    text = " ".join(capture.get().split())
    sentence = text.index(results.sentences[0][:60])
    assert text.index("Serious: Runs differ in more than the optimizer: train.grad_clip") < sentence
    assert sentence < text.index("minus AdamW")
    for note in (finding for finding in results.findings if finding.severity == "note"):
        assert f"Note: {note.title}" in text
        assert note.detail not in text


def test_the_command_writes_all_formats_and_names_its_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "synthetic", models={"tiny": 1e6})
    assert report([str(study)]) == 0
    assert {"report.html", "report.md", "report.json", "figures"} <= {path.name for path in study.iterdir()}
    assert report([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_figure_that_fails_is_a_warning_in_the_report_and_a_picture_without_data_is_removed(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(results: Results) -> None:
        raise KeyError("betas")

    def empty(results: Results) -> None:
        raise NothingToShow("no such run")

    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "norms.png").write_text("of an earlier report")
    figures = {"grid": FIGURES["grid"], "tokens": broken, "norms": empty}
    monkeypatch.setattr("analysis.report.FIGURES", figures)
    written = write_report(results, tmp_path)
    assert not (tmp_path / "figures" / "norms.png").exists()
    assert [path.name for path in written.figures] == ["grid.png"]
    for page in (written.html, written.markdown, written.json):
        assert "The figure tokens could not be drawn" in page.read_text()


def test_a_full_disk_is_one_line(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    assert results.study.directory is not None
    for module in ("report", "figures"):
        with monkeypatch.context() as patch:
            patch.setattr(f"analysis.{module}.FIGURES", {"grid": FIGURES["grid"]})
            patch.setattr(f"analysis.{module}.write_atomically", full)
            assert report([str(results.study.directory), "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "No space left on device" in err


def test_a_sweep_is_one_line_that_says_what_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate in (1e-3, 3e-3):
        write_run(tmp_path / f"a{rate}", steps=4, config={"optimizer.lr": rate}, train_lines=False)
    assert report([str(tmp_path)]) == 2
    assert "scripts/compare.py, or choose one, --baseline 'adamw (lr=0.001)'" in capsys.readouterr().err


def test_a_directory_named_like_a_script_is_a_plain_link_and_markup_in_names_is_text(tmp_path: Path) -> None:
    place = Path("javascript:alert(1)") / "a [b](c)#d"
    for seed in (1, 2):
        for optimizer in ("adamw", "<script>alert(1)</script>[x](javascript:alert)"):
            directory = tmp_path / place / f"{optimizer[:3]}{seed}"
            write_run(directory, seed=seed, steps=4, config={"optimizer.name": optimizer}, train_lines=False)
    written = write_report(analyse(load_study([tmp_path])), tmp_path)
    collector = Collector()
    collector.feed(written.html.read_text())
    links = [link for link in collector.links if not link.startswith("#")]
    assert links
    assert all((tmp_path / unquote(link) / "config.yaml").is_file() and ":" not in link for link in links)
    assert "<script>alert" not in written.html.read_text()
    text = written.markdown.read_text()
    assert "&lt;script>alert(1)" in text
    assert "<script" not in text
    assert "](javascript:" not in text


def test_a_damaged_record_is_left_out_of_the_report_which_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        for steps in (20, 40):
            for optimizer in ("adamw", "lion"):
                directory = tmp_path / "runs" / f"{optimizer}-{steps}-{seed}"
                write_run(directory, optimizer=optimizer, seed=seed, steps=steps, train_lines=False)
    damaged = tmp_path / "runs" / "lion-40-2"
    (damaged / "summary.json").write_text('{"status": 5}')
    os.mkfifo(damaged.with_name("fifo"))  # no run
    assert report([str(tmp_path / "runs"), "--output", str(tmp_path / "report")]) == 0
    for name in ("report.html", "report.md", "report.json"):
        text = (tmp_path / "report" / name).read_text()
        assert "1 damaged record is left out" in text
        assert f"{damaged / 'summary.json'} is damaged: status" in text
    assert "1 damaged record is left out" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", "name: s\nbaseline: a\narms: {}\n", "[" * 9999])
def test_a_damaged_study_file_is_an_error_of_one_line(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text(content)
    (tmp_path / "trials.csv").write_text("trial,arm,phase,model,horizon,seed,status\n")
    assert report([str(tmp_path)]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/study.yaml" in line


def test_a_text_that_looks_like_markup_stays_text(tmp_path: Path) -> None:
    study = write_study(tmp_path / "synthetic", models={"tiny": 1e6})
    spec = yaml.safe_load((study / "study.yaml").read_text())
    spec["description"] = "</script><script>alert(1)</script>"
    (study / "study.yaml").write_text(yaml.safe_dump(spec))
    page = render(content(analyse(load_study([study]))), study)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.fixture(scope="module")
def page(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with Page(chromium, tmp_path_factory.mktemp("profile")) as page:
        page.resize(1200, 900)
        page.open(written.html.as_uri())
        page.wait_for("document.querySelectorAll('#chart .scatterlayer .trace').length >= 3")
        yield page


# The tests that follow share one page, in this order.


def test_in_a_browser_the_page_draws_its_chart_without_errors_or_requests(page: Page) -> None:
    assert page.errors == []
    assert [url[:80] for url in page.requests if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in page.requests) == 1, "the page itself and nothing beside it"


def test_the_switch_changes_what_the_curves_are_drawn_over(page: Page) -> None:
    seen = {}
    for currency in ("flops", "seconds", "steps"):
        page.evaluate(f"document.querySelector('[data-currency={currency}]').click()")
        title = page.evaluate("document.querySelector('#chart .xtitle').textContent")
        seen[currency] = (title, page.evaluate("document.getElementById('chart').data.at(-1).x.at(-1)"))
        assert page.evaluate("document.querySelector('[aria-pressed=true]').dataset.currency") == currency
    assert seen["steps"] == ("training steps", 400)
    assert seen["flops"][0].startswith("model FLOPs")
    assert seen["flops"][1] == pytest.approx(400 * 1024 * 6e6 * 1.05)
    assert seen["seconds"][0].startswith("training seconds")


def test_model_and_run_length_can_be_chosen(page: Page) -> None:
    def last() -> float:
        return float(page.evaluate("document.getElementById('chart').data.at(-1).y.at(-1)"))

    first = last()
    for view in ("tiny, 50 steps", "small, 400 steps"):
        page.evaluate(
            "(name => { const s = document.getElementById('view'); s.value = name; s.dispatchEvent(new Event('change')) })"
            f"('{view}')"
        )
        assert last() != first


def test_tables_sort_by_value_both_ways(page: Page) -> None:
    column = "[...document.querySelectorAll('#final-losses-rows tbody tr')].map(r => Number(r.cells[3].textContent))"
    head = "document.querySelectorAll('#final-losses-rows th')[3].click()"
    page.evaluate(head)
    values = page.evaluate(column)
    assert values == sorted(values)
    assert len(values) > 10
    page.evaluate(head)
    assert page.evaluate(column) == sorted(values, reverse=True)


def test_a_row_leads_to_its_run_records(page: Page) -> None:
    page.evaluate("document.querySelector('#final-losses-rows tbody a').click()")
    page.wait_for("document.querySelector('tr:target') !== null")
    assert "reporting" in page.evaluate("document.querySelector('tr:target').textContent")


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.resize(390, 844, phone=True)
    page.wait_for("innerWidth === 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.wait_for("document.querySelector('#chart .main-svg').getBoundingClientRect().width <= 390")
    assert page.errors == []


def test_the_page_prints(page: Page, tmp_path: Path) -> None:
    page.print_to_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000
    assert page.errors == []
