"""A file is replaced as a whole, or not at all."""

import os
import stat

import pytest

from jaxbptt.files import write_whole


def test_bytes_and_text(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "añ")
    assert path.read_bytes() == "añ".encode()
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_whole(tmp_path / "whole", "")
    (tmp_path / "plain").touch()
    whole, plain = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("whole", "plain"))
    assert whole == plain


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("content", "error"), [("new \ud800", UnicodeEncodeError), ("new", OSError)])
def test_the_old_file_stays_where_it_fails(tmp_path, monkeypatch, content, error):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        write_whole(path, content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_a_device_refused(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with pytest.raises(OSError, match="not a regular file"):
        write_whole("/dev/null", "new")
