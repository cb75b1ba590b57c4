"""What users do with an optimizer besides `step`: the wrapper does it too, or says that it does not."""

import copy
import io
import math
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_optimizer import copies, network, options, same, train, wrapped
from torch import nn, optim
from torch.distributed import checkpoint, init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from nspo2_trl import NSPO2, create_nspo2_optimizer


def filtered(optimizer):
    """Parameters that are filtered, by what has an active basis."""
    return {id(place.param) for stack in optimizer.nspo2.stacks for place in stack.places}


def through_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


SERIALIZERS = {"pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "torch": through_torch, "copy": copy.deepcopy}


@pytest.mark.parametrize("how", SERIALIZERS)
@pytest.mark.parametrize("space", ["gradient", "update"])
def test_trains_on_alike_after_a_serializer(how, space):
    model = network()
    optimizer = wrapped(model, optim.AdamW, apply_to=space)
    train(model, optimizer, 5)
    other, other_optimizer = SERIALIZERS[how]((model, optimizer))
    off = copy.deepcopy((model, optimizer))
    off[1].set_enabled(False)
    expected = train(model, optimizer, 6)
    assert same(expected, train(other, other_optimizer, 6)) and not same(expected, train(*off, 6))


@pytest.mark.parametrize("how", SERIALIZERS)
def test_by_hand_goes_on_alike_after_a_serializer(how):
    torch.manual_seed(0)
    first = NSPO2(options(), recent=True)
    rows = torch.randn(12, 30) * torch.logspace(1, -1, 30)
    for row in rows[:6]:
        first.hook(row)
        first.step_end()
    second = SERIALIZERS[how](first)
    for row in rows[6:]:
        assert torch.equal(first.hook(row), second.hook(row)) and not torch.equal(first.hook(row), row)
        second.hook(row)
        first.step_end(), second.step_end()


def frozen():
    model = network()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("how", ["model", "parameters", "blocks"])
def test_a_layer_that_is_unfrozen_later_is_trained_and_filtered(how):
    model = frozen()
    params = model if how == "model" else model.parameters()
    blocks = [list(model[2].parameters())] if how == "blocks" else None
    optimizer = create_nspo2_optimizer(params, optim.AdamW, {"lr": 0.01}, options(), blocks)
    before = copies(model.parameters())
    train(model, optimizer, 5)
    assert same(before[:2], copies(model[0].parameters())) and len(filtered(optimizer)) == 2
    model[0].requires_grad_(True)
    train(model, optimizer, 5)
    assert filtered(optimizer) == {id(p) for p in model.parameters()}
    assert [part.step_count for part in optimizer.nspo2.filters][-2:] == [5, 5]

    # resumed while the layer is frozen, as the script begins
    saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    other = frozen()
    other.load_state_dict(weights)
    params = other if how == "model" else other.parameters()
    blocks = [list(other[2].parameters())] if how == "blocks" else None
    resumed = create_nspo2_optimizer(params, optim.AdamW, {"lr": 0.01}, options(), blocks)
    resumed.load_state_dict(saved)
    other[0].requires_grad_(True)
    assert same(train(model, optimizer, 4), train(other, resumed, 4))


def test_an_adapter_that_is_switched_to_later_is_trained_and_filtered():
    lora = LoraConfig(r=2, target_modules=["0", "2"])
    model = get_peft_model(network(), lora)
    model.add_adapter("other", lora)
    model.set_adapter("default")
    optimizer = create_nspo2_optimizer(model, optim.SGD, {"lr": 0.05}, options())
    for name in ("default", "other"):
        model.set_adapter(name)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, 5)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if f".{name}." in n} and len(moved) == 4
        assert filtered(optimizer) >= {id(p) for n, p in model.named_parameters() if n in moved}


def added_inside(model, new, optimizer):
    optimizer.optimizer.add_param_group({"params": list(new.parameters())})


