"""What each adapted module's input is on retained texts: its strongest directions, from the frozen model's passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...engine.second_moment import SecondMoment, energy_along, random_probe
from ...layout.roles import InputAdapter
from .passes import Frozen, last_logit_only, mine, reading, total
from .texts import SKIP_TOKENS, Batch

# First tokens count so little that they displace no direction; where there is room left, what they use is kept too,
# and with it the exactness of texts that span less than K.
FIRST_TOKENS = 1e-6
LOOKS = 16  # batches of the first look, which only finds a good probe


@dataclass
class InputSpace:
    """The directions of one input, that one or more modules share.

    Args:
        modules: names of the modules. vectors: (width, k) orthonormal, strongest first, float32.
        shares: (k,) share of the energy of x / ‖x‖ along each, on the texts it was made from.
        held_out: (k,) the same on held-out texts.
    """

    modules: list[str]
    vectors: torch.Tensor
    shares: torch.Tensor
    held_out: torch.Tensor

    def leakage(self, rank: int) -> float:
        """Share of the energy of held-out tokens that is outside the first `rank` directions."""
        return float(1 - self.held_out[:rank].sum())


def mean_leakage(spaces: Sequence[InputSpace], rank: int) -> float:
    """Mean over inputs of [`InputSpace.leakage`]; 1 where there is none."""
    return sum(space.leakage(rank) for space in spaces) / len(spaces) if spaces else 1.0


def collect(
    model: nn.Module,
    adapters: Sequence[InputAdapter],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    rank: int,
    frozen: Frozen | None = None,
    skip: int = SKIP_TOKENS,
) -> list[InputSpace]:
    """The `rank` strongest directions of the second moment E[x̂ x̂ᵀ], x̂ = x / ‖x‖, of each input of `adapters`.

    Padding is left out, and so are the first `skip` tokens of each text. Two looks: the first, at a few batches, finds
    a probe, the second, at all of them, the directions; so the result is near that of the full matrix, and the same
    for any number of processes. Memory beside the model: 12 bytes x (2 rank + 32) x the widths of all inputs.

    Args:
        batches: from [`texts.batches`], the same on all processes. held_out: those that leakage is measured on.
        frozen: enters the state whose inputs count; `model.disable_adapter` if left out.

    Raises:
        ValueError: `rank` would take all directions of an input, or an input is not by token (mixture of experts).
    """
    width = min(adapter.width for adapter in adapters)
    if rank >= width:
        raise ValueError(
            f"`rank` {rank} would take all {width} directions of an input, and nothing of the adapter would be left: "
            "lower it."
        )
    size = 2 * rank + 32
    with reading(model), (frozen or model.disable_adapter)():  # type: ignore[operator]
        groups = shared_inputs(model, adapters, batches[0])
        leaders = [modules[0] for modules in groups]
        probes = {}
        for leader in leaders:
            width, device = leader.width, leader.weight.device
            if (width, device) not in probes:
                probes[width, device] = random_probe(width, min(size, width)).float().to(device)
        moments = [SecondMoment(probes[leader.width, leader.weight.device]) for leader in leaders]
        if size < max(leader.width for leader in leaders):
            _fill(model, leaders, moments, batches[:: -(-len(batches) // LOOKS)], skip, "First look")
            for i, moment in enumerate(moments):  # one by one, so that not all are there twice
                moments[i] = SecondMoment(moment.better_probe().float())
        _fill(model, leaders, moments, batches, skip, "Reading retained texts")
        found = []
        for modules, moment in zip(groups, moments):
            values, vectors = moment.directions(rank)
            shares = values / moment.energy.clamp_min(1e-30)
            names = [module.name for module in modules]
            found.append(InputSpace(names, vectors.float(), shares, torch.zeros_like(shares)))
        _profile(model, leaders, found, held_out, skip)
    return found


def shared_inputs(model: nn.Module, adapters: Sequence[InputAdapter], batch: Batch) -> list[list[InputAdapter]]:
    """Modules that are handed the same tensor in a pass, such as q, k and v of a layer, side by side.

    Modules that the pass does not reach are left out: texts do not use them.
    """
    groups: list[list[InputAdapter]] = []
    alive: list[weakref.ref] = []  # by reference alone, so that no activation is held longer than the model does

    def see(adapter: InputAdapter, x: torch.Tensor) -> None:
        for group, tensor in zip(groups, alive):
            if tensor() is x and group[0].weight.device == adapter.weight.device:
                group.append(adapter)
                return
        groups.append([adapter])
        alive.append(weakref.ref(x))

    device = adapters[0].weight.device
    with _watch(adapters, see):
        model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False, **last_logit_only(model))
    return groups


@contextmanager
def _watch(adapters: Sequence[InputAdapter], see: Callable[[InputAdapter, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with each input x that reaches one of `adapters`."""

    def hook(adapter: InputAdapter) -> Callable:
        return lambda module, args: see(adapter, args[0])

    handles = [adapter.module.register_forward_pre_hook(hook(adapter)) for adapter in adapters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _look(
    model: nn.Module,
    leaders: Sequence[InputAdapter],
    batches: Sequence[Batch],
    skip: int,
    see: Callable[[int, torch.Tensor, torch.Tensor], None],
    title: str,
) -> None:
    """Run the model over this process's batches and hand `see` (index of the leader, rows x̂, first rows x̂)."""
    index = {leader.name: i for i, leader in enumerate(leaders)}
    masks: list[torch.Tensor] = []

    def rows(adapter: InputAdapter, x: torch.Tensor) -> None:
        kept, first = masks
        if x.shape[:-1].numel() != kept.numel():
            raise ValueError(
                f"{adapter.name} is given {x.shape[:-1].numel()} of {kept.numel()} tokens (a mixture of experts?): "
                "its input cannot be followed. Leave it out of `target_modules`."
            )
        flat = torch.nn.functional.normalize(x.reshape(-1, x.shape[-1]).float(), dim=-1)
        see(index[adapter.name], flat[kept.flatten().to(x.device)], flat[first.flatten().to(x.device)])

    keep = last_logit_only(model)
    if any(leader.module is model.get_output_embeddings() for leader in leaders):  # type: ignore[operator]
        keep = {}
    for batch, counts in mine(batches, leaders[0].weight.device, title):
        mask = batch["attention_mask"].bool() & counts
        after = batch["attention_mask"].cumsum(1) > skip
        masks[:] = [mask & after, mask & ~after]
        with _watch(leaders, rows):
            model(**batch, use_cache=False, **keep)


def _fill(
    model: nn.Module,
    leaders: Sequence[InputAdapter],
    moments: Sequence[SecondMoment],
    batches: Sequence[Batch],
    skip: int,
    title: str,
) -> None:
    """Add the inputs of all processes' batches to `moments`."""

    def see(i: int, rows: torch.Tensor, first: torch.Tensor) -> None:
        moments[i].update(rows)
        moments[i].update(first, FIRST_TOKENS)

    _look(model, leaders, batches, skip, see, title)
    for moment in moments:
        moment.sum, moment.energy = total(moment.sum), total(moment.energy)


def _profile(
    model: nn.Module, leaders: Sequence[InputAdapter], spaces: list[InputSpace], batches: Sequence[Batch], skip: int
) -> None:
    """Fill in `held_out` of `spaces`."""
    counts = [torch.zeros((), dtype=torch.float64, device=space.vectors.device) for space in spaces]

    def see(i: int, rows: torch.Tensor, first: torch.Tensor) -> None:
        spaces[i].held_out += energy_along(rows, spaces[i].vectors)
        counts[i] += len(rows)

    _look(model, leaders, batches, skip, see, "Reading held-out texts")
    for space, count in zip(spaces, counts):
        space.held_out = total(space.held_out) / total(count).clamp_min(1)
