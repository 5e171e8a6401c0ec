"""The writer passes on what it takes, hashes it, and delivers the first error when it ends."""

import gc
import hashlib
import io
import weakref

import pytest
import torch

from trainkit.checkpoint.hashing_writer import HashingWriter


def end_record() -> bytes:
    return b"PK\x05\x06" + bytes(18)


class FailingFile(io.BytesIO):
    """Fails at the given write and at all after it."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.num_left = at
        self.error: BaseException | None = error

    def write(self, data: object) -> int:
        self.num_left -= 1
        if self.num_left < 0:
            assert self.error is not None
            raise self.error
        return 0


@pytest.mark.parametrize("size", [0, 1, 21, 22, 23, 1 << 20, (1 << 20) + 22, 3_000_000])
def test_all_bytes_pass_whatever_their_pieces(size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256) + end_record()
    for piece in (len(content), 1 << 20, 70_001):
        file = io.BytesIO()
        with HashingWriter(file) as writer:
            for start in range(0, len(content), piece):
                writer.write(memoryview(content)[start : start + piece])
        assert writer.size == len(content)
        assert writer.hexdigest() == hashlib.sha256(content).hexdigest()
        writer.close_with(b"hello")
        assert file.getvalue() == content[:-2] + b"\x05\0hello"


def test_single_bytes_pass() -> None:
    file = io.BytesIO()
    content = b"abc" + end_record()
    with HashingWriter(file) as writer:
        for byte in content:
            writer.write(memoryview(bytes([byte])))
    writer.close_with(b"")
    assert file.getvalue() == content


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, MemoryError])
def test_an_error_of_the_file_is_the_one_that_is_raised(at: int, kind: type[BaseException]) -> None:
    file = FailingFile(at, kind("first"))
    data = {"x": torch.zeros(1_000_000)}
    with pytest.raises(kind, match="first"), HashingWriter(file) as writer:
        torch.save(data, writer)  # type: ignore[arg-type]  # it needs no more than write


def test_a_full_device_is_reported_as_such() -> None:
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left"),
        HashingWriter(file) as writer,
    ):
        torch.save({"x": torch.zeros(1_000_000)}, writer)  # type: ignore[arg-type]  # as above


def test_an_error_of_the_hash_reaches_the_caller_and_blocks_nothing() -> None:
    class BrokenHash:
        def update(self, data: bytes) -> None:
            raise ValueError("broken hash")

    writer = HashingWriter(io.BytesIO())
    writer._digest = BrokenHash()  # type: ignore[assignment]  # stands in
    with pytest.raises(ValueError, match="broken hash"), writer:
        # More than may wait for the hash.
        writer.write(memoryview(bytes(20 << 20)))


def test_an_error_of_the_caller_passes() -> None:
    with pytest.raises(KeyError, match="mine"), HashingWriter(io.BytesIO()):
        raise KeyError("mine")


def test_a_failed_writer_dies_by_reference_count() -> None:
    file = FailingFile(0, OSError("first"))
    writer = HashingWriter(file)
    gc.disable()
    try:
        with pytest.raises(OSError, match="first"), writer:
            writer.write(memoryview(bytes(2_000_000)))
        # The stand-in keeps its error, as no real file does.
        file.error = None
        died = weakref.ref(writer)
        del writer
        assert died() is None
    finally:
        gc.enable()
