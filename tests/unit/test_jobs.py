"""What comes back from a server is read as numbers only; the rest of jobs is tested on a real server, in tests/remote."""

from __future__ import annotations

import io

import pytest
import torch
from zstandard import ZstdCompressor

from hookbook.errors import RemoteError
from tests.support.needs import require


@pytest.fixture
def unpacked():
    require("nnsight")
    from hookbook.remote import service as jobs

    return jobs.unpacked


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def sent(value, compressed: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return ZstdCompressor().compress(file.getvalue()) if compressed else file.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
def test_numbers_come_back(unpacked, compressed):
    value = {"out": {0: torch.arange(4.0), 3: torch.tensor([[True]])}}
    back = unpacked(sent(value, compressed), compressed, "host")
    assert back.keys() == value.keys() and all(torch.equal(back["out"][slot], x) for slot, x in value["out"].items())


@pytest.mark.parametrize("compressed", [True, False])
def test_nothing_else_is_unpickled(unpacked, compressed, tmp_path):
    torch.load(io.BytesIO(sent(Runs(tmp_path / "ran"), False)), weights_only=False)
    assert (tmp_path / "ran").exists()  # what would happen
    (tmp_path / "ran").unlink()
    with pytest.raises(RemoteError, match="something else than numbers"):
        unpacked(sent({"out": {0: Runs(tmp_path / "ran")}}, compressed), compressed, "host")
    assert not (tmp_path / "ran").exists()
