"""The changes of the filter that were tried (scripts/bench/ideas.py) do what docs/log.md says of them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_lean import make

sys.path.insert(0, str(ROOT / "scripts"))
from bench import ideas, kept, lean
from bench.packed import Packed, PackedLlama

from nspo2_trl import NSPO2, NSPO2Config
from nspo2_trl.projection import coordinates


def adam_trainer():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False)
    args = SimpleNamespace(adam_beta2=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0)
    return SimpleNamespace(model=model, args=args, optimizer=optimizer)


def test_the_first_moment_is_filtered_and_the_second_is_not():
    trainer = adam_trainer()
    step, param = ideas.first_moment(trainer), trainer.model.weight
    first, second = torch.zeros(3, 5), torch.zeros(3, 5)
    for i in range(4):
        raw = torch.randn(3, 5)
        param.grad = raw * (0.3 if i else 1.0)  # nothing is filtered before the first basis
        first, second = 0.8 * first + 0.2 * param.grad, 0.9 * second + 0.1 * raw.square()
        step([raw])
    state = trainer.optimizer.state[param]
    assert torch.allclose(state["exp_avg"], first, atol=1e-6)
    assert torch.allclose(state["exp_avg_sq"], second, atol=1e-6)


def planted(scale: float, **options) -> NSPO2:
    """An estimate of noise in 200 directions, `scale` in the second, more in the first, around 1."""
    torch.manual_seed(0)
    config = {"strategy": "noise", "projection_rank": 4, "trust_radius": 1.0, "target_bias": 1.0, "min_rank": 4}
    part = NSPO2(NSPO2Config(update_freq=5, **(config | options)))
    for _ in range(60):
        part.step(1 + samples(scale), None)
    return part


def samples(scale: float) -> torch.Tensor:
    spread = torch.ones(200)
    spread[0], spread[1] = 1.5 * scale, scale
    return spread * torch.randn(4, 1, 1, 200)


@pytest.mark.parametrize("scale, low, high", [(30.0, 0.95, 1.0), (2 / 3, 0.0, 0.2)])
def test_cosine_shrinkage_is_the_cosine_with_the_true_direction(scale, low, high):
    part = planted(scale)
    ideas.cosine_shrinkage(SimpleNamespace(nspo2=SimpleNamespace(parts=[part])))
    head = part.head()
    true = head.basis[0, :2, :2].square().sum(1)  # squared cosines with the plane of the first two entries
    assert low <= head.shares[0, :2].min() and head.shares[0, :2].max() <= high
    assert scale < 1 or torch.allclose(head.shares[0, :2], true, atol=0.05)
    grad = torch.randn(1, 1, 200)
    left = coordinates(head.apply(grad), head.basis) / coordinates(grad, head.basis)
    assert torch.allclose(left[0, 0, :4], 1 - head.shares[0, :4], atol=1e-4)


def test_soft_gain_passes_what_carries_signal():
    part = planted(30.0)
    trainer = SimpleNamespace(nspo2=SimpleNamespace(parts=[part]), args=SimpleNamespace(max_steps=100))
    ideas.soft_gain(trainer)
    mean = torch.zeros(200)
    mean[1] = 60
    for _ in range(40):
        part.step(mean + samples(30.0), torch.ones(1, 1, 200))
    direction = torch.nn.functional.one_hot(torch.tensor([0, 1]), 200).float()[:, None, None]
    noise, signal = (grad.norm() ** -1 * part.head().apply(grad).norm() for grad in direction)
    assert noise < 0.7 < signal
    part.progress = 1.0  # nothing is left to be gained from the signal
    assert part.head().apply(direction[1]).norm() < 0.3


def test_several_references_stay_in():
    part = planted(30.0, strategy="keep", projection_rank=8, min_rank=8)
    ideas.several_references(SimpleNamespace(nspo2=SimpleNamespace(parts=[part])))
    recent = []
    for _ in range(6):
        recent.append(1 + samples(30.0))
        part.step(recent[-1], recent[-1].mean(0))
    head, grad = part.head(), samples(30.0).mean(0)
    inside = head.basis.mT @ (head.taken[..., None] * head.basis)
    last, left = recent[-1].mean(0), head.apply(grad)
    assert torch.allclose(head.apply(left), left, atol=1e-4)  # a projection
    assert torch.allclose(head.apply(last) @ inside, last @ inside, atol=1e-3)  # the last step's gradient stays in
    removed = head.restrict(torch.eye(head.basis.shape[1])[None])[0]
    assert removed.trace().item() == pytest.approx(head.taken.sum().item() - 4, abs=1e-3)


def test_agreement_weighs_down_the_micro_batch_that_stands_out(tmp_path):
    """Through the whole engine, in adapters of any size of gradient; what comes out is written to `.grad`."""
    trainer = make(tmp_path, nspo2_strength=0.0, nspo2_update_freq=2, nspo2_projection_rank=2)
    engine, params = trainer.nspo2, [p for p in trainer.model.parameters() if p.requires_grad]
    ideas.agreement(trainer)
    torch.manual_seed(0)
    buffers = [group.buffer(4) for group in engine.groups]
    scales = [10.0 ** (torch.arange(group.grad.shape[0]) % 3 - 1)[:, None, None] for group in engine.groups]
    equal, far = [1.0] * 4, [1.0, 1.1, 0.9, 9.0]
    shares = {}
    for four in [None] * 8 + [far, equal]:  # None: random ones, else the same four for all blocks
        for buffer, scale in zip(buffers, scales):
            buffer.normal_().mul_(scale)
            if four:
                buffer[:] = torch.tensor(four)[:, None, None, None] * scale
        for group, buffer in zip(engine.groups, buffers):
            for place, value in zip(group.places, group.views_of(buffer.mean(0))):
                place.param.grad = value.clone()
        before = [p.grad.clone() for p in params]
        engine.begin_step(lambda: buffers)
        engine.end_step()
        shares[str(four)] = torch.tensor([(p.grad.norm() / b.norm()).item() for p, b in zip(params, before)])
    assert (shares[str(far)] < 0.8).all() and shares[str(far)].std() < 0.05
    assert all(torch.allclose(p.grad, b) for p, b in zip(params, before))  # the equal ones


def test_balanced_orders_have_small_partial_sums():
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    vectors -= vectors.mean(0)
    order = list(range(200))
    farthest = lambda order: vectors[order].cumsum(0).norm(dim=1).max()
    first = farthest(order)
    for _ in range(5):
        order = ideas.balance(vectors, order)
    assert sorted(order) == list(range(200)) and farthest(order) < 0.5 * first


def test_each_epoch_has_the_first_ones_micro_batches_in_another_order(tmp_path):
    options = {"nspo2_strength": 0.0, "nspo2_update_freq": 2, "max_steps": 30, "per_device_train_batch_size": 1}
    trainer = make(tmp_path, gradient_accumulation_steps=4, **options)
    trainer.train_dataset = trainer.train_dataset.select(range(40))
    data = lean.load_data(trainer, range(4), tmp_path)
    lean.train(trainer, data, prepare=ideas.balanced_order)
    epochs = [[rows for batch in trainer.batches[i : i + 10] for rows in batch] for i in (0, 10, 20)]
    assert len(trainer.batches) == 30 and epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_retain_moves_nothing_along_what_the_reference_wrote(tmp_path, monkeypatch):
    found, directions = [], kept.directions
    monkeypatch.setattr(kept, "TEXTS", 16)
    monkeypatch.setattr(kept, "directions", lambda *args: found.append(directions(*args)) or found[-1])
    trainer = make(tmp_path, nspo2_enabled=False)
    trainer.create_optimizer_and_scheduler(10)
    step, params = kept.retain(trainer, rank=4), PackedLlama(trainer.model).factors
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.randn_like(param)
    for group in trainer.optimizer.param_groups:  # the schedule starts at 0
        group["lr"] = 1e-3
    step([])
    groups = kept.BlockGroups(kept.lora_blocks(trainer.model), NSPO2Config())
    changes = kept.stacked(groups, {id(p): (p.detach() - b)[None] for p, b in zip(params, before)})
    for change, basis in zip(changes, found):
        assert (basis.norm(dim=-1) > 0.5).any() and change.norm() > 0
        assert coordinates(change[:, 0], basis).norm() < 1e-4 * change.norm()


def test_replay_adds_the_texts_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "TEXTS", 4)
    trainer = make(tmp_path, nspo2_enabled=False)
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.SGD(params, lr=1.0)
    step, llama = kept.replay(trainer, weight=0.5), PackedLlama(trainer.model)
    texts = kept._reference_texts(trainer)
    loss = -0.5 * llama.log_probs(Packed(texts))[0].mean()
    wanted = [g if g is not None else torch.zeros_like(p) for g, p in zip(torch.autograd.grad(loss, params), params)]
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    step([])
    for param, start, grad in zip(params, before, wanted):
        assert torch.allclose(start - param.detach(), 1 + grad, atol=1e-3)
    assert lean.log_probs(llama, texts, adapted=False).isfinite().all()
