"""``dist-optim report``: the page says what the runs' files say, needs nothing from outside, and never breaks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dist_optim.cli import app
from dist_optim.errors import UsageError
from dist_optim.reporting.axis import Unit, axis_of, written
from dist_optim.reporting.drawing import BOX, MOST_POINTS, NUM_COLOURS
from dist_optim.reporting.page import page
from dist_optim.reporting.reading import read_runs

VOID = {"meta", "line", "circle", "path", "polyline"}


# Reading a page back ------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    title: str = ""
    ends: dict[str, str | None] = field(default_factory=dict)
    curves: dict[str, list[str]] = field(default_factory=dict)
    legend: list[str] = field(default_factory=list)

    def points(self, curve: str) -> list[tuple[float, float]]:
        """(step, value) of what is drawn."""
        (low, high), (least, most) = ([float(word) for word in str(self.ends[k]).split()] for k in ("steps", "values"))
        left, top, right, bottom = BOX
        found = []
        for pair in " ".join(self.curves[curve]).split():
            x, y = (float(word) for word in pair.split(","))
            across, up = (x - left) / (right - left), (bottom - y) / (bottom - top)
            value = least * (most / least) ** up if self.ends["log"] == "1" else least + up * (most - least)
            found.append((low + across * (high - low), value))
        return found


class Page(HTMLParser):
    """Figures, tables, words and tags; raises where a tag is not closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[Figure] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._curve = ""
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "figure":
            self.figures.append(Figure())
        elif tag == "svg" and "data-steps" in named:
            self.figures[-1].ends = {name: named[f"data-{name}"] for name in ("steps", "values", "log")}
        elif tag == "g":
            self._curve = str(named["class"])
        elif tag == "polyline":
            self.figures[-1].curves.setdefault(self._curve, []).append(str(named["points"]))
        elif tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "h3" and "figure" in self._open:
            self.figures[-1].title = data.strip()
        elif inside == "b" and "figure" in self._open:
            self.figures[-1].legend.append(data)
        elif inside in ("th", "td"):
            self.rows[-1].append(data)
        if inside != "style":
            self.words.append(data)

    def figure(self, title: str) -> Figure:
        (found,) = [one for one in self.figures if one.title == title]
        return found

    def row(self, label: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == label)


def page_of(*folders: Path) -> Page:
    return Page(page(read_runs(folders)))


def assert_drawn(figure: Figure, curve: str, expected: Sequence[tuple[float, float]]) -> None:
    drawn = figure.points(curve)
    assert len(drawn) == len(expected)
    for (step, value), (its_step, its_value) in zip(drawn, expected, strict=True):
        assert step == pytest.approx(its_step, abs=0.02 * expected[-1][0])
        assert value == pytest.approx(its_value, rel=0.01, abs=1e-9), f"step {its_step}"


# Runs ---------------------------------------------------------------------------------------------------------------


def rows(scale: float = 1.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "eval_loss": 5.5 * scale}]
    for step in (1, 10, 20, 30):
        of_telemetry = {
            "optim_update_ratio_group_0": 1e-2 / step,
            "optim_update_ratio_group_10": 1e-4 / step,
            "optim_step_seconds": 0.03,
            "optim_gather_seconds": 0.01 + 0.0001 * step,
            "optim_exchanged_bytes": 3 << 20,
            "optim_clip_rate": 1 / step,
        }
        found.append({"step": step, "loss": scale * (2 + 3 / step), "learning_rate": 1e-3 / step, **of_telemetry})
    return [*found, {"step": 30, "eval_loss": 2.2 * scale}]


def run_in(folder: Path, found: Sequence[dict[str, Any]] | None = None, **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    written_rows = rows() if found is None else found
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written_rows))
    summary = {"optim": "galore_adamw", "strategy": "ddp", "world_size": 2, "steps": 30, "train_seconds": 0.5}
    (folder / "summary.json").write_text(json.dumps({**summary, "optimizer_state_bytes_per_rank": [1 << 20, 3 << 20]}))
    known = {"settings": {"learning_rate": 1e-3, "seed": 1}, "set": ["learning_rate"], "audit": "who steps what"}
    (folder / "run.json").write_text(json.dumps({**known, "coverage": 0.9, "versions": {"torch": "2.13"}, **about}))
    return folder


def test_curves_are_those_of_the_metrics(tmp_path: Path) -> None:
    shown = page_of(run_in(tmp_path / "one"))
    loss = shown.figure("Loss")
    assert loss.legend == ["training", "evaluation"]
    training = [(row["step"], row["loss"]) for row in rows() if "loss" in row]
    assert_drawn(loss, "c0", training)
    assert_drawn(loss, "c1", [(0, 5.5), (30, 2.2)])
    ratios = shown.figure("Update over weight")
    assert ratios.ends["log"] == "1" and ratios.legend == ["group 0", "group 10"]
    assert_drawn(ratios, "c1", [(step, 1e-4 / step) for step in (1, 10, 20, 30)])
    assert_drawn(shown.figure("Clip rate"), "c0", [(step, 1 / step) for step in (1, 10, 20, 30)])
    assert {"Bytes exchanged in a step, all ranks", "Learning rate"} <= {one.title for one in shown.figures}
    with pytest.raises(AssertionError):  # a point elsewhere is seen
        assert_drawn(loss, "c0", [*training[:-1], (30, 2.5)])


