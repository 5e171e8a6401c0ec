import pytest

from trainkit.engine.exit_codes import exit_codes
from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError

ERRORS = [
    ConfigError("SOLVER.BASE_LR is -1"),
    CheckpointError("damaged"),
    UnknownNameError("model", "resnt", ["resnet"]),
    ResultsMismatchError("top1 is 0.1, expected 0.9"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_users_error_is_its_message_alone_and_exit_code_1(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised, exit_codes():
        raise error
    assert raised.value.code == 1
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


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


def test_any_other_error_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes():
        _ = 1 / 0


def test_without_an_error_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    with exit_codes():
        pass
    assert capsys.readouterr().err == ""
