"""The wrapper around torch optimizers: equal to the bare one when off, to a float64 reference when on."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import LORA, MODEL
from peft import LoraConfig, get_peft_model
from reference import Reference
from torch import nn, optim
from transformers import Adafactor, AutoModelForCausalLM

from nspo2_trl import NSPO2, NSPO2Config, NSPO2Optimizer, create_nspo2_optimizer, get_default_config

OPTIMIZERS = {
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adafactor": (Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False}),
    "fused": (optim.AdamW, {"lr": 0.01, "fused": True}),
}


def options(**changes):
    defaults = {"strategy": "noise", "projection_rank": 4, "min_rank": 4, "update_freq": 2, "cov_momentum": 0.9}
    return NSPO2Config(**(defaults | {"target_bias": 1.0, "sentinel": False} | changes))


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def wrapped(model, cls=optim.SGD, lr=0.1, **changes):
    return create_nspo2_optimizer(model.parameters(), cls, {"lr": lr}, options(**changes))


def copies(tensors):
    return [p.detach().clone() for p in tensors]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(model, optimizer, steps, seed=1, start=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
        if step >= start:
            optimizer.zero_grad()
            (model(x).square().mean() + model(x).sum() * 0.1).backward()
            optimizer.step()
    return copies(model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("off", ["disabled", "rank 0"])
@pytest.mark.parametrize("space", ["gradient", "update"])
def test_off_equals_the_bare_optimizer_bit_for_bit(name, off, space):
    cls, kwargs = OPTIMIZERS[name]
    bare, model = network(), network()
    config = options(apply_to=space, **({"projection_rank": 0, "min_rank": 0} if off == "rank 0" else {}))
    optimizer = create_nspo2_optimizer(model.parameters(), cls, kwargs, config)
    optimizer.set_enabled(off != "disabled")
    assert same(train(model, optimizer, 12), train(bare, cls(bare.parameters(), **kwargs), 12))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["noise", "keep", "hybrid"])
def test_equals_a_float64_reference_of_projection_and_bare_step(name, strategy):
    cls, kwargs = OPTIMIZERS[name]
    model, slow = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizer = create_nspo2_optimizer(model.parameters(), cls, kwargs, options(strategy=strategy))
    bare = cls(slow.parameters(), **kwargs)
    references = [Reference(p.numel(), strategy, rank=min(4, p.numel() // 2)) for p in slow.parameters()]
    step = bare.step

    def filtered_step():
        for p, reference in zip(slow.parameters(), references):
            p.grad.copy_(reference.step(p.grad.flatten()[None]).view_as(p))
        step()

    bare.step = filtered_step
    got, expected = train(model, optimizer, 12), train(slow, bare, 12)
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-7), (a - b).abs().max()
    plain = network(dtype=torch.float64)
    assert max((a - b).abs().max() for a, b in zip(got, train(plain, cls(plain.parameters(), **kwargs), 12))) > 1e-4


def test_update_space_projects_the_change_of_the_parameters():
    """The noise directions get no part of Adam's step in update space; in gradient space they may."""
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    optimizer = wrapped(model, optim.Adam, apply_to="update", trust_radius=1e9)
    for step in range(12):
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(1, 40) * torch.logspace(1, -1, 40)
        basis = optimizer.nspo2.filters[0].cov.basis[0, :4].clone() if step > 3 else None
        optimizer.step()
        if step > 3:
            change = (model.weight.detach() - before)[0]
            assert (basis @ change).norm() < 1e-5 < change.norm()


# ---- what blocks are ----


def test_blocks_of_parameters_a_model_and_by_hand():
    model = network()
    by_parameter = wrapped(model)
    assert sum(len(stack.names) for stack in by_parameter.nspo2.stacks) == 4
    by_module = create_nspo2_optimizer(model, optim.SGD, {"lr": 0.1})
    assert sorted(name for stack in by_module.nspo2.stacks for name in stack.names) == ["0", "2"]
    whole = create_nspo2_optimizer(model.parameters(), optim.SGD, {"lr": 0.1}, blocks=[list(model.parameters())])
    assert [stack.shape for stack in whole.nspo2.stacks] == [(1, sum(p.numel() for p in model.parameters()))]
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
    in_groups = create_nspo2_optimizer(iter(groups), optim.SGD, {"lr": 0.1})
    assert [group["lr"] for group in in_groups.param_groups] == [0.2, 0.1]
    assert sum(len(stack.names) for stack in in_groups.nspo2.stacks) == 4


def test_lora_adapters_of_a_model_are_blocks():
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(**LORA))
    optimizer = create_nspo2_optimizer(model, optim.AdamW, {"lr": 1e-3})
    names = [name for stack in optimizer.nspo2.stacks for name in stack.names]
    assert len(names) == 9 and all(name.endswith(":default") for name in names)
    assert sum(p.requires_grad for group in optimizer.param_groups for p in group["params"]) == 18


