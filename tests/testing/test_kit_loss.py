"""Every promise of a distillation loss is broken by a plugin that breaks only this one."""

import pytest
import torch
from breaking import broken_by, subject_of

from slimkit.interfaces import DistillationLoss
from slimkit.testing.loss import LOSS


class Right(DistillationLoss):
    """Mean absolute difference."""

    def forward(self, student, teacher):
        return (student.float() - teacher.float()).abs().mean()


class MapsOnly(DistillationLoss):
    """Takes feature maps, and says so of anything else."""

    def forward(self, student, teacher):
        if student.dim() != 4:
            raise ValueError(f"takes (batch, channels, height, width), not {tuple(student.shape)}")
        return (student.float() - teacher.float()).abs().mean()


class MinimalAtEqual(DistillationLoss):
    """Cross-entropy with the teacher's probabilities: least, but not zero, for equal logits."""

    when_equal = "least"

    def forward(self, student, teacher):
        wanted = teacher.float().softmax(1)
        return -(wanted * student.float().log_softmax(1)).sum(1).mean()


class Demanding(DistillationLoss):
    """Compares two places, by the labels, through a projection that it makes when it sees them."""

    needs = frozenset({"labels"})
    places = 2

    def __init__(self):
        super().__init__()
        self.projection = None

    def prepare(self, student, teacher):
        width = student[0].shape[1]
        self.projection = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.eye_(self.projection.weight)

    def forward(self, student, teacher, *, labels):
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            moved = self.projection(s.float().movedim(1, -1)) - t.float().movedim(1, -1)
            each = moved.abs().flatten(1).mean(1)
            total = total + (each * (1 + labels)).mean()
        return total


class Relational(DistillationLoss):
    """Compares distances between samples."""

    compares_samples = True

    def forward(self, student, teacher):
        s, t = (torch.pdist(x.float().flatten(1) + 0.1) for x in (student, teacher))
        return (s / 100 - t / 100).abs().mean()


class OneOfTwo(Demanding):
    """Looks at its second place only."""

    def forward(self, student, teacher, *, labels):
        return super().forward(student[1:], teacher[1:], labels=labels)


class RelationalUnsaid(Relational):
    """Does not say that it compares samples."""

    compares_samples = False


class Unspoken(DistillationLoss):
    """Fails on what it does not take without saying why."""

    def forward(self, student, teacher):
        if student.dim() > 2:
            raise IndexError
        return (student.float() - teacher.float()).abs().mean()


class Elementwise(DistillationLoss):
    """One value a sample."""

    def forward(self, student, teacher):
        return (student.float() - teacher.float()).abs().flatten(1).mean(1)


class Overflowing(DistillationLoss):
    """Divergence by way of exponentials of logits, which overflow where logits are large."""

    def forward(self, student, teacher):
        p, q = teacher.float().exp(), student.float().exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return (p * (p / q).log()).sum(1).mean()


class Offset(DistillationLoss):
    """Is half of what it should be, plus one."""

    def forward(self, student, teacher):
        return 1 + (student.float() - teacher.float()).abs().mean() / 2


class SmallestElsewhere(DistillationLoss):
    """Says that it is least for equal tensors, and is least where the student is smaller."""

    when_equal = "least"

    def forward(self, student, teacher):
        return (student.float() - 0.5 * teacher.float()).abs().mean()


class Detaching(DistillationLoss):
    """Loses the gradient."""

    def forward(self, student, teacher):
        return (student.detach().float() - teacher.float()).abs().mean().requires_grad_()


class Greedy(DistillationLoss):
    """Gives the largest difference alone a gradient."""

    def forward(self, student, teacher):
        return (student.float() - teacher.float()).abs().max()


class Writing(DistillationLoss):
    """Normalizes the teacher in place."""

    def forward(self, student, teacher):
        teacher.div_(1.001)
        return (student.float() - teacher.float() * 1.001).abs().mean()


class Summing(DistillationLoss):
    """Sums over the batch."""

    def forward(self, student, teacher):
        return (student.float() - teacher.float()).abs().flatten(1).mean(1).sum()


class Narrow(DistillationLoss):
    """Squares in the tensors' own precision."""

    def forward(self, student, teacher):
        return (student - teacher).square().mean()


class Normalizing(DistillationLoss):
    """Divides the student by its largest value in each channel, which a masked channel lacks."""

    def forward(self, student, teacher):
        apart = (student.float() - teacher.float()).abs()
        largest = student.float().abs().transpose(0, 1).flatten(1).amax(1).detach()
        share = largest / largest
        return (apart * share.reshape(1, -1, *[1] * (student.dim() - 2))).mean()


MUTANTS = {
    Unspoken: "takes_what_it_does_not_refuse",
    Elementwise: "is_a_finite_scalar",
    Overflowing: "is_a_finite_scalar",
    Offset: "is_as_declared_for_equal_inputs",
    SmallestElsewhere: "is_as_declared_for_equal_inputs",
    Detaching: "gradient_reaches_the_student_only",
    Greedy: "gradient_reaches_the_student_only",
    Writing: "gradient_reaches_the_student_only",
    Summing: "is_the_mean_over_the_batch",
    RelationalUnsaid: "is_the_mean_over_the_batch",
    OneOfTwo: "gradient_reaches_the_student_only",
    Narrow: "half_precision",
    Normalizing: "masked_channels",
}
MORE = {
    # what is no scalar can be compared with nothing
    Elementwise: {promise.name for promise in LOSS} - {"takes_what_it_does_not_refuse"},
    Overflowing: {"half_precision"},  # for large values
}


@pytest.mark.parametrize("right", [Right, MapsOnly, MinimalAtEqual, Demanding, Relational])
def test_a_right_loss_keeps_every_promise(right):
    assert broken_by(LOSS, subject_of("loss", right)) == set()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_loss_breaks_the_promise_that_it_should_and_no_other(mutant):
    broken = broken_by(LOSS, subject_of("loss", mutant))
    assert broken == {MUTANTS[mutant]} | MORE.get(mutant, set())


def test_every_promise_has_a_mutant():
    assert {promise.name for promise in LOSS} == set(MUTANTS.values())


def test_a_loss_that_takes_nothing_is_no_loss():
    class Refusing(DistillationLoss):
        """Takes nothing."""

        def forward(self, student, teacher):
            raise ValueError("not these")

    (promise,) = (p for p in LOSS if p.name == "takes_what_it_does_not_refuse")
    told = str(promise.broken(subject_of("loss", Refusing)))
    assert "it takes none of" in told
    assert "logits of shape (2, 3): not these" in told


def test_a_learned_projection_is_fit_by_its_gradient():
    class Learned(DistillationLoss):
        """Scales the student by a number that is learned."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, student, teacher):
            return (self.scale * student.float() - teacher.float()).abs().mean()

    assert broken_by(LOSS, subject_of("loss", Learned)) == set()
