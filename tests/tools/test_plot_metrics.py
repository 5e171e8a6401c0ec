import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from tools.plot_metrics import (
    Panel,
    Run,
    choose_keys,
    draw,
    group_into_panels,
    main,
    name_runs,
    panel_of,
    read_run,
)
from trainkit.utils.errors import ConfigError, UnknownNameError


def write_run(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir()
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.json").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "baseline",
        {"iteration": 19, "lr": 0.1, "total_loss": 2.0, "loss_cls": 2.0, "time": 0.03},
        {"iteration": 39, "lr": 0.2, "total_loss": None, "loss_cls": None, "time": 0.03},
        {"iteration": 59, "lr": 0.1, "total_loss": 1.0, "loss_cls": 1.0, "val/top1": 0.8},
    )


def test_a_run_is_read_from_its_folder_or_its_file(run: Path) -> None:
    points = read_run(run)["lr"]
    assert points == [(19, 0.1), (39, 0.2), (59, 0.1)]
    assert read_run(run / "metrics.json")["lr"] == points


def test_null_is_a_gap_and_a_metric_may_be_in_some_lines_only(run: Path) -> None:
    metrics = read_run(run)
    assert math.isnan(metrics["total_loss"][1][1])
    assert metrics["val/top1"] == [(59, 0.8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist. Name a run's output folder"),
        ("", "holds no metrics"),
        ('{"iteration": 3}\n', "holds no metrics"),
        (
            '{"iteration": 3, "x": 1}\n{"iteration": 5, "x"',
            "is damaged: line 2 .* Delete that line",
        ),
        ('{"x": 1}\n', "is damaged: line 1"),
        ('{"iteration": 3, "x": "high"}\n', "is damaged: line 1"),
        ('{"iteration": Infinity, "x": 1}\n', "is damaged: line 1"),
        ('{"iteration": 1e300, "x": 1}\n', "is damaged: line 1"),
        ('{"iteration": 1, "x": ' + "[" * 100_000 + "\n", "is damaged: line 1"),
        ("[1, 2]\n", "is damaged: line 1"),
        ("\x00\x00\x00\n", "is damaged: line 1"),
    ],
)
def test_a_missing_empty_or_damaged_file_is_one_line_of_error_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "metrics.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_run(file)
    assert main([str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ConfigError: {file}")
    assert error.count("\n") == 1
    assert not (tmp_path / "metrics.png").exists()


def test_defaults_are_losses_lr_and_evaluation_metrics() -> None:
    names = ["eta_seconds", "time", "val/top1", "loss_box", "total_loss", "loss_cls", "lr"]
    run = {name: [(0, float(index))] for index, name in enumerate(names)}
    assert choose_keys([run]) == ["total_loss", "loss_box", "loss_cls", "lr", "val/top1"]


def test_a_total_that_repeats_the_only_loss_is_drawn_once(run: Path) -> None:
    assert choose_keys([read_run(run)]) == ["total_loss", "lr", "val/top1"]
    assert choose_keys([read_run(run)], ["loss_cls"]) == ["loss_cls"]


def test_an_unknown_key_is_answered_with_the_nearest_one(run: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown metric 'val/top'. Did you mean 'val/top1'"
    ):
        choose_keys([read_run(run)], ["val/top"])


def test_a_run_without_losses_says_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"no loss to draw; choose --keys from time."):
        choose_keys([{"time": [(0, 1.0)]}])


def test_panels_group_what_shares_an_axis() -> None:
    known = {"val/top1", "val/top1-T-shirt/top", "val/top5", "fashion-mnist/acc", "lr", "time"}
    assert panel_of("val/loss", known) == Panel("Loss")
    assert panel_of("lr", known) == Panel("Learning rate")
    assert panel_of("val/top5", known) == Panel("val", "val/")
    assert panel_of("val/top1-T-shirt/top", known).title == "val/top1 of each class"
    assert panel_of("fashion-mnist/acc", known).title == "fashion-mnist"
    assert panel_of("time", known) == Panel("time")


def test_a_breakdown_by_many_classes_is_left_out_unless_asked_for() -> None:
    keys = ["val/AP", *(f"val/AP-{i}" for i in range(80))]
    runs = [{key: [(0, 1.0)] for key in keys}]
    titles = [panel.title for panel in group_into_panels(keys, runs, max_class_curves=20)]
    assert titles == ["val"]
    assert len(group_into_panels(keys, runs, max_class_curves=sys.maxsize)) == 2


def test_every_chart_has_a_title_labels_and_the_names_of_the_runs() -> None:
    run = {"lr": [(0, 1.0)], "val/top1": [(0, 0.5)], "val/top5": [(0, 0.9)]}
    runs = {"baseline": run, "other": {"lr": run["lr"]}}
    keys = ["lr", "val/top1", "val/top5"]
    figure = draw(runs, group_into_panels(keys, list(runs.values()), 20))
    lr, val = figure.axes
    assert (lr.get_title(), lr.get_xlabel(), lr.get_ylabel()) == (
        "Learning rate",
        "iteration",
        "lr",
    )
    assert [line.get_label() for line in lr.get_lines()] == ["baseline", "other"]
    assert [line.get_label() for line in val.get_lines()] == ["baseline: top1", "baseline: top5"]
    assert len({line.get_color() for line in lr.get_lines()}) == 2
    assert lr.get_legend() is not None


def test_one_run_is_named_by_the_figures_title() -> None:
    run = {"total_loss": [(0, 1.0)], "loss_cls": [(0, 0.5)], "lr": [(0, 0.1)]}
    panels = [Panel("Loss", keys=["total_loss", "loss_cls"]), Panel("Learning rate", keys=["lr"])]
    figure = draw({"baseline": run}, panels)
    loss, lr = figure.axes
    assert figure.get_suptitle() == "baseline"
    assert [line.get_label() for line in loss.get_lines()] == ["total_loss", "loss_cls"]
    assert loss.get_ylabel() == "loss"
    assert lr.get_legend() is None


def test_a_crowded_legend_stands_beside_its_chart() -> None:
    keys = [f"val/AP-class {i}" for i in range(5)]
    run: Run = {key: [(0, 0.2), (9, 0.5)] for key in keys}
    panel = Panel("AP of each class", "val/AP-", by_class=True, keys=keys)
    figure = draw({"baseline": run}, [panel])
    figure.canvas.draw()
    (ax,) = figure.axes
    legend = ax.get_legend()
    assert legend is not None
    assert legend.get_window_extent().x0 >= ax.get_window_extent().x1
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    assert (
        figure.get_figwidth() > draw({"baseline": run}, [Panel("AP", keys=keys[:4])]).get_figwidth()
    )
    assert ax.get_ylabel() == "val/AP"


def test_a_single_evaluation_shares_the_iterations_of_the_whole_run() -> None:
    run: Run = {"lr": [(19, 0.1), (299, 0.0)], "val/top1": [(300, 0.8)]}
    figure = draw({"baseline": run}, [Panel("lr", keys=["lr"]), Panel("val", keys=["val/top1"])])
    lr, val = figure.axes
    assert lr.get_xlim() == val.get_xlim() == pytest.approx((-6, 306))
    assert all(tick == int(tick) for tick in val.get_xticks())
    assert lr.get_ylim()[0] == 0


def test_ticks_of_a_short_run_are_whole_iterations() -> None:
    (ax,) = draw({"baseline": {"lr": [(0, 0.1), (2, 0.0)]}}, [Panel("lr", keys=["lr"])]).axes
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_equal_runs_differ_in_color_style_and_marker() -> None:
    run: Run = {"total_loss": [(0, 1.0)], "loss_cls": [(0, 0.5)]}
    (ax,) = draw({"a": run, "b": run}, [Panel("Loss", keys=list(run))]).axes
    a, _, b, _ = ax.get_lines()
    assert a.get_ydata() == b.get_ydata()
    assert a.get_color() != b.get_color()
    assert a.get_linestyle() != b.get_linestyle()
    assert a.get_marker() != b.get_marker()


def test_runs_are_named_by_their_folders_unless_those_are_equal(tmp_path: Path) -> None:
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (a, b):
        folder.mkdir(parents=True)
    assert name_runs([a / "metrics.json"]) == ["run"]
    assert name_runs([a, b]) == [str(a), str(b)]


def test_the_image_lies_in_the_first_run_by_default(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", {"iteration": 9, "total_loss": 3.0})
    assert main([str(run / "metrics.json"), str(other)]) == 0
    assert capsys.readouterr().out == f"{run / 'metrics.png'}\n"
    height, width, _ = matplotlib.image.imread(run / "metrics.png").shape
    assert width > height > 400


def test_output_and_keys_are_obeyed(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--output", str(tmp_path / "x.png"), "--keys", "time"]) == 0
    assert matplotlib.image.imread(tmp_path / "x.png").ndim == 3
    assert not (run / "metrics.png").exists()


def test_an_image_that_cannot_be_written_is_an_error_of_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--output", str(tmp_path / "gone" / "x.png")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_missing_matplotlib_is_answered_with_the_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(run)]) == 1
    assert "pip install 'trainkit[plot]'" in capsys.readouterr().err


def test_names_and_values_that_cannot_be_drawn_do_no_harm(tmp_path: Path) -> None:
    names = ["loss$x^{$", "loss\ud800", "loss\0", "_loss", "loss/", "loss\n\n"]
    lines = [{"iteration": i, **dict.fromkeys(names, v)} for i, v in enumerate((1e308, -1e308, 1))]
    file = tmp_path / "metrics.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    assert main([str(file)]) == 0
    assert (tmp_path / "metrics.png").stat().st_size > 0
