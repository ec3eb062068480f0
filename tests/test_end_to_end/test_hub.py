"""A model on the hub, from a plan to an artifact: what is asked of the hub, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub, use
from tokenizers_of_models import NAMED, byte_level, write
from user_directory import UserDirectory, furiosa_build, make_new_directory, steps_in_this_process

TINY = ("tiny", "model.model_id_or_path=org/tiny", "name=tiny")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[UserDirectory]:
    with steps_in_this_process():
        yield make_new_directory(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the user's model with a tokenizer; the user has it no more."""
    write(user.root / "tiny", byte_level(), tokenizer_config=NAMED)
    with fake_hub() as hub:
        hub.put("org/tiny", user.root / "tiny")
        (user.root / "tiny").rename(tmp_path / "away")
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.grid
def test_a_plan_fetches_no_weights_and_a_build_fetches_them_once(
    user: UserDirectory, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = furiosa_build(user, "plan", *TINY)
    assert (planned.status, planned.err) == (0, "")
    assert hub.sent("model.safetensors"), "its header"
    assert hub.sent_whole("model.safetensors") == []
    built = furiosa_build(user, "build", *TINY)
    assert built.status == 0, built.err
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "away").iterdir()}
    assert {name: hub.sent_whole(name) for name in sizes} == {name: [size] for name, size in sizes.items()}
    assert user.latest().model_metadata.revision == hub.revisions["org/tiny", "main"]

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    number = len(hub.asked)
    again = furiosa_build(user, "build", *TINY, f"cache_dir={tmp_path / 'another-store'}")
    assert again.status == 0, again.err
    assert len(hub.asked) == number
