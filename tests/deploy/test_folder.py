"""Folders that are replaced whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimkit.deploy.folder import MANIFEST, move, read_manifest, replacing, write_manifest
from slimkit.errors import ArtifactError


def artifact(folder: Path, text: str = "old") -> Path:
    (folder / "exports").mkdir(parents=True)
    (folder / "exports" / "model.bin").write_text(text)
    write_manifest(folder, {"format": 1, "note": text})
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_block_replaces_the_old_artifact(tmp_path: Path) -> None:
    target = artifact(tmp_path / "small")
    with replacing(target) as work:
        artifact(work / "inner", "new")
        write_manifest(work, {"format": 1})
    assert "inner/exports/model.bin" in tree(target)
    assert "exports/model.bin" not in tree(target)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_parents_are_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b") as work:
        (work / "x").write_text("x")
    assert tree(tmp_path) == {"a/b/x": b"x"}


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_artifact_and_nothing_else(tmp_path, problem) -> None:
    target = artifact(tmp_path / "small")
    before = tree(tmp_path)

    def fail() -> None:
        with replacing(target) as work:
            (work / "half").write_text("half")
            raise problem

    with pytest.raises(problem):
        fail()
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_failed_rename_brings_the_old_artifact_back(tmp_path: Path, monkeypatch) -> None:
    target = artifact(tmp_path / "small")
    before = tree(target)
    source = artifact(tmp_path / "new", "new")
    rename = Path.rename

    def failing(self, to):
        if self == source:
            raise OSError("disk full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        move(source, target)
    assert tree(target) == before


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ArtifactError, match="will not replace"), replacing(tmp_path / "photos"):
        pytest.fail("the block ran")
    assert tree(tmp_path) == {"photos/cat.jpg": b"cat"}


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"), replacing(tmp_path / "small"):
        pytest.fail("the block ran")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with replacing(tmp_path / "small") as work:
        (work / "x").write_text("x")
    assert tree(tmp_path / "small") == {"x": b"x"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_manifest(artifact(tmp_path / "small"))["note"] == "old"


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "small")
    (folder / "exports" / "model.bin").write_text("olD")
    with pytest.raises(ArtifactError, match=r"model\.bin was changed after the export"):
        read_manifest(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "small")
    (folder / "exports" / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_manifest_is_damaged(tmp_path: Path, share: float) -> None:
    folder = artifact(tmp_path / "small")
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: int(share * len(text))])
    with pytest.raises(ArtifactError, match="is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"format": 1}', '{"format": 1, "files": 3}'])
def test_json_of_another_kind_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        read_manifest(tmp_path)


def test_another_format_is_named(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "small")
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ArtifactError, match="has format 2; this slimkit reads format 1"):
        read_manifest(folder)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no slimkit artifact"):
        read_manifest(tmp_path)


def test_the_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "runs" / "latest"
    disk.mkdir()
    link.parent.mkdir()
    link.symlink_to(disk)
    for text in ("one", "two"):
        with replacing(link) as work:
            (work / "weights").write_text(text)
            write_manifest(work, {"format": 1})
        assert link.is_symlink()
        assert (disk / "weights").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "runs"]
    assert [p.name for p in link.parent.iterdir()] == ["latest"]


@pytest.mark.parametrize("name", [".", "", "/", "../here"])
def test_the_current_folder_and_the_root_are_refused(tmp_path: Path, monkeypatch, name) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArtifactError, match="name one, such as runs/small"), replacing(Path(name)):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["here"]
