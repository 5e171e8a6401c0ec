import io
import logging
import re
import sys
from pathlib import Path

import pytest

from trainkit.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_line_carries_date_time_and_the_childs_name(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger()
    logging.getLogger("trainkit.engine.hooks").info("%d steps", 3)
    line = capsys.readouterr().out
    assert re.fullmatch(r"\[\d\d/\d\d \d\d:\d\d:\d\d trainkit\.engine\.hooks\]: 3 steps\n", line)


def test_name_is_abbreviated_only_for_the_package_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = setup_logger(abbrev_name="tk")
    logging.getLogger("trainkit.data").info("x")
    logger.info("x")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["tk.data]:", "tk]:"]


def test_warnings_and_errors_say_what_they_are(tmp_path: Path) -> None:
    logger = setup_logger(tmp_path)
    logger.warning("careful")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it broke")
    text = read(tmp_path / "log.txt")
    assert "]: WARNING careful\n" in text
    assert "]: ERROR it broke\nTraceback" in text
    assert text.endswith("ValueError: broken\n")


def test_color_is_for_the_terminal_and_never_for_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("termcolor.termcolor.can_colorize", lambda **_: True)
    setup_logger(tmp_path).warning("x")
    assert capsys.readouterr().out.count("\x1b[") > 2
    setup_logger(tmp_path, color=False).warning("x")
    assert "\x1b[" not in capsys.readouterr().out
    assert "\x1b[" not in read(tmp_path / "log.txt")


def test_no_color_where_standard_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logger().warning("x")
    assert "\x1b[" not in capsys.readouterr().out


def test_other_ranks_print_nothing_and_write_their_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logger(tmp_path, distributed_rank=2).info("from rank 2")
    assert capsys.readouterr().out == ""
    assert "from rank 2" in read(tmp_path / "log.txt.rank2")
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("as_string", [False, True])
@pytest.mark.parametrize("name", ["run.log", "run.txt"])
def test_d48_a_path_that_names_a_file_is_used_as_it_is(
    tmp_path: Path, name: str, as_string: bool
) -> None:
    output = tmp_path / "deep" / name
    setup_logger(str(output) if as_string else output).info("x")
    assert "]: x" in read(output)


def test_d48_the_file_is_utf8_and_appended_to(tmp_path: Path) -> None:
    logger = setup_logger(tmp_path)
    logger.info("first, grün")
    # Also where the machine's own encoding is another one.
    assert [h.encoding for h in logger.handlers if isinstance(h, logging.FileHandler)] == ["utf-8"]
    setup_logger(tmp_path).info("second")
    assert re.findall(r"\]: (.*)", read(tmp_path / "log.txt")) == ["first, grün", "second"]


def test_d48_a_users_package_is_logged_beside_trainkit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = setup_logger(tmp_path, name="my_project", abbrev_name="mine")
    try:
        setup_logger(tmp_path)
        logging.getLogger("my_project.data").info("of the project")
        logging.getLogger("trainkit.engine").info("of the library")
        for text in (read(tmp_path / "log.txt"), capsys.readouterr().out):
            assert re.findall(r"(\S+)\]: (.*)", text) == [
                ("mine.data", "of the project"),
                ("trainkit.engine", "of the library"),
            ]
    finally:
        for handler in list(own.handlers):
            own.removeHandler(handler)
            handler.close()


def test_a_logger_can_be_silent_and_leave_printing_to_the_root_logger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    setup_logger(tmp_path, configure_stdout=False).info("first")
    assert capsys.readouterr().out == ""
    assert "first" in read(tmp_path / "log.txt")
    assert caplog.messages == []
    setup_logger(tmp_path, configure_stdout=False, enable_propagation=True).info("second")
    assert caplog.messages == ["second"]


def test_a_second_call_returns_the_same_logger_and_doubles_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_logger(tmp_path) is setup_logger(tmp_path)
    logging.getLogger("trainkit").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert read(tmp_path / "log.txt").count("once") == 1


def test_a_second_run_in_one_process_logs_to_its_own_folder(tmp_path: Path) -> None:
    setup_logger(tmp_path / "a").info("of run a")
    setup_logger(tmp_path / "b").info("of run b")
    assert "of run b" not in read(tmp_path / "a" / "log.txt")
    assert "of run a" not in read(tmp_path / "b" / "log.txt")


def test_a_call_without_output_keeps_the_file(tmp_path: Path) -> None:
    setup_logger(tmp_path)
    setup_logger().info("still here")
    assert "still here" in read(tmp_path / "log.txt")


def test_handlers_of_others_are_left_alone() -> None:
    theirs = logging.NullHandler()
    logging.getLogger("trainkit").addHandler(theirs)
    assert theirs in setup_logger().handlers


def test_output_follows_a_redirected_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = setup_logger()
    redirected = io.StringIO()
    monkeypatch.setattr(sys, "stdout", redirected)
    logger.info("x")
    assert redirected.getvalue().endswith("]: x\n")


def test_log_first_n_counts_by_the_line_that_calls(caplog: pytest.LogCaptureFixture) -> None:
    for index in range(5):
        log_first_n(logging.WARNING, f"here {index}", n=2)
        log_first_n(logging.WARNING, f"there {index}")
    assert caplog.messages == ["here 0", "there 0", "here 1"]


def test_log_first_n_can_count_by_text(caplog: pytest.LogCaptureFixture) -> None:
    for text in "abab":
        log_first_n(logging.WARNING, f"text {text}", key="message")
    log_first_n(logging.WARNING, "text a", key="message")
    log_first_n(logging.WARNING, "text a", key=("caller", "message"))
    assert caplog.messages == ["text a", "text b", "text a"]


def test_log_every_n_logs_the_first_of_each_n(caplog: pytest.LogCaptureFixture) -> None:
    for index in range(7):
        log_every_n(logging.WARNING, f"{index}", n=3)
    assert caplog.messages == ["0", "3", "6"]


def test_log_every_n_seconds_counts_by_the_line_that_calls(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in (0.0, 1.0, 9.9, 10.0, 19.0, 35.0):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        log_every_n_seconds(logging.WARNING, f"here {now:g}", n=10)
        if now == 9.9:
            log_every_n_seconds(logging.WARNING, "there", n=10)
    assert caplog.messages == ["here 0", "there", "here 10", "here 35"]


def test_small_table_has_the_names_above_the_values() -> None:
    lines = create_small_table({"top1": 0.91044, "name": "x"}).splitlines()
    assert [lines[0].split(), lines[2].split()] == [
        ["|", "top1", "|", "name", "|"],
        ["|", "0.910", "|", "x", "|"],
    ]
    assert create_small_table({}) == ""


def test_record_belongs_to_the_calling_module_and_line(caplog: pytest.LogCaptureFixture) -> None:
    log_first_n(logging.WARNING, "x")
    log_every_n(logging.WARNING, "y", name="trainkit.elsewhere")
    log_every_n_seconds(logging.WARNING, "z", name="trainkit.elsewhere")
    assert [r.name for r in caplog.records] == [__name__, *["trainkit.elsewhere"] * 2]
    assert {record.filename for record in caplog.records} == {"test_logger.py"}