def test_tables_say_what_the_files_say(tmp_path: Path) -> None:
    shown = page_of(run_in(tmp_path / "one"))
    assert shown.row("training loss, first → last") == ["5.0000 → 2.1000"]
    assert shown.row("lowest evaluation loss") == ["2.2000 at step 30"]
    assert shown.row("optimizer state, fullest rank") == ["3 MiB"] and shown.row("ranks, strategy") == ["2, ddp"]
    assert shown.row("elements on the named algorithm") == ["90 %"] and shown.row("torch") == ["2.13"]
    assert "who steps what" in shown.words and shown.row("seed") == ["1"]


def test_runs_are_laid_over_each_other_and_their_differences_named(tmp_path: Path) -> None:
    first = run_in(tmp_path / "a" / "run")
    second = run_in(tmp_path / "b" / "run", rows(0.5), settings={"learning_rate": 2e-3, "seed": 1, "output_dir": "b"})
    shown = page_of(first, second)
    loss = shown.figure("Loss: training")
    assert loss.legend == ["a/run", "b/run"], "the names that tell them apart"
    for curve, scale in (("c0", 1.0), ("c1", 0.5)):
        assert_drawn(loss, curve, [(row["step"], row["loss"]) for row in rows(scale) if "loss" in row])
    text = page(read_runs([first, second])).partition("What differs")[2].partition("</section>")[0]
    assert "0.002" in text and "seed" not in text and "output_dir" not in text
    many = page_of(*(run_in(tmp_path / f"run_{number}") for number in range(NUM_COLOURS + 1)))
    assert "c0 again" in many.figure("Loss: training").curves, "after the last colour the first, dashed"


def test_decisions_and_breaks_are_on_the_curve(tmp_path: Path) -> None:
    folder = run_in(
        tmp_path / "run",
        [{"step": n, "loss": None if n == 3 else 1.0 * n, "learning_rate": 1.0} for n in (1, 2, 3, 4, 5)],
    )
    made = {"step": 2, "decision": "lowered", "old_lr": [1.0], "new_lr": [0.5]}
    (folder / "lr_decisions.jsonl").write_text(json.dumps(made) + "\n" + json.dumps({"step": "x"}) + "\n")
    shown = page_of(folder)
    assert len(shown.figure("Loss").curves["c0"]) == 2, "it breaks at what is not finite"
    assert "step 3: not finite" in shown.words and "step 2: lowered from 1 to 0.5" in shown.words
    assert any("1 lines are not decisions" in word for word in shown.words)
    assert (2.0, 1.0) in [
        (round(step, 1), round(value, 1)) for step, value in shown.figure("Learning rate").points("c0")
    ]


def test_a_long_run_keeps_its_extremes(tmp_path: Path) -> None:
    long = [{"step": n, "loss": 9.0 if n == 7777 else 2.0 + 0.1 * (n % 7)} for n in range(1, 20_001)]
    points = page_of(run_in(tmp_path / "run", long)).figure("Loss").points("c0")
    assert len(points) <= 2 * MOST_POINTS and max(value for _, value in points) == pytest.approx(9.0, rel=0.01)


# From outside -------------------------------------------------------------------------------------------------------


HOSTILE = """"><img src=x onerror=alert(1)>&amp;'<script>"""


def test_the_page_needs_nothing_from_outside_and_says_hostile_names_as_they_are(tmp_path: Path) -> None:
    folder = run_in(
        tmp_path / HOSTILE,
        [*rows(), {"step": 31, HOSTILE: 1.0, f"optim_update_ratio_group_{HOSTILE}": 1.0}],
        settings={HOSTILE: HOSTILE},
        audit=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    (folder / "lr_decisions.jsonl").write_text(
        json.dumps({"step": 1, "decision": HOSTILE, "old_lr": [1], "new_lr": [1]})
    )
    for folders in ([folder], [folder, run_in(tmp_path / "other")]):
        text = page(read_runs(folders))
        shown = Page(text)
        assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in shown.tags}
        named = {name for _, attributes in shown.tags for name in attributes}
        assert not {"src", "href", "onerror", "onload", "style"} & named
        assert not re.search(r"https?:|//\w|url\(|@import", text)
        assert HOSTILE in shown.words and [HOSTILE, HOSTILE] in [row[:2] for row in shown.rows]


# What is missing ----------------------------------------------------------------------------------------------------