@pytest.mark.parametrize(
    "params, cls, more, message",
    [
        ([], optim.SGD, {}, "`params` holds no trainable parameter"),
        (network(), optim.SGD, {"blocks": [[nn.Parameter(torch.ones(1))]]}, "block 0 is empty or holds a parameter"),
        (network(), optim.SGD, {"config": {"strategy": "quiet"}}, "`strategy` must be one of"),
    ],
)
def test_bad_arguments(params, cls, more, message):
    with pytest.raises(ValueError, match=message):
        create_nspo2_optimizer(params, cls, {"lr": 0.1}, **more)


# ---- a real optimizer to everything that asks ----


def test_schedulers_clipping_and_groups():
    model = network()
    optimizer = wrapped(model, optim.AdamW)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert isinstance(optimizer, optim.Optimizer)
    for _ in range(3):
        model(torch.randn(4, 6)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125) == optimizer.optimizer.param_groups[0]["lr"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_grad_scaler_skips_overflow_and_teaches_nothing():
    model = network()
    optimizer = create_nspo2_optimizer(model.parameters(), optim.AdamW, {"lr": 0.1, "fused": True}, options())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).square().sum() * (math.inf if step == 5 else 1)).backward()
        before = copies(model.parameters())
        scaler.step(optimizer)
        assert same(before, model.parameters()) == (step == 5)
        scaler.update()
    metrics = optimizer.get_metrics()
    assert metrics["step_count"] == 7 and metrics["skipped_steps"] == 0 and scaler.get_scale() == 512


def test_accelerator_prepare():
    expected = train(model := network(), wrapped(model, optim.AdamW), 8)
    model = network()
    model, prepared = Accelerator(cpu=True).prepare(model, wrapped(model, optim.AdamW))
    assert same(train(model, prepared, 8), expected)
    assert prepared.optimizer.get_metrics()["step_count"] == 8


