"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saccade.core.files import atomic_write, check_writable


def test_the_file_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with atomic_write(str(path)) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_and_nothing_lost_when_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        for error in (RuntimeError("broken off"), KeyboardInterrupt()):
            with pytest.raises(type(error)), atomic_write(path) as temporary:
                temporary.write_text("half")
                raise error
        assert list(tmp_path.iterdir()) == ([] if before is None else [path])
        assert before is None or path.read_text() == before


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"a much longer old content")
    reader = path.open("rb")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert reader.read() == b"a much longer old content"  # whoever reads it goes on reading the old one
    reader.close()


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    for bad, names in ((tmp_path / "gone" / "x", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=names):
            check_writable(bad)
        with pytest.raises(ValueError, match=names), atomic_write(bad):
            pytest.fail("the block must not run")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="does not exist"):
        check_writable(file / "below")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_permissions_are_respected(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    with pytest.raises(ValueError, match="not writable"):
        check_writable(closed / "x")
    closed.chmod(0o700)
    kept = tmp_path / "kept"
    kept.touch(mode=0o400)
    with pytest.raises(ValueError, match="not writable"):
        check_writable(kept)
