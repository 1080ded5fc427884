import shutil

import pytest
import torch
from slimkit_aoti import backend
from slimkit_aoti.backend import FILE, Aoti
from torch import nn

import slimkit
from slimkit.errors import ExportError, UnavailableError
from slimkit.quantization.finished import finish

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_without_a_compiler_the_way_out_is_named(net, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs a C\+\+ compiler: install g\+\+"):
        Aoti().check(finish(net, (X[:1],)))


def test_what_inductor_refuses_is_a_sentence(net, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no lowering") from NotImplementedError("no kernel for sort.\nsee above")

    monkeypatch.setattr(backend.torch._inductor, "aoti_compile_and_package", refuse)
    (problem,) = Aoti().check(finish(net, (X[:1],)))
    assert problem.startswith("AOTInductor cannot compile this model: no kernel for sort. Replace")


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"model\.pt2 is missing: export again"):
        Aoti().load(tmp_path)
    (tmp_path / FILE).write_bytes(b"no package")
    with pytest.raises(ExportError, match="torch cannot load"):
        Aoti().load(tmp_path)


@pytest.mark.slow
def test_int8_convolutions_are_one_dnns_integer_kernels(net, tmp_path):
    small = slimkit.quantize(net, [X], Aoti())
    deployable = finish(small, (X[:1],))
    engine = Aoti()
    assert engine.check(deployable) == []
    engine.compile(deployable, tmp_path)
    counts = engine.operators(tmp_path)
    assert sum(count for name, count in counts.items() if name.endswith(" int8")) == 2
    (found,) = engine.load(tmp_path)(X[:1])
    error = (found - small.eval()(X[:1])).abs().max() / found.abs().max()
    assert error < 1e-5


def test_the_width_is_what_one_dnn_sums_rightly(monkeypatch):
    """Sums in 16 bits by twos, as without VNNI, and in 32 bits."""

    def told(value):
        monkeypatch.setattr(
            backend.torch.ops.onednn, "qconv_pointwise", lambda *_: torch.tensor([value])
        )
        return backend._weight_bits.__wrapped__()

    assert backend._weight_bits.__wrapped__() in (None, 7)
    assert told(255.0 * 127 * 16) is None
    assert told(32767.0 * 8) == 7