def test_closures_and_missing_gradients():
    model = network()
    optimizer = wrapped(model, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = model[0](torch.ones(2, 6)).square().sum()  # the second layer gets no gradient
        loss.backward()
        return loss

    unused = model[2].weight.detach().clone()
    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < losses[0] and torch.equal(unused, model[2].weight)


def test_sparse_gradients_are_stepped_as_they_are():
    embedding, bare = (nn.Embedding(20, 4, sparse=True) for _ in range(2))
    bare.load_state_dict(embedding.state_dict())
    pairs = (embedding, wrapped(embedding)), (bare, optim.SGD(bare.parameters(), lr=0.1))
    for step in range(6):
        for each, optimizer in pairs:
            optimizer.zero_grad()
            each(torch.tensor([step, step + 1])).sum().backward()
            optimizer.step()
    assert embedding.weight.grad.is_sparse and torch.equal(embedding.weight, bare.weight)


@pytest.mark.parametrize("where", ["in a block", "outside the blocks", "sparse"])
def test_bad_gradients_are_not_stepped_and_counted(where):
    model = nn.Embedding(20, 4, sparse=True) if where == "sparse" else network()
    blocks = [list(model[0].parameters())] if where == "outside the blocks" else None
    optimizer = create_nspo2_optimizer(model.parameters(), optim.AdamW, {"lr": 0.1}, options(), blocks)
    if where == "sparse":
        optimizer = wrapped(model)
        model(torch.tensor([1, 2])).sum().backward()
        model.weight.grad = model.weight.grad * float("inf")
    else:
        train(model, optimizer, 4)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        ill = model[2 if blocks else 0].bias.grad
        ill[0] = float("nan")
    before = copies(model.parameters())
    optimizer.step()
    assert same(before, model.parameters()) and optimizer.get_metrics()["skipped_steps"] == 1
    if where == "in a block":
        assert optimizer.get_metrics()["step_count"] == 4
        ill[0] = 1e30  # finite, but its square is not: a plain step
        optimizer.step()
        assert not same(before, model.parameters()) and optimizer.get_metrics()["skipped_steps"] == 2


def test_update_space_leaves_parameters_without_a_gradient_alone():
    model = network()
    optimizer = wrapped(model, apply_to="update", trust_radius=1e9)
    bias = model[0].bias.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        model[0].bias.grad = None
        optimizer.step()
    assert optimizer.get_metrics()["is_active"] and torch.equal(bias, model[0].bias)


# ---- state ----


def test_parameters_added_later_have_an_estimate_and_resume_in_a_wrapper_that_has_them_from_the_start():
    first, second = network(), network(seed=5)
    optimizer = wrapped(first, lr=0.01)
    train(first, optimizer, 5)
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.5})
    before = copies(second.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, train(second, optimizer, 5)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    assert [part.step_count for part in optimizer.nspo2.filters] == [10] * 4 + [5] * 4
    assert math.isfinite(optimizer.get_metrics()["recent_variance_reduction"])

    saved, models = copy.deepcopy(optimizer.state_dict()), copy.deepcopy((first, second))
    expected = train(second, optimizer, 4)
    groups = [{"params": models[0].parameters(), "lr": 0.01}, {"params": models[1].parameters(), "lr": 0.5}]
    resumed = create_nspo2_optimizer(groups, optim.SGD, {"lr": 0.01}, options())
    resumed.load_state_dict(saved)
    assert same(train(models[1], resumed, 4), expected)


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("stop", [3, 8])
def test_state_resumes_bit_for_bit_through_torch_save(tmp_path, stop, space):
    whole, first, second = network(), network(), network(seed=9)
    expected = train(whole, wrapped(whole, optim.AdamW, apply_to=space), 12)
    optimizer = wrapped(first, optim.AdamW, apply_to=space)
    train(first, optimizer, stop)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(checkpoint["model"])
    optimizer = wrapped(second, optim.AdamW, apply_to=space)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert same(train(second, optimizer, 12, start=stop), expected)


def test_state_of_others(caplog):
    model = network()
    optimizer = create_nspo2_optimizer(model.parameters(), optim.AdamW, {}, options())
    train(model, optimizer, 5)
    bare = optim.AdamW(model.parameters())
    train(model, bare, 2)
    optimizer.load_state_dict(bare.state_dict())
    assert "the noise estimate starts anew" in caplog.text
    assert optimizer.get_metrics()["step_count"] == 0 and not optimizer.get_metrics()["is_active"]
    other = create_nspo2_optimizer(model.parameters(), optim.AdamW, {}, blocks=[list(model.parameters())])
    train(model, other, 5)
    with pytest.raises(ValueError, match="delete the key 'nspo2'"):
        optimizer.load_state_dict(other.state_dict())


# ---- as published ----


def test_published_snippets_run(tmp_path, monkeypatch):
    """Quick start, direct use, monitoring and checkpointing, word for word but for the package's name."""
    monkeypatch.chdir(tmp_path)
    model = network()
    dataloader = [torch.randn(4, 6) for _ in range(25)]
    compute_loss = lambda batch: model(batch).square().mean()

    config = get_default_config(dim=sum(p.numel() for p in model.parameters()))
    config['strategy'] = 'noise'  # or 'keep', 'hybrid'  # fmt: skip
    config['projection_rank'] = 16  # fmt: skip
    optimizer = create_nspo2_optimizer(model.parameters(), optim.Adam, {'lr': 1e-3}, config)  # fmt: skip
    assert math.isnan(optimizer.get_metrics()["recent_variance_reduction"])  # nothing was measured yet
    for batch in dataloader:
        optimizer.zero_grad()
        loss = compute_loss(batch)
        loss.backward()
        optimizer.step()

    metrics = optimizer.get_metrics()
    assert 0 <= metrics["recent_variance_reduction"] <= 1 and isinstance(metrics["current_rank"], (int, float))
    names = {"current_strategy", "bias", "trust_alpha", "noise_scale", "step_count", "is_active"}
    assert names < set(metrics) and metrics["current_strategy"] == "noise" and metrics["step_count"] == 25

    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, 'checkpoint.pt')  # fmt: skip
    checkpoint = torch.load('checkpoint.pt')  # fmt: skip
    model.load_state_dict(checkpoint['model'])  # fmt: skip
    optimizer.load_state_dict(checkpoint['optimizer'])  # fmt: skip

    config = get_default_config(dim=100)
    nspo2 = NSPO2(config)
    for _ in range(25):
        grad = torch.randn(100)
        projected_grad = nspo2.hook(grad)
        assert projected_grad.shape == grad.shape
        nspo2.step_end()


def distance(seed, enabled):
    """To the optimum of a quadratic over 200 dimensions with 4 noisy ones, after 200 steps."""
    torch.manual_seed(seed)
    planted = torch.linalg.qr(torch.randn(200, 4)).Q
    target = torch.randn(200)
    target -= planted @ (planted.T @ target)
    weight = nn.Parameter(torch.zeros(200))
    config = options(trust_radius=1e9, cov_momentum=0.97, update_freq=10, min_rank=0)
    optimizer = create_nspo2_optimizer([weight], optim.SGD, {"lr": 0.02}, config)
    optimizer.set_enabled(enabled)
    for _ in range(200):
        weight.grad = weight.detach() - target + planted @ torch.randn(4) * 5 + 0.1 * torch.randn(200)
        optimizer.step()
    return (weight.detach() - target).norm().item()


def test_noise_ends_closer_to_the_optimum():
    """On average, not on every seed: noise from before the first basis stays in the null space."""
    assert sum(distance(seed, True) for seed in range(8)) < 0.8 * sum(distance(seed, False) for seed in range(8))


def test_no_d_by_d_matrix():
    """The state stays within (max_rank + rows kept + 4) x d floats."""
    weight = nn.Parameter(torch.zeros(100_000))
    optimizer = create_nspo2_optimizer([weight], optim.AdamW, {"lr": 1e-3}, options(max_rank=17, update_freq=10))
    for _ in range(23):
        weight.grad = torch.randn(100_000)
        optimizer.step()
    assert optimizer.nspo2.state_bytes <= (17 + 11 + 4) * 400_000 + 100_000
    assert isinstance(optimizer, NSPO2Optimizer)
