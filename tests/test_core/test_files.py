from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from furiosa_build.core.files import link_or_copy


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("is_link", [True, False])
def test_the_content_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool, is_link: bool
) -> None:
    content, target = tmp_path / "content", tmp_path / "new" / "target"
    content.write_bytes(b"content")
    source = tmp_path / "source" if is_link else content
    if is_link:
        source.symlink_to("content")
    if not can_link:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    link_or_copy(source, target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"content"
    assert target.samefile(content) == can_link
