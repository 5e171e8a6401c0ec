import pytest

from trainkit.utils.develop import create_dummy_class, create_dummy_func


def test_a_dummy_function_raises_when_it_is_called() -> None:
    read_video = create_dummy_func("read_video", "av", "Run pip install av.")
    with pytest.raises(
        ImportError, match=r"^read_video needs av, which cannot be imported\. Run pip install av\.$"
    ):
        read_video("x.mp4", fps=3)


def test_a_dummy_class_raises_when_it_or_a_child_is_instantiated() -> None:
    dummy = create_dummy_class("DeformConv", ("a", "b"))
    child = type("Child", (dummy,), {})
    for cls in (dummy, child):
        with pytest.raises(ImportError, match=r"^DeformConv needs a, b, which cannot be imported"):
            cls(3, kernel_size=1)
    assert dummy.__name__ == "DeformConv"
    assert not isinstance(3, dummy)
