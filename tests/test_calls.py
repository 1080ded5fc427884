"""Operation calls get names that say where they are and stay the same from run to run."""

import pytest
import torch
from models import Net, conv, residual
from torch import nn
from torch.nn import functional

from slimkit.calls import CallMode, operation_name, trace

X = torch.zeros(1, 3, 4, 4)


class Names(CallMode):
    """Writes the names down and computes as usual."""

    def __init__(self, model):
        super().__init__(model)
        self.names = []

    def on_call(self, name, op, func, args, kwargs):
        self.names.append(name)
        return func(*args, **kwargs)


def names(model, *inputs):
    with Names(model) as mode:
        model(*inputs)
    return mode.names


def net(flow, **layers):
    return Net(lambda _, x: flow(_, x), **layers)


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.Tensor.__add__, "add"),
        (torch.Tensor.__radd__, "add"),
        (torch.Tensor.add_, "add"),
        (torch.Tensor.__imul__, "mul"),
        (torch.multiply, "mul"),
        (torch.concat, "cat"),
        (torch.Tensor.__rsub__, "sub"),
        (torch.Tensor.__truediv__, "div"),
        (torch.relu_, "relu"),
        (functional.conv2d, "conv2d"),
    ],
)
def test_one_operation_has_one_name_however_it_is_written(func, name):
    assert operation_name(func) == name


def test_name_is_module_path_operation_and_count():
    model = nn.Sequential(nn.Sequential(conv(3, 4), nn.ReLU()), nn.ReLU())
    assert names(model, X) == ["0/0:conv2d:0", "0/1:relu:0", "1:relu:0"]


def test_calls_of_the_top_module_have_an_empty_path():
    assert names(net(lambda _, x: torch.relu(x)), X) == [":relu:0"]


def test_module_called_twice_counts_on():
    model = net(lambda m, x: m.act(m.act(x)), act=nn.ReLU())
    assert names(model, X) == ["act:relu:0", "act:relu:1"]


def test_counts_start_again_with_every_forward():
    model = net(lambda _, x: x + x)
    with Names(model) as mode:
        model(X)
        model(X)
    assert mode.names == [":add:0", ":add:0"]


def test_operations_of_the_evaluation_have_the_same_names_in_training():
    model, x = residual(), torch.zeros(2, 3, 8, 8)
    training = names(model.train(), x)  # batch-norm counts its batches besides
    evaluation = names(model.eval(), x)
    assert [name for name in training if name in evaluation] == evaluation


def test_operations_outside_the_forward_are_not_seen():
    model = nn.ReLU()
    with Names(model) as mode:
        (model(X) + 1).sum()
    assert mode.names == [":relu:0"]


def test_operations_inside_another_models_forward_are_not_given_to_this_one():
    model, other = nn.ReLU(), nn.Sigmoid()
    with Names(model) as mode:
        other(model(X))
    assert mode.names == [":relu:0"]


def test_names_are_right_again_after_a_forward_that_failed():
    model = net(lambda m, x: m.layer(x), layer=nn.Linear(4, 2))
    with Names(model) as mode:
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 7))
        mode.names.clear()
        torch.relu(X)  # outside
        model(torch.zeros(1, 4))
    assert mode.names == ["layer:linear:0"]


def test_the_mode_leaves_no_hook_behind():
    before = len(nn.modules.module._global_forward_hooks)
    names(nn.ReLU(), X)
    assert len(nn.modules.module._global_forward_hooks) == before


def test_trace_connects_calls_by_the_tensors_they_pass_on():
    model = net(lambda m, x: torch.cat([m.a(x), torch.relu(x)], 1), a=conv(3, 2))
    traced = trace(model, (X,))
    (x,) = traced.inputs
    a, relu, cat = traced.calls
    assert (a.inputs, relu.inputs) == ((x,), (x,))
    assert cat.inputs == (*a.outputs, *relu.outputs)
    assert traced.outputs == {*cat.outputs}


def test_trace_keeps_parameters_apart_from_tensors():
    (call,) = trace(nn.Sequential(conv(3, 2)), (X,)).calls
    assert call.state == {1: "0.weight", 2: "0.bias"}


def test_trace_sees_weights_that_a_functional_call_reads_by_keyword():
    model = net(lambda m, x: functional.linear(x, weight=m.a.weight), a=nn.Linear(4, 2))
    (call,) = [c for c in trace(model, (X,)).calls if c.op == "linear"]
    assert call.state == {"weight": "a.weight"}


def test_trace_names_a_tied_weight_by_its_first_name():
    model = net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    assert [c.state[1] for c in trace(model, (X,)).calls] == ["a.weight", "a.weight"]


def test_trace_writes_down_other_arguments_and_the_output_shape():
    (call,) = trace(net(lambda _, x: x.flatten(start_dim=1)), (X,)).calls
    assert (call.arguments, call.shape) == ({"start_dim": 1}, (1, 48))


def test_trace_gives_a_tensor_changed_in_place_a_new_number():
    model = net(lambda _, x: (x * 1).relu_() + 0)
    mul, relu, add = trace(model, (X,)).calls
    assert relu.inputs == mul.outputs
    assert add.inputs == relu.outputs
    assert relu.outputs != mul.outputs


def test_trace_lists_the_readers_of_each_tensor_once():
    traced = trace(net(lambda _, x: torch.relu(x) + (x + x)), (X,))
    assert [c.name for c in traced.readers()[traced.inputs[0]]] == [":relu:0", ":add:0"]


def test_trace_runs_in_evaluation_mode_and_restores_each_training_flag():
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Dropout(0.5).train())
    flags = [m.training for m in model.modules()]
    trace(model, (X,))
    assert [m.training for m in model.modules()] == flags
    assert model[0].num_batches_tracked == 0


def test_trace_restores_training_flags_after_a_failure():
    model = nn.Linear(7, 2).train()
    with pytest.raises(RuntimeError):
        trace(model, (X,))
    assert model.training


def test_trace_takes_nested_inputs():
    model = Net(lambda _, pair: pair["a"] + pair["b"])
    traced = trace(model, ({"a": X, "b": X.clone()},))
    assert traced.calls[-1].inputs == traced.inputs
