"""Retained knowledge: what is collected, the projections, exactness, what is measured, what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from hypothesis import given
from hypothesis import strategies as st
from retained import SHORT, adapted, sentences, tokenizer, trained
from trl import DPOConfig, DPOTrainer

from nspo2_trl import retain_adapter
from nspo2_trl.layout.roles import input_adapters
from nspo2_trl.projections.retain.collect import InputSpace, collect, shared_inputs
from nspo2_trl.projections.retain.measure import retention
from nspo2_trl.projections.retain.pairs import pair_batches, preference, tokenize_pairs
from nspo2_trl.projections.retain.project import Point, project, put, starts
from nspo2_trl.projections.retain.saved import collect_once
from nspo2_trl.projections.retain.texts import batches, tokenize


def ids(texts):
    return tokenize(texts, tokenizer())


def logits(model, texts):
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0] for text in ids(texts)]


def distance(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second))


def spaces_of(model, texts=None, rank=6, **options):
    reading = batches(ids(texts or sentences()), 0)
    return collect(model, input_adapters(model, "default"), reading, reading, rank, **options)


# ---- what is collected ----


def frozen_inputs(model, texts, skip=4):
    """By module, rows x / ‖x‖ of each text alone, from the base model with its adapter off, after `skip` tokens."""
    rows, handles = {}, []
    for adapter in input_adapters(model, "default"):

        def keep(module, args, name=adapter.name):
            rows.setdefault(name, []).append(args[0][0, skip:].double())

        handles.append(adapter.module.register_forward_pre_hook(keep))
    with model.disable_adapter():
        logits(model, texts)
    for handle in handles:
        handle.remove()
    return {name: torch.nn.functional.normalize(torch.cat(parts), dim=-1) for name, parts in rows.items()}


def test_directions_are_the_eigenvectors_of_each_modules_inputs():
    model, texts = adapted(), sentences()
    rows = frozen_inputs(model, texts)
    spaces = spaces_of(model, texts, rank=32)  # 2 x 32 + 32 directions in the sketch: all of 96
    assert sorted(name for space in spaces for name in space.modules) == sorted(rows)
    for space in spaces:
        for name in space.modules:
            values, vectors = torch.linalg.eigh(rows[name].T @ rows[name] / len(rows[name]))
            best = values.flip(0)[:6]
            if space.vectors.shape[0] == 96:
                torch.testing.assert_close(space.shares[:6], best, rtol=1e-4, atol=1e-6)
                overlap = (vectors.flip(1)[:, :6].T @ space.vectors[:, :6].double()).abs()
                torch.testing.assert_close(overlap.diag(), torch.ones(6).double(), rtol=0, atol=1e-3)
            inside = (rows[name] @ space.vectors[:, :6].double()).square().sum() / len(rows[name])
            assert 0.97 * best.sum() < inside < (1 + 1e-6) * best.sum()
            assert space.leakage(6) == pytest.approx(1 - float(inside), abs=1e-5)


def test_modules_with_one_input_share_their_directions():
    model = adapted()
    groups = shared_inputs(model, input_adapters(model, "default"), batches(ids(sentences(4)), 0)[0])
    names = [[adapter.name.rpartition(".")[2] for adapter in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 3


def test_padding_changes_nothing():
    model, texts = adapted(), sentences()
    alone = [batch for text in ids(texts) for batch in batches([text], 0)]
    together = batches(ids(texts), 0)
    assert len(together) < len(alone) and not all(batch["attention_mask"].all() for batch in together)
    adapters = input_adapters(model, "default")
    for one, other in zip(
        collect(model, adapters, alone, alone, 32), collect(model, adapters, together, together, 32)
    ):
        torch.testing.assert_close(one.shares[:6], other.shares[:6], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.held_out[:6], other.held_out[:6], rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = adapted().train()
    before = {name: param.clone() for name, param in model.named_parameters()}
    wants = {name for name, param in model.named_parameters() if param.requires_grad}
    spaces_of(model)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert wants == {name for name, param in model.named_parameters() if param.requires_grad} and wants
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_frozen_may_be_the_adapter_as_it_was():
    from contextlib import nullcontext

    model = adapted()
    plain, own = spaces_of(model), spaces_of(model, frozen=nullcontext)
    assert torch.equal(plain[0].vectors, own[0].vectors)  # no adapter stands before the first layer's input
    assert not torch.allclose(plain[-1].shares, own[-1].shares, rtol=1e-3)


def test_collected_once(tmp_path):
    model = adapted()
    adapters, reading = input_adapters(model, "default"), batches(ids(sentences()), 0, tokens=200)
    first = collect_once(model, adapters, reading, reading, 6, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    again = collect_once(trained(model), adapters, reading, reading, 6, tmp_path)  # the adapter is no part of the key
    assert not passes
    for one, other in zip(first, again):
        assert one.modules == other.modules
        for name in ("vectors", "shares", "held_out"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    collect_once(model, adapters, reading[:-1], reading, 6, tmp_path)
    collect_once(model, adapters, reading, reading, 5, tmp_path)
    collect_once(model, adapters, reading, reading, 6, tmp_path, skip=2)
    handle.remove()
    next(p for name, p in model.named_parameters() if "lora" not in name).data += 1e-3
    collect_once(model, adapters, reading, reading, 6, tmp_path)
    assert passes and len(list(tmp_path.iterdir())) == 5


def collected(out: Path, processes: int, *kind: str) -> dict:
    out.mkdir()
    return torchrun("retained.py", processes, out, *kind)


@pytest.mark.parametrize("kind", [(), ("fsdp",)])
def test_two_processes_collect_and_measure_what_one_does(tmp_path, kind):
    one, two = collected(tmp_path / "one", 1), collected(tmp_path / "two", 2, *kind)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["batches"] % 2  # the last round has work for one process
    for first, second in zip(one["tensors"], two["tensors"]):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert one["retention"][0] == pytest.approx(two["retention"][0], rel=1e-6)
    for first, second in zip(one["weights"], two["weights"]):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# ---- the projections ----


def space_of(width, k, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q
    shares = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True).values
    return InputSpace([], basis.float(), shares / shares.sum() * 0.9, shares)


@given(st.integers(1, 5), st.integers(8, 20), st.integers(1, 6), st.floats(0.1, 3), st.integers(0, 99))
def test_hard_takes_out_the_directions_and_leaves_the_rest(r, width, rank, scale, seed):
    space, weight = space_of(width, 6, seed), torch.randn(r, width, generator=torch.Generator().manual_seed(seed))
    basis = space.vectors[:, :rank]
    new = project(weight, space, Point(rank, scale))
    assert (new @ basis).abs().max() < 1e-5 * max(1, scale)
    rest = torch.eye(width) - basis @ basis.T
    torch.testing.assert_close(new @ rest, scale * weight @ rest, rtol=1e-4, atol=1e-5)
    again = project(new, space, Point(rank, 1.0))
    torch.testing.assert_close(again, new, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(project(weight, space, Point(0, scale)), scale * weight)


@given(st.integers(8, 20), st.integers(1, 6), st.floats(0.1, 3), st.integers(0, 99))
def test_ridge_is_the_inverse_that_its_formula_names(width, rank, scale, seed):
    space, weight = space_of(width, 6, seed), torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    basis = space.vectors[:, :rank].double()
    moment = (basis * space.shares[:rank]) @ basis.T  # tr C = 1
    expected = scale * weight.double() @ torch.linalg.inv(width * moment + torch.eye(width))
    found = project(weight, space, Point(rank, scale, "ridge")).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_any_number_of_points_from_one_start():
    model = adapted()
    adapters, spaces = input_adapters(model, "default"), spaces_of(model)
    start = starts(adapters)
    put(adapters, start, spaces, Point(6, 2.0))
    assert not torch.equal(adapters[0].weight, start[0])
    put(adapters, start, spaces, Point(0, 1.0))
    assert all(torch.equal(adapter.weight, weight) for adapter, weight in zip(adapters, start))


# ---- exactness ----


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": ["v_proj", "down_proj"]}])
@pytest.mark.parametrize("skip", [4, 0])
def test_exact_where_the_texts_span_less_than_the_rank(lora, skip):
    """First tokens too, though they are left out of the figures. In float64: float32 rounds logits of 24 by 1e-5."""
    model, texts = adapted(**lora).double(), SHORT * 10
    with model.disable_adapter():
        base = logits(model, SHORT)
    assert distance(logits(model, SHORT), base) > 0.1 and sum(map(len, ids(SHORT))) < 32
    figures = retain_adapter(model, texts, tokenizer(), rank=32, skip=skip)
    assert distance(logits(model, SHORT), base) < 1e-5
    assert figures["kl"] < 1e-6 < figures["before"]["kl"] and figures["leakage"] < 1e-6
    others = sentences(3)
    with model.disable_adapter():
        base = logits(model, others)
    assert distance(logits(model, others), base) > 0.01  # what the adapter does elsewhere is left
    model = adapted(**lora)
    retain_adapter(model, texts, tokenizer(), rank=3, skip=skip)
    with model.disable_adapter():
        base = logits(model, SHORT)
    assert distance(logits(model, SHORT), base) > 1e-3  # a rank below what they span


def test_random_directions_of_the_same_rank_keep_nothing():
    model = adapted()
    adapters, reading = input_adapters(model, "default"), batches(ids(sentences()), 0)
    spaces, start = spaces_of(model, rank=12), starts(adapters)
    random = [InputSpace(s.modules, space_of(len(s.vectors), 12, 0).vectors, s.shares, s.held_out) for s in spaces]
    states = [partial(put, adapters, start, spaces, Point(0, 1.0))]
    states += [partial(put, adapters, start, kind, Point(12, 1.0)) for kind in (spaces, random)]
    plain, kept, control = (figures["kl"] for figures in retention(model, reading, states))
    assert kept < 0.6 * plain and control > 0.75 * plain, (plain, kept, control)


# ---- what is measured ----


def test_retention_is_the_mean_over_tokens_with_a_next_one():
    model, texts = adapted(), sentences(9)
    kls, rises = [], []
    with model.disable_adapter():
        before = logits(model, texts)
    for frozen, policy, text in zip(before, logits(model, texts), ids(texts)):
        log_p, log_q = frozen.log_softmax(-1)[:-1], policy.log_softmax(-1)[:-1]
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        targets = torch.tensor(text[1:])[:, None]
        rises.append((log_p - log_q).gather(1, targets)[:, 0])
    figures = retention(model, batches(ids(texts), 0, tokens=60))[0]
    assert figures["kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert figures["loss_rise"] == pytest.approx(float(torch.cat(rises).mean()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("columns", [("prompt", "chosen", "rejected"), ("chosen", "rejected")])
def test_preference_figures_are_those_of_dpo_trainer(pairs, tmp_path, columns):
    rows = pairs.select(range(12))
    if columns == ("chosen", "rejected"):
        rows = rows.map(lambda row: {name: row["prompt"] + row[name] for name in columns}, remove_columns=["prompt"])
    args = DPOConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, beta=0.3, per_device_eval_batch_size=12
    )
    model = adapted()
    batch = pair_batches(tokenize_pairs(rows, tokenizer()), 0, tokens=300)
    found = preference(model, batch, beta=0.3)[0]
    trainer = DPOTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer())
    reference = [param for name, param in model.named_parameters() if ".ref." in name]
    assert reference  # a copy of the adapter as it is
    for param in reference:
        param.data.zero_()
    expected = trainer.evaluate()
    assert found["loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert found["accuracy"] == pytest.approx(expected["eval_rewards/accuracies"])
    assert found["margin"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-3)
