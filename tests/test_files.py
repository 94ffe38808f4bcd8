"""Files that are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from mpg.files import check_writable, whole_file


def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with whole_file("out", path) as file:
        file.write_text("new")
        assert (path.read_text(), file.suffix) == ("old", ".txt")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), TypeError()])
def test_nothing_half_written_stays(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with whole_file("out", path) as file:
            file.write_text("ne")
            raise error

    wanted = f"out: expected a file that can be written, got '{path}': No space left on device"
    with pytest.raises(ValueError if isinstance(error, OSError) else type(error)) as raised:
        write_half()
    assert not isinstance(error, OSError) or str(raised.value) == wanted
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_a_link_names_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with whole_file("out", tmp_path / "link") as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_probe_leaves_what_is_there(tmp_path):
    check_writable("out", tmp_path / "new")
    (tmp_path / "old").write_text("old")
    check_writable("out", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("place", ["none/file", "old/file", "."])
def test_places_that_hold_no_file_are_refused_by_the_argument(place, tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ValueError, match="out: expected a file"):
        check_writable("out", tmp_path / place)