def edited_group(model, new, optimizer):
    optimizer.param_groups[0]["params"] += list(new.parameters())


def appended_group(model, new, optimizer):
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": list(new.parameters())})


def swapped(model, new, optimizer):
    optimizer.param_groups[0]["params"][:2] = list(new[0].parameters())


def removed(model, new, optimizer):
    del optimizer.param_groups[0]["params"][:2]


def replaced(model, new, optimizer):
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": list(new.parameters())}]


@pytest.mark.parametrize("covariance", ["adapter", "factored"])
@pytest.mark.parametrize("change", [added_inside, edited_group, appended_group, swapped, removed, replaced])
def test_what_the_optimizer_holds_is_filtered(change, covariance):
    """Also when it is changed behind the wrapper: what comes is filtered, what goes is left alone."""
    model, new = network(), network(seed=5)
    optimizer = create_nspo2_optimizer(model, optim.SGD, {"lr": 0.01}, options(covariance=covariance))
    train(model, optimizer, 5)
    change(model, new, optimizer)
    both = nn.ModuleList([model, new])
    gone = [p for p in model.parameters() if id(p) not in {id(q) for q in optimizer._params()}]
    for p in both.parameters():
        p.grad = torch.ones_like(p)
    before = copies(optimizer._params())
    for _ in range(4):
        for p in both.parameters():
            p.grad = torch.randn_like(p)
        kept = copies(p.grad for p in gone)
        optimizer.step()
    assert filtered(optimizer) == {id(p) for p in optimizer._params()}
    assert all(part.is_active for part in optimizer.nspo2.filters)
    assert not any(torch.equal(a, b) for a, b in zip(before, optimizer._params(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(gone, kept))
    assert optimizer.get_metrics()["step_count"] == (9 if change is not replaced else 4)

    # the state is brought back by one that holds the same
    same_again = copy.deepcopy(optimizer)
    same_again.load_state_dict(optimizer.state_dict())


# ---- state, by torch's own helpers ----


def by_helper(model, optimizer, path):
    return get_state_dict(model, optimizer)


def gathered(model, optimizer, path):
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def through_a_file(model, optimizer, path):
    """Loading needs a template, of a model and an optimizer that have not trained."""
    template = network(seed=9)
    states = get_state_dict(template, wrapped(template, type(optimizer.optimizer), lr=0.01))
    checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=path)
    found = dict(zip(("model", "optimizer"), states))
    checkpoint.load(found, checkpoint_id=path)
    return found["model"], found["optimizer"]


@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("how", [by_helper, gathered, through_a_file])
def test_torchs_checkpoint_helpers_keep_all_of_the_state(how, cls, tmp_path):
    model, other = network(), network(seed=9)
    optimizer, resumed = wrapped(model, cls, lr=0.01), wrapped(other, cls, lr=0.01)
    get_optimizer_state_dict(model, optimizer)  # makes the optimizer's state by a step of zeros, which is no sample
    assert optimizer.get_metrics()["step_count"] == 0
    train(model, optimizer, 5)
    states = copy.deepcopy(how(model, optimizer, tmp_path))
    set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1])
    assert "nspo2" not in resumed.param_groups[0]
    assert same(train(model, optimizer, 5), train(other, resumed, 5)) and optimizer.get_metrics()["is_active"]


def test_a_flat_state_is_refused():
    model = network()
    with pytest.raises(ValueError, match="`flatten_optimizer_state_dict` has no place for NSPO2's part"):
        get_optimizer_state_dict(model, wrapped(model), options=StateDictOptions(flatten_optimizer_state_dict=True))


def test_hooks_of_the_wrapper_are_called_with_all_of_the_state():
    model, seen = network(), []
    optimizer = wrapped(model)
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: state | {"mark": opt is optimizer and "nspo2" in state})
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append(state["mark"]))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state.pop("mark")))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.get_metrics()["step_count"]))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 1)
    optimizer.load_state_dict(saved := optimizer.state_dict())
    assert seen == ["before", "after", "before", "save", True, True, 2] and "mark" in saved


