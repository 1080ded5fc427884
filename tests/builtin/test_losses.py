"""What every distillation loss keeps to; `kl` and `feature-mse` written out on two samples."""

import math

import pytest
import torch

from slimkit.builtin.losses.feature_mse import FeatureMSE
from slimkit.builtin.losses.kl import KL
from slimkit.interfaces import DistillationLoss
from slimkit.registry import discover


def test_kl_of_two_samples_is_their_mean_divergence():
    # teacher (1/2, 1/2) and student (1/4, 3/4) differ; the second sample agrees
    student = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert KL(temperature=1)(student, teacher).item() == pytest.approx(one / 2, rel=1e-6)


def test_kl_diverges_from_the_teacher_and_not_from_the_student():
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[0.0, math.log(3)]])
    one = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert KL(temperature=1)(student, teacher).item() == pytest.approx(one, rel=1e-6)


def test_kl_softens_both_by_the_temperature_and_multiplies_by_its_square():
    student, teacher = torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[0.0, 0.0]])
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert KL(temperature=2)(student, teacher).item() == pytest.approx(4 * one, rel=1e-6)


def test_kl_of_a_map_is_the_mean_over_its_positions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4, 4, generator=generator)  # 3 samples, 5 classes
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    assert KL()(student, teacher).item() == pytest.approx(KL()(*flat).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_kl_refuses_a_temperature_that_is_not_over_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be over 0"):
        KL(temperature=temperature)


def test_kl_of_half_precision_logits_is_computed_in_float32():
    student, teacher = torch.tensor([[0.0, 1e-3]]), torch.tensor([[0.0, 0.0]])
    half = KL()(student.half(), teacher.half()).item()
    assert half == pytest.approx(KL()(student.half().float(), teacher).item(), rel=1e-6)


def test_feature_mse_is_the_mean_of_the_squared_differences():
    student, teacher = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[0.0, 2.0], [5.0, 1.0]]),
    )
    assert FeatureMSE()(student, teacher).item() == (1 + 0 + 4 + 9) / 4


def test_feature_mse_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*protect this layer"):
        FeatureMSE()(torch.zeros(2, 3), torch.zeros(2, 4))


def pair(*shape: int) -> list[torch.Tensor]:
    return [*torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()]


MAPS = {"attention", "cwd"}
BUILT_IN = [p.name for p in discover().plugins if (p.kind, p.package) == ("loss", "slimkit")]
RELATIONS = {"rkd", "similarity", "pkt", "crd"}  # of a batch: repeating it makes other batches


def case(name: str) -> tuple[list, dict]:
    """What the student and the teacher give, and what else the loss is given."""
    if name == "fsp":
        first, second = pair(6, 3, 4, 4), pair(6, 5, 2, 2)
        return [*zip(first, second, strict=True)], {}
    if name == "box":
        return [torch.cat([x[..., :2], x[..., :2] + x[..., 2:].exp()], -1) for x in pair(6, 4)], {}
    return pair(6, 5, 4, 4) if name in MAPS else pair(6, 5), (
        {"labels": torch.tensor([0, 1, 2, 3, 4, 0])} if name == "dkd" else {}
    )


def built(name: str, sides: list) -> DistillationLoss:
    loss = discover().create("loss", name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(*sides)
    return loss


def both(change, sides: list) -> list:
    """`change` of every tensor."""
    return [tuple(map(change, s)) if isinstance(s, tuple) else change(s) for s in sides]


@pytest.mark.parametrize("name", BUILT_IN)
class TestEveryLoss:
    def test_is_zero_where_the_student_is_the_teacher(self, name):
        (_, same), more = case(name)
        loss = built(name, [same, same])
        if name == "crd":  # which is least where the right one is told for sure
            loss.teacher.load_state_dict(loss.student.state_dict())
            apart = loss(same, same.flip(0))
            assert loss(same, same) < apart
        else:
            assert loss(same, same, **more).item() == pytest.approx(0, abs=1e-6)

    def test_is_a_scalar_over_zero_where_they_differ(self, name):
        sides, more = case(name)
        value = built(name, sides)(*sides, **more)
        assert value.shape == ()
        assert value > 0

    def test_does_not_depend_on_how_often_a_batch_is_repeated(self, name):
        if name in RELATIONS:
            return
        sides, more = case(name)
        loss = built(name, sides)
        twice = both(lambda x: torch.cat([x, x]), sides)
        repeated = {key: torch.cat([x, x]) for key, x in more.items()}
        value = loss(*sides, **more).item()
        assert loss(*twice, **repeated).item() == pytest.approx(value, rel=1e-5)

    def test_gives_the_student_a_gradient_and_lowers_along_it(self, name):
        sides, more = case(name)
        loss = built(name, sides)
        student = both(lambda x: x.clone().requires_grad_(), sides[:1])[0]
        before = loss(student, sides[1], **more)
        before.backward()
        parts = student if isinstance(student, tuple) else (student,)
        length = sum(x.grad.square().sum() for x in parts).sqrt()
        assert length > 0
        step = 1e-3 / length
        lower = both(lambda x: (x - step * x.grad).detach(), [student])[0]
        assert loss(lower, sides[1], **more) < before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_computes_in_float32_whatever_the_inputs_are(self, name, dtype):
        sides, more = case(name)
        low = both(lambda x: x.to(dtype), sides)
        loss = built(name, sides)
        value = loss(*low, **more)
        assert value.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss(*low, **more).item()
        expected = loss(*both(lambda x: x.float(), low), **more).item()
        assert value.item() == cast == expected

    def test_of_samples_without_features_has_finite_gradients(self, name):
        sides, more = case(name)
        loss = built(name, sides)
        student = both(lambda x: torch.zeros_like(x).requires_grad_(), sides[:1])[0]
        loss(student, sides[1], **more).backward()
        for part in student if isinstance(student, tuple) else (student,):
            assert part.grad.abs().max() < 1e4

    def test_refuses_what_cannot_be_compared(self, name):
        sides, more = case(name)
        wrong = both(lambda x: x[:3, :2], sides[1:])[0]
        loss = discover().create("loss", name)

        def compare() -> None:
            loss.prepare(sides[0], wrong)
            loss(sides[0], wrong, **more)

        with pytest.raises(ValueError, match="differ|classes|samples|positions|shape"):
            compare()

    def test_names_its_parameters_over_the_students_channels(self, name):
        sides, _ = case(name)
        loss = built(name, sides)
        own = dict(loss.named_parameters())
        for parameter, dim in loss.student_channels.items():
            assert own[parameter].shape[dim] == sides[0].shape[1]
        assert set(loss.student_channels) <= set(own)
