"""The cache of teachers: found again to the last bit, and never where anything differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Batches, Lit, fit
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from slimkit import SlimModule
from slimkit.errors import SlimkitError
from slimkit.training.digest import code_of
from slimkit.training.teacher_cache import TeacherCache, key_of

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

FEATURES = {"name": "hint", "at": "net.5", "weight": 0.5}


class Counted(nn.Module):
    """How often it computes; what it gives of a sample may depend on the others."""

    calls = 0

    def __init__(self, scale: float = 1.0, mixes: bool = False) -> None:
        super().__init__()
        self.net = Lit().net
        self.mixes = mixes
        with torch.no_grad():
            self.net[8].weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.net(x - x.mean(0) if self.mixes else x)


class Shuffled(Batches):
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 8, shuffle=True, generator=torch.Generator().manual_seed(1))


def trained(folder: Path | None, data: Any = None, epochs: int = 2, **options: Any) -> SlimModule:
    Counted.calls = 0
    section = {
        "teacher": {"name": "test_teacher_cache:Counted", "options": options},
        "losses": ["kl", FEATURES],
        "cache": None if folder is None else str(folder),
    }
    slim = SlimModule(Lit(), {"quantize": {}, "distill": section})
    said: list[str] = []
    slim.announce = said.append
    fit(slim, data, max_epochs=epochs)
    slim.said = said
    return slim


def same(one: SlimModule, two: SlimModule) -> bool:
    state = two.state_dict()
    return all(torch.equal(v, state[k]) for k, v in one.state_dict().items())


def test_a_teacher_computes_each_batch_once_and_training_is_the_same(tmp_path: Path) -> None:
    plain = trained(None)
    assert Counted.calls == 8
    cached = trained(tmp_path)
    assert Counted.calls == 4 + 1  # and one sample alone
    assert same(plain, cached)
    again = trained(tmp_path)
    assert Counted.calls == 0
    assert same(plain, again)


def test_samples_are_found_in_batches_of_another_order(tmp_path: Path) -> None:
    plain = trained(None, Shuffled(), epochs=3)
    assert Counted.calls == 12
    cached = trained(tmp_path, Shuffled(), epochs=3)
    assert Counted.calls == 4 + 1
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_mixes_samples_is_found_by_whole_batches(tmp_path: Path) -> None:
    plain = trained(None, mixes=True)
    assert same(plain, trained(tmp_path, mixes=True))
    assert Counted.calls == 4 + 1  # the same batches came again
    trained(tmp_path, Shuffled(), mixes=True)
    assert Counted.calls >= 8  # others did not


@pytest.mark.parametrize("change", ["weights", "place", "precision", "inputs", "autocast"])
def test_anything_else_is_computed_anew(tmp_path: Path, change: str) -> None:
    trained(tmp_path, epochs=1)
    data = Batches()
    if change == "inputs":
        data.train.tensors[0].add_(1e-3)
    section: dict[str, Any] = {
        "teacher": {
            "name": "test_teacher_cache:Counted",
            "options": {"scale": 1.001 if change == "weights" else 1.0},
        },
        "losses": ["kl", {**FEATURES, "at": "net.2" if change == "place" else "net.5"}],
        "precision": "bf16" if change == "precision" else None,
        "cache": str(tmp_path),
    }
    Counted.calls = 0
    precision = "bf16-mixed" if change == "autocast" else "32-true"
    fit(SlimModule(Lit(), {"quantize": {}, "distill": section}), data, precision=precision)
    assert Counted.calls == 4 + 1


@pytest.mark.parametrize("damage", ["cut short", "one byte", "empty", "text"])
def test_a_damaged_entry_is_made_again_with_a_note(tmp_path: Path, damage: str) -> None:
    plain = trained(tmp_path, epochs=1)
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = file.read_bytes()
    kept = {name: t.clone() for name, t in load_file(file).items()}  # not of the file's memory
    bad = {"cut short": content[:-9], "empty": b"", "text": b"not tensors at all"}
    flipped = bytearray(content)
    flipped[-3] ^= 64
    file.write_bytes(bad.get(damage, bytes(flipped)))
    again = trained(tmp_path, epochs=1)
    assert Counted.calls in (1, 2)  # its batch, and one sample alone
    assert same(plain, again)
    assert [line for line in again.said if f"{file} is damaged" in line and "made again" in line]
    assert all(torch.equal(t, kept[name]) for name, t in load_file(file).items())
    trained(tmp_path, epochs=1)
    assert Counted.calls == 0


def test_half_written_entries_are_never_read(tmp_path: Path) -> None:
    trained(tmp_path, epochs=1)
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".safetensors"] * 4
    next(tmp_path.iterdir()).joinpath("abc.123.partial").write_bytes(b"half of")
    assert trained(tmp_path, epochs=1).said == []
    assert Counted.calls == 0


def test_a_cache_that_finds_nothing_is_said(tmp_path: Path) -> None:
    class Moving(Batches):
        def train_dataloader(self) -> Any:
            noise = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(self.n))
            self.n += 1
            images, labels = self.train.tensors
            return DataLoader(torch.utils.data.TensorDataset(images + noise, labels), 8)

        n = 0

    Counted.calls = 0
    section = {"teacher": "test_teacher_cache:Counted", "cache": str(tmp_path)}
    slim = SlimModule(Lit(), {"quantize": {}, "distill": section})
    said: list[str] = []
    slim.announce = said.append
    fit(slim, Moving(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert [line for line in said if "nothing that the teacher" in line and "came again" in line]
    assert Counted.calls == 12 + 1


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SlimkitError, match="distill.cache: .*file.* cannot be made"):
        trained(tmp_path / "file", epochs=1)


def test_keys_are_of_every_byte_of_every_input() -> None:
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    key = key_of((x,), {})
    assert len(set(key.samples)) == 4
    assert key_of((x.clone(),), {}) == key
    assert key_of((x.transpose(1, 2).contiguous().transpose(1, 2),), {}) == key  # another layout
    moved = key_of((x[[1, 0, 2, 3]],), {})
    assert moved.whole != key.whole
    assert moved.samples == (key.samples[1], key.samples[0], *key.samples[2:])
    near = x.clone()
    near[2, 0, 0] = torch.nextafter(near[2, 0, 0], torch.tensor(9.0))
    changed = key_of((near,), {})
    assert [a == b for a, b in zip(changed.samples, key.samples, strict=True)] == [1, 1, 0, 1]
    for others in (
        key_of((x,), {"mask": torch.ones(4)}),
        key_of((x, 3), {}),
        key_of((x.double(),), {}),
        key_of((x.reshape(4, 2, 3),), {}),
        key_of(({"x": x},), {}),
    ):
        assert not set(others.samples) & set(key.samples)
    assert key_of((x, torch.ones(3)), {}).samples == ()
    assert key_of((x, torch.tensor(1.0)), {}).samples == ()


def test_rows_are_read_from_disk_where_memory_is_short(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("slimkit.training.teacher_cache._IN_MEMORY", 0)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    cache = TeacherCache(tmp_path, "a" * 64, print)
    cache.keep(key_of((x[:3],), {}), {"output": 2 * x[:3]}, apart=True)
    cache.keep(key_of((x[3:],), {}), {"output": 2 * x[3:]}, apart=True)
    for opened in (cache, TeacherCache(tmp_path, "a" * 64, print)):
        found = opened.find(key_of((x[[5, 0, 3]],), {}))
        assert found is not None
        assert torch.equal(found["output"], 2 * x[[5, 0, 3]])
    assert TeacherCache(tmp_path, "b" * 64, print).find(key_of((x[:3],), {})) is None


class Tanh(Counted):
    """The same weights under another function, told by no name."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Tanh()


def test_a_teacher_of_the_same_weights_and_another_forward_is_another() -> None:
    class Scaled(Counted):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

    found = {str(code_of(net)) for net in (Counted(), Tanh(), Scaled(1.0), Scaled(2.0))}
    assert len(found) == 4
    assert code_of(Counted()) == code_of(Counted())