def test_no_share_of_a_noise_that_has_vanished():
    param = nn.Parameter(torch.zeros(12))
    optimizer = create_nspo2_optimizer([param], torch.optim.SGD, {"lr": 0.0}, {"update_freq": 4, "sentinel": False})
    generator, direction = torch.Generator().manual_seed(0), torch.ones(12)
    for step in range(300):
        noise = torch.randn(12, generator=generator) * 0.1 + torch.randn(1, generator=generator) * direction
        param.grad = noise * (1.0 if step < 60 else 1e-4)
        param.grad += 1e-12  # never a probing step
        optimizer.step()
        if step == 59:
            assert not math.isnan(optimizer.get_metrics()["recent_variance_reduction"])
    assert math.isnan(optimizer.get_metrics()["recent_variance_reduction"])


# ---- what parameters are ----


class Mixed(nn.Module):
    """One module, so one block, with parameters of several dtypes."""

    def __init__(self, *dtypes):
        super().__init__()
        torch.manual_seed(0)
        for i, dtype in enumerate(dtypes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(3, 5, dtype=dtype)))


def descend(model, optimizer, steps=8):
    """Down a quadratic with noise, which has complex gradients where the parameters are complex."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            (p - noise).abs().square().sum().backward()
        optimizer.step()
    return copies(model.parameters())


DTYPES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32, torch.float64),
    (torch.complex64,),
    (torch.float32, torch.complex128),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("space", ["gradient", "update"])
def test_parameters_of_any_dtypes_in_one_block_are_as_exact_as_they_are(dtypes, space):
    model, double, plain = Mixed(*dtypes), Mixed(*dtypes), Mixed(*dtypes)
    optimizer = create_nspo2_optimizer(model, optim.SGD, {"lr": 0.1}, options(apply_to=space))
    got = descend(model, optimizer)
    assert not same(got, descend(plain, optim.SGD(plain.parameters(), lr=0.1)))
    for p in model.parameters():
        if p.dtype.to_real() == torch.float64:  # neither is rounded to float32
            fine = torch.view_as_real((p.grad if space == "gradient" else p.detach()).to(torch.complex128))
            assert not torch.equal(fine, fine.float().double())
    # without momentum it is the same in both spaces, to what the least exact of them is rounded to
    other = descend(double, create_nspo2_optimizer(double, optim.SGD, {"lr": 0.1}, options()))
    coarse = max(torch.finfo(dtype).eps for dtype in dtypes)
    assert all(torch.allclose(a, b, rtol=0, atol=40 * coarse) for a, b in zip(got, other))


def test_a_model_that_gets_another_dtype_is_filtered_in_it():
    model, exact = network(), network().double()
    first, second = wrapped(model, apply_to="update"), wrapped(exact, apply_to="update")
    train(model, first, 4)
    train(exact, second, 4)
    model.double()
    model.load_state_dict(exact.state_dict())
    for a, b in zip(train(model, first, 3), train(exact, second, 3)):
        assert first.get_metrics()["is_active"] and torch.allclose(a, b, rtol=0, atol=1e-6)
    assert all(
        stack.grad.dtype == part.reference.dtype == torch.float64
        for stack, part in zip(first.nspo2.stacks, first.nspo2.filters)
    )


@pytest.mark.parametrize("made", [lambda: torch.eye(3).to_sparse(), lambda: torch.zeros(3).to(torch.float8_e4m3fn)])
def test_parameters_that_cannot_be_filtered_are_refused(made):
    with pytest.raises(ValueError, match="NSPO2 cannot filter a parameter that is .* without it"):
        wrapped(nn.ParameterList([nn.Parameter(made())]))


def test_sharded_parameters_are_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        optimizer = wrapped(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for refused in (lambda: wrapped(model), lambda: replaced(None, model, optimizer) or optimizer.step()):
            with pytest.raises(ValueError, match="NSPO2 filters parameters that FSDP2 shards in its trainers alone"):
                refused()
    finally:
        torch.distributed.destroy_process_group()


# ---- optimizers with more than a step ----


class Averaged(optim.SGD):
    """Evaluates at the average of its steps, as schedule-free optimizers do, between `eval()` and `train()`."""

    def __init__(self, params, lr, **options):
        super().__init__(params, lr, **options)
        self.patience, self.scaled = 3, 0

    def step(self, closure=None, scale=1.0):
        self.scaled += scale
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("mean", p.detach().clone()).lerp_(p.detach(), 0.5)

    def eval(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["last"] = p.detach().clone()
            p.data.copy_(self.state[p]["mean"])

    def train(self):
        for p in self.param_groups[0]["params"]:
            p.data.copy_(self.state[p]["last"])

    def get_lr(self):
        return self.param_groups[0]["lr"]


def test_what_the_inner_optimizer_has_is_passed_on():
    model = network()
    optimizer = wrapped(model, Averaged, lr=0.05)
    trained = train(model, optimizer, 6)
    optimizer.eval()
    assert optimizer.get_metrics()["is_active"] and not same(trained, copies(model.parameters()))
    optimizer.train()
    assert same(trained, copies(model.parameters()))
    assert optimizer.get_lr() == 0.05 and optimizer.patience == 3 and not hasattr(optimizer, "unknown")
    optimizer.patience, optimizer.mark = 5, 1
    assert optimizer.optimizer.patience == 5 and not hasattr(optimizer.optimizer, "mark") and optimizer.mark == 1
    optimizer.step(scale=10.0)
    assert optimizer.scaled == 16
    # what tells a gradient scaler to leave unscaling to the optimizer is not passed on
    fused = create_nspo2_optimizer(model.parameters(), optim.AdamW, {"fused": True}, options())
    assert fused.optimizer._step_supports_amp_scaling and not fused._step_supports_amp_scaling


class SharpnessAware(optim.SGD):
    """Steps by the gradient at a point that is a little up the hill."""

    def step(self, closure=None):
        assert closure is not None, "requires closure"
        self.uphill(0.05)
        with torch.enable_grad():
            closure()
        self.uphill(-0.05)
        super().step()

    def uphill(self, rho):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad, alpha=rho)


class TwoSteps(SharpnessAware):
    first_step = second_step = None


class Needs(SharpnessAware):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("cls", [TwoSteps, Needs, optim.LBFGS])
def test_optimizers_that_need_gradients_elsewhere_are_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} evaluates its closure several times"):
        wrapped(network(), cls)


def closure_of(model, optimizer, calls):
    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    return closure


def test_those_that_do_not_look_like_it_are_refused_at_the_first_step():
    model, calls = network(), []
    optimizer = wrapped(model, SharpnessAware)
    with pytest.raises(ValueError, match="SharpnessAware evaluates its closure several times"):
        optimizer.step(closure_of(model, optimizer, calls))
    assert len(calls) == 1
    optimizer.set_enabled(False)  # then it has the closure to itself
    optimizer.step(closure_of(model, optimizer, calls))
    assert len(calls) == 2


class ByLoss(optim.SGD):
    """Takes its rate from the loss, as Polyak's step does."""

    def step(self, closure=None):
        self.loss = float(closure())
        self.param_groups[0]["lr"] = 0.1 * self.loss
        super().step()


def test_an_optimizer_that_asks_for_the_loss_gets_it():
    model, calls = network(), []
    optimizer = wrapped(model, ByLoss)
    losses = [float(optimizer.step(closure_of(model, optimizer, calls)).detach()) for _ in range(6)]
    assert optimizer.loss == losses[-1] < losses[0] and len(calls) == 6 and optimizer.get_metrics()["is_active"]