def test_what_is_missing_or_broken_is_left_out_and_said(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 2, "loss": NaN}\n{"step": 3, "lo\n[1]\n{"loss": 1.0}\n\n{"step": 4, "loss": "x", "b": true}\n'
        )
    (folder / "run.json").write_text("{")
    (folder / "summary.json").write_text("[]")
    shown = page_of(folder)
    said = " ".join(shown.words)
    for words in (
        "2 lines are not JSON objects, the first is line 3",
        "1 lines of metrics name no step",
        "run.json is not JSON",
        "summary.json holds no object",
        "No telemetry",
    ):
        assert words in said
    assert_drawn(shown.figure("Loss"), "c0", [(1, 2.0)])
    (folder / "metrics.jsonl").unlink()
    assert "There are no figures in metrics.jsonl" in " ".join(page_of(folder).words)


def test_a_run_under_way_and_a_stock_trainers_checkpoint(tmp_path: Path) -> None:
    run_in(tmp_path / "going" / ".unfinished")
    shown = page_of(tmp_path / "going")
    assert "This run has not finished" in " ".join(shown.words) and shown.figure("Loss").legend[0] == "training"
    for number in (5, 10):
        (tmp_path / "stock" / f"checkpoint-{number}").mkdir(parents=True)
        state = {"log_history": [{"step": step, "loss": 1.0 * step} for step in range(1, number + 1)]}
        (tmp_path / "stock" / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps(state))
    shown = page_of(tmp_path / "stock")
    assert len(shown.figure("Loss").points("c0")) == 10 and "checkpoint-10/trainer_state.json" in " ".join(shown.words)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "loss", "grad_norm", "optim_step_seconds", "optim_state_bytes"]),
            st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans()),
        ),
        max_size=6,
    )
)
@settings(max_examples=25, deadline=None)
def test_no_figures_break_the_page(tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, Any]]) -> None:
    page_of(run_in(tmp_path_factory.mktemp("runs") / "run", found))


@pytest.mark.parametrize("about", [{"settings": [1], "set": 3, "audit": {}, "coverage": "x", "versions": None}])
def test_files_of_other_shapes_do_not_break_it(tmp_path: Path, about: dict[str, Any]) -> None:
    folder = run_in(tmp_path / "run", **about)
    summary = {"lr_decisions": 3, "steps": "many", "peak_memory_bytes_per_rank": 7, "world_size": [2]}
    (folder / "summary.json").write_text(json.dumps(summary))
    page_of(folder, run_in(tmp_path / "other"))


# Axes ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
@settings(deadline=None)
def test_an_axis_holds_its_values_and_has_few_lines(values: list[float]) -> None:
    axis = axis_of(values, may_be_log=True)
    assert all(0 <= axis.at(value) <= 1 for value in values)
    assert len(axis.lines()) <= 11 and all(-0.001 <= axis.at(line) <= 1.001 for line in axis.lines())


def test_lines_of_an_axis_are_told_apart_by_their_names() -> None:
    for values in ([2512896.0, 2512910.0], [2.0, 2.0], [5.5, 2.1], [0.0, 0.0], [1e-5, 3.0]):
        lines = [written(line, Unit.BYTES) for line in axis_of(values, may_be_log=True, base=1024.0).lines()]
        assert len(set(lines)) == len(lines) >= 2, values


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1250.0, Unit.NUMBER, "1.25k"),
        (2e-5, Unit.NUMBER, "2e-05"),
        (0.0123, Unit.SECONDS, "12.3 ms"),
        (0.35, Unit.SHARE, "35 %"),
        (3.5 * 2**20, Unit.BYTES, "3.5 MiB"),
        (0.0, Unit.SECONDS, "0 s"),
    ],
)
def test_values_are_written_in_few_characters(value: float, unit: Unit, text: str) -> None:
    assert written(value, unit) == text


# The command --------------------------------------------------------------------------------------------------------


def report(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, words)])
    return done.exit_code, done.output


def test_the_command_writes_the_page_and_again(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        code, said = report(run_in(tmp_path / "run"), "--out", out)
        assert code == 0 and str(out) in said
        assert Page(out.read_text()).figure("Loss").curves
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith("unfinished")] == []


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run_in(tmp_path / "runs" / "first")
    (tmp_path / "empty").mkdir()
    for given_path, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "runs" / "first" / "metrics.jsonl", "is a file. Give the folder"),
        (tmp_path / "runs", f"It holds runs: dist-optim report {tmp_path / 'runs' / 'first'}"),
        (tmp_path / "empty", "Give the --output_dir"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            read_runs([given_path])
        code, said = report(given_path, "--out", tmp_path / "page.html")
        assert code == 2 and said.startswith("Error: ") and not (tmp_path / "page.html").exists()


def test_a_file_that_is_not_its_own_is_kept(tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    for out, words in (
        (mine, "not a page of this command"),
        (tmp_path, "cannot be written"),
        (mine / "x", "cannot be"),
    ):
        code, said = report(run_in(tmp_path / "run"), "--out", out)
        assert code == 2 and words in said.replace("\n", " ")
    assert mine.read_text() == "<p>mine"
