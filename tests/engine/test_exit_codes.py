import pytest

from trainkit.engine.exit_codes import exit_codes
from trainkit.engine.failures import RankDiedError
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.preemption import PreemptedExit
from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError

ERRORS = [
    ConfigError("SOLVER.BASE_LR is -1"),
    CheckpointError("damaged"),
    UnknownNameError("model", "resnt", ["resnet"]),
    ResultsMismatchError("top1 is 0.1, expected 0.9"),
    NonFiniteError("Iteration 3 on rank 1 is not finite"),
    RankDiedError("Rank 1 (pid 7) was killed by SIGKILL"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_users_error_is_its_message_alone_and_exit_code_1(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised, exit_codes():
        raise error
    assert raised.value.code == 1
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_the_notes_say_where_and_what_failed_besides(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("SOLVER.BASE_LR is -1")
    error.__notes__ = ["Training failed in iteration 7 on rank 1.", "close raised too: OSError()"]
    with pytest.raises(SystemExit), exit_codes():
        raise error
    assert capsys.readouterr().err.splitlines() == [f"ConfigError: {error}", *error.__notes__]


@pytest.mark.parametrize("error", ERRORS)
def test_debug_keeps_the_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, exit_codes(debug=True):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("debug", [False, True])
def test_ctrl_c_exits_with_130(debug: bool) -> None:
    with pytest.raises(SystemExit) as raised, exit_codes(debug):
        raise KeyboardInterrupt
    assert raised.value.code == 130


@pytest.mark.parametrize("code", [143, 138])
def test_a_run_that_a_signal_ended_keeps_its_exit_code(code: int) -> None:
    with pytest.raises(SystemExit) as raised, exit_codes():
        raise PreemptedExit(code)
    assert raised.value.code == code


def test_any_other_error_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes():
        _ = 1 / 0


def test_without_an_error_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with exit_codes():
        pass
    assert capsys.readouterr().err == ""
