"""Every promise of a quantizer is broken by a plugin that breaks only this one."""

from dataclasses import replace

import pytest
import torch
from breaking import broken_by, subject_of

from slimkit.builtin.quantizers.minmax import MinMax
from slimkit.testing.quantizer import QUANTIZER


class Right(MinMax):
    """Everything that was observed."""


class Column(MinMax):
    """Gives parameters in the wrong shape."""

    def qparams(self):
        scale, zero_point = super().qparams()
        return scale, zero_point.to(torch.int64)


class Floored(MinMax):
    """Rounds down in `forward`."""

    def forward(self, x):
        scale, zero_point = (self.grid.spread(part, x) for part in self.qparams())
        steps = (x / scale).round()
        steps = torch.where(steps > 0, steps - 1, steps)  # zero stays zero
        steps = steps.clamp(self.grid.qmin - zero_point, self.grid.qmax - zero_point)
        rounded = steps * scale
        inside = (x / scale + zero_point).clamp(self.grid.qmin, self.grid.qmax) - zero_point
        through = inside * scale
        return (through + (rounded - through).detach()).to(x.dtype)


class Cutting(MinMax):
    """Has no gradient but rounding's own, which is zero."""

    def forward(self, x):
        scale, zero_point = self.qparams()
        return self.grid.dequantize(self.grid.quantize(x, scale, zero_point), scale, zero_point).to(
            x.dtype
        )


class Unlearned(MinMax):
    """Has a parameter that no gradient reaches."""

    def __init__(self, grid):
        super().__init__(grid)
        self.share = torch.nn.Parameter(torch.ones(()))


class LastBatch(MinMax):
    """Keeps the last batch only, and does not say so."""

    def observe(self, x):
        if x.numel():
            lo, hi = self.grid.ends(x.detach())
            self.lo.copy_(lo.clamp(max=0))
            self.hi.copy_(hi.clamp(min=0))


class Forgetful(MinMax):
    """Keeps what it saw outside of the state dict."""

    def __init__(self, grid):
        super().__init__(grid)
        self.register_buffer("lo", self.lo, persistent=False)


class Shifted(MinMax):
    """A range without zero, in the middle of two integers."""

    def forward(self, x):
        return super().forward(x) + ((x == 0) * 1e-3).to(x.dtype)


class Guarded(MinMax):
    """Never gives a scale below 0.01, however small the values are."""

    def qparams(self):
        scale, zero_point = super().qparams()
        return scale.clamp(min=0.01), zero_point


class Doubled(MinMax):
    """Leaves room for values twice as large as those seen."""

    def qparams(self):
        return self.grid.qparams(1.5 * self.lo, 1.5 * self.hi)


class Multiplied(MinMax):
    """Makes its scale by itself, whatever scales the device has."""

    def qparams(self):
        scale, zero_point = replace(self.grid, power_of_two=False).qparams(self.lo, self.hi)
        return scale, zero_point


class Shared(MinMax):
    """Gives all channels one range."""

    def qparams(self):
        lo, hi = self.lo.amin().expand_as(self.lo), self.hi.amax().expand_as(self.hi)
        return self.grid.qparams(lo, hi)


class Upset(MinMax):
    """Fails on a tensor without values."""

    @torch.no_grad()
    def observe(self, x):
        rows = self.grid.rows(x.float())
        self.lo.copy_(torch.minimum(self.lo, rows.amin(1)))
        self.hi.copy_(torch.maximum(self.hi, rows.amax(1)))


class Upcasting(MinMax):
    """Gives float32 whatever comes."""

    def forward(self, x):
        return super().forward(x.float())


class Retaining(MinMax):
    """Keeps the graph of what it saw."""

    def __init__(self, grid):
        super().__init__(grid)
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def observe(self, x):
        super().observe(x)
        self.last = x.sum()


MUTANTS = {
    Column: "parameters_are_valid",
    Floored: "rounds_as_integer_arithmetic",
    Cutting: "gradient_flows",
    Unlearned: "gradient_flows",
    LastBatch: "calibration_in_one_batch_or_many",
    Forgetful: "state_dict_round_trip",
    Shifted: "zero_stays_zero",
    Guarded: "constant_input",
    Doubled: "outlier_input",
    Multiplied: "scales_are_powers_of_two",
    Shared: "each_channel_has_its_own_range",
    Upset: "an_empty_tensor_changes_nothing",
    Upcasting: "half_precision",
    Retaining: "keeps_no_graph",
}


def test_a_right_quantizer_keeps_every_promise():
    assert broken_by(QUANTIZER, subject_of("quantizer", Right)) == set()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_quantizer_breaks_the_promise_that_it_should_and_no_other(mutant):
    broken = broken_by(QUANTIZER, subject_of("quantizer", mutant))
    assert broken == {MUTANTS[mutant]}


def test_every_promise_of_a_quantizers_own_has_a_mutant():
    own = {promise.name for promise in QUANTIZER} - {"an_empty_calibration_is_refused"}
    assert own == set(MUTANTS.values())
