from __future__ import annotations

import threading
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import _create_progress_bar

from furiosa_build.core import progress
from furiosa_build.core.file_digests import hash_file
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.download import download_meter
from furiosa_build.weights.safetensors_writer import SafetensorsWriter


def test_what_one_place_counts_another_reads(tmp_path: Path) -> None:
    path = tmp_path / "meter"
    with progress.metered(path):
        assert progress.read(path) is None
        progress.expect(100)
        assert progress.read(path) == (0, 100)
        progress.advance(30)
        progress.expect(100)
        progress.advance(20)
        assert progress.read(path) == (50, 200)
    assert not path.exists()
    assert progress.read(path) is None


def test_without_a_meter_nothing_is_counted_and_nothing_fails(tmp_path: Path) -> None:
    progress.expect(1)
    progress.advance(1)
    with progress.metered(None):
        progress.expect(1)
    with progress.metered(tmp_path / "no such directory" / "meter"):
        progress.expect(1)


def test_a_meter_that_is_damaged_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "meter"
    path.write_bytes(b"\1")
    assert progress.read(path) is None


def test_never_more_than_all(tmp_path: Path) -> None:
    """More may be read than was thought: a file that was hashed, and is hashed again."""
    with progress.metered(tmp_path / "meter"):
        progress.expect(10)
        progress.advance(20)
        assert progress.read(tmp_path / "meter") == (10, 10)


def test_hashing_counts_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * (9 << 20))
    with progress.metered(tmp_path / "meter"):
        progress.expect(20 << 20)
        hash_file(tmp_path / "file")
        assert progress.read(tmp_path / "meter") == (9 << 20, 20 << 20)


def test_writing_counts_the_tensors(tmp_path: Path) -> None:
    layouts = {name: Layout("bfloat16", (3, 8)) for name in "ab"}
    with progress.metered(tmp_path / "meter"), SafetensorsWriter(tmp_path / "file", layouts) as writer:
        progress.expect(96)
        writer.write("a", torch.zeros(3, 8, dtype=torch.bfloat16))
        assert progress.read(tmp_path / "meter") == (48, 96)
        writer.write("b", torch.zeros(3, 8, dtype=torch.bfloat16))
        assert progress.read(tmp_path / "meter") == (96, 96)


def test_downloads_are_counted_as_the_hubs_library_tells_of_them(tmp_path: Path) -> None:
    """It makes its bars by this function, one for the network and one for the disk, and updates them in threads."""
    with progress.metered(tmp_path / "meter"):
        kind = download_meter()
        network, disk = (
            _create_progress_bar(cls=kind, log_level=0, desc=desc, total=0, initial=0, unit="B", unit_scale=True)
            for desc in ("Downloading bytes", "Reconstructing (incomplete total...)")
        )
        network.total = disk.total = 1000
        disk.refresh()
        threads = [threading.Thread(target=bar.update, args=(n,)) for bar, n in [(disk, 300), (network, 900)]]
        for thread in threads:
            thread.start()
            thread.join()
        disk.set_description("Reconstruction complete")
        assert progress.read(tmp_path / "meter") == (300, 1000)
