"""Transforms of torch.func, forward mode, export and fake tensors, with sorted ids and mixed."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from metalora._library import native_available
from metalora.adapters import LoRAConfig, adapt
from metalora.nn import TaskBatch, tasks

IDS = {"sorted": torch.tensor([0, 0, 1, 2]), "mixed": torch.tensor([2, 0, 1, 0])}
needs_native = pytest.mark.skipif(
    not native_available(), reason="the reference asks task_ptr for its values"
)


@pytest.fixture(params=IDS)
def ids(request):
    return IDS[request.param]


def network(route="auto"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    adapt(model, LoRAConfig(rank=2, heads=["2"], route=route), 3).double()
    nn.init.normal_(model[0].lora_B)
    return model


def problem(ids, route="auto"):
    """A model, an input [4, 2, 5], and a function of both whose value is a scalar."""
    model = network(route)

    def value(parameters, x):
        with tasks(ids):
            return functional_call(model, parameters, (x,)).square().sum()

    return dict(model.named_parameters()), torch.randn(4, 2, 5, dtype=torch.float64), value


@pytest.mark.parametrize("route", ["auto", "reference"])
def test_grad_is_that_of_backward(ids, route):
    parameters, x, value = problem(ids, route)
    found = grad(value)(parameters, x)
    value(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["jvp", "dual numbers"])
def test_forward_mode_is_the_gradient_along_a_direction(ids, mode):
    parameters, x, value = problem(ids)
    direction = torch.randn_like(x)
    if mode == "jvp":
        _, found = jvp(lambda x: value(parameters, x), (x,), (direction,))
    else:
        with forward_ad.dual_level():
            y = value(parameters, forward_ad.make_dual(x, direction))
            found = forward_ad.unpack_dual(y).tangent
    want = (grad(value, argnums=1)(parameters, x) * direction).sum()
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_vmap_and_nested_transforms(ids):
    parameters, x, value = problem(ids)
    several = torch.randn(3, *x.shape, dtype=x.dtype)
    found = vmap(lambda x: value(parameters, x))(several)
    want = torch.stack([value(parameters, x) for x in several])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    hessian = jacrev(grad(lambda x: value(parameters, x)))(x).reshape(x.numel(), -1)
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-12)


def test_a_batch_that_a_transform_saw_keeps_plain_tensors(ids):
    model, x, batch = network(), torch.randn(4, 2, 5, dtype=torch.float64), TaskBatch(ids)
    with tasks(batch):
        seen = grad(lambda x: model(x).sum())(x)
        assert not any(
            torch._C._functorch.is_functorch_wrapped_tensor(ptr) for ptr in batch._pointers.values()
        )
        x.requires_grad_()
        model(x).sum().backward()
    torch.testing.assert_close(seen, x.grad, rtol=0, atol=1e-12)


@needs_native
@pytest.mark.parametrize("route", ["weight", "token"])
def test_native_routes_are_refused_under_transforms(ids, route):
    parameters, x, value = problem(ids, route)
    message = f"route='{route}' cannot be had: transforms of torch.func .*use route='auto'"
    with pytest.raises(RuntimeError, match=message):
        grad(value)(parameters, x)
    assert value(parameters, x).isfinite()


@needs_native
def test_an_exported_model_keeps_its_tasks_for_inference(ids):
    model, x = network(), torch.randn(4, 2, 5, dtype=torch.float64)
    with tasks(ids):
        program, want = torch.export.export(model, (x,)), model(x)
    with torch.no_grad():
        found = program.module()(x)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@needs_native
def test_fake_tensors(ids):
    model, batch = network(), TaskBatch(ids)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with tasks(batch):
            y = model(torch.empty(4, 2, 5, dtype=torch.float64))
        assert isinstance(y, FakeTensor)
        assert y.shape == (4, 2, 2)
        with pytest.raises(RuntimeError, match="make the TaskBatch before entering"):
            tasks(ids).__enter__()
