"""Log-probabilities of preference pairs under a small Llama with LoRA, fast on one CPU core.

The same numbers as the trainer's, up to rounding, for less work. A pair is one row (prompt, chosen, rejected): its
prompt is computed once, and the rejected answer does not see the chosen one. All micro-batches of a step go through
the model together, without padding outside of attention. Every adapter is merged into its frozen matrix for the
forward pass, since 1,000 tokens cost far more than one product of two thin matrices. Logits exist for the answers
alone. Backward, each micro-batch's gradient of each adapter is a product over that micro-batch's tokens, so that the
samples of the noise need no pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel


@dataclass
class Pair:
    """Token ids, cut to the trainer's `max_length`; `rejected` may be empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Packed:
    """Pairs laid out one after the other, N tokens; for attention, answers with their prompts in 2 P padded rows."""

    def __init__(self, pairs: list[Pair], micro_batches: int = 1):
        self.pairs = len(pairs)
        sizes = torch.tensor([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
        lengths = sizes.sum(1)
        self.ids = torch.tensor([i for p in pairs for i in (*p.prompt, *p.chosen, *p.rejected)])
        starts = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(len(pairs)), lengths)
        column = torch.arange(len(self.ids)) - starts[row]
        prompt, chosen = sizes[row, 0], sizes[row, 1]
        rejected = column >= prompt + chosen
        self.positions = column - chosen * rejected
        ends = starts[:: len(pairs) // micro_batches].tolist() + [len(self.ids)]
        self.cuts = list(zip(ends, ends[1:]))  # the tokens of each micro-batch
        # answers' tokens, the token that each is predicted from, and the answer it belongs to (all chosen ones first)
        self.answers = torch.nonzero(column >= prompt)[:, 0]
        before = torch.arange(len(self.ids)) - 1 - chosen * (rejected & (column == prompt + chosen))
        answer = row + len(pairs) * rejected
        self.before, self.answer = before[self.answers], answer[self.answers]
        # the rows of attention: where a token stands, and which token stands at a place (any where there is padding)
        self.length = int(self.positions.max()) + 1
        self.places = answer * self.length + self.positions
        self.tokens = torch.zeros(2 * len(pairs) * self.length, dtype=torch.long)
        self.tokens[self.places] = torch.arange(len(self.ids))
        again = torch.nonzero(column < prompt)[:, 0]  # the prompts of the rejected answers
        self.tokens[self.places[again] + len(pairs) * self.length] = again


class _Adapted(torch.autograd.Function):
    """x Wᵀ + scale · x AᵀBᵀ for modules that share their input, W their matrices one below the other.

    `sinks` is None or for each of A, B, A, B, …: one tensor a micro-batch, filled with its gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, cuts, sinks, *factors):
        pairs = list(zip(factors[::2], factors[1::2]))
        rows = [b.shape[0] for _, b in pairs]
        merged = torch.cat([torch.addmm(w, b, a, alpha=scale) for w, (a, b) in zip(weight.split(rows), pairs)])
        ctx.save_for_backward(x, merged, *factors)
        ctx.scale, ctx.cuts, ctx.sinks, ctx.rows = scale, cuts, sinks, rows
        return x @ merged.T

    @staticmethod
    def backward(ctx, dy):
        # thin matrices stand as rows: the product of a long and a thin one is several times slower the other way round
        x, merged, *factors = ctx.saved_tensors
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        hidden = (torch.cat(factors[::2]) @ x.T).mul_(ctx.scale)
        grads, rank, start = [], factors[0].shape[0], 0
        for i, size in enumerate(ctx.rows):
            own = dy[:, start : start + size]
            back = (factors[2 * i + 1].T @ own.T).mul_(ctx.scale)
            start += size
            for thin, wide in ((back, x), (hidden[i * rank : (i + 1) * rank], own)):
                if ctx.sinks is None:
                    grads.append(thin @ wide)
                    continue
                parts = [thin[:, a:b] @ wide[a:b] for a, b in ctx.cuts]
                torch._foreach_copy_([sink.T if wide is own else sink for sink in ctx.sinks[len(grads)]], parts)
                grads.append(torch.stack(parts).sum(0))
        grads[1::2] = [grad.T for grad in grads[1::2]]
        return dx, None, None, None, None, *grads


class PackedLlama:
    """Runs `model`, a PEFT Llama with LoRA on all its linear layers, on [`Packed`] pairs.

    Raises:
        ValueError: the model is another one, and would not be computed as it is.
    """

    GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

    def __init__(self, model: PeftModel):
        base = model.get_base_model()
        config = base.config
        lora = model.active_peft_config
        plain = not (lora.use_dora or lora.lora_dropout or config.attention_bias or config.mlp_bias)
        if config.model_type != "llama" or config.hidden_act != "silu" or lora.bias != "none" or not plain:
            raise ValueError("The lean loop knows Llama without biases, with plain LoRA and no dropout, alone.")
        self.embedding, self.head = base.model.embed_tokens.weight, base.lm_head.weight
        self.norm, self.eps = base.model.norm.weight, config.rms_norm_eps
        heads, size = config.num_attention_heads, base.model.layers[0].self_attn.head_dim
        self.heads, self.kv_heads, self.size = heads, config.num_key_value_heads, size
        self.rotary = base.model.rotary_emb
        self.layers = []
        for layer in base.model.layers:
            groups = []
            for names in self.GROUPS:
                owner = layer.self_attn if names[0] in ("q_proj", "o_proj") else layer.mlp
                modules = [getattr(owner, name) for name in names]
                if not all(hasattr(module, "lora_A") for module in modules):
                    raise ValueError("The lean loop wants LoRA on all linear layers.")
                factors = [f[m.active_adapter[0]].weight for m in modules for f in (m.lora_A, m.lora_B)]
                weight = torch.cat([module.weight for module in modules]).detach()
                groups.append((weight, modules[0].scaling[modules[0].active_adapter[0]], factors))
            self.layers.append((layer.input_layernorm.weight, layer.post_attention_layernorm.weight, groups))

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        return [factor for *_, groups in self.layers for *_, factors in groups for factor in factors]

    def log_probs(
        self, packed: Packed, sinks: dict[int, list[torch.Tensor]] | None = None, adapted: bool = True
    ) -> torch.Tensor:
        """(2, P) Σ log p of the chosen and of the rejected answers.

        Args:
            sinks: by `id` of a LoRA matrix where to write its gradient in each micro-batch during backward.
            adapted: without the adapters it is the reference model.
        """
        x = F.embedding(packed.ids, self.embedding)
        cos, sin = self.rotary(x, packed.positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        for norm, second, (qkv, out, up, down) in self.layers:
            a = self._linear(self._norm(x, norm), qkv, packed, sinks, adapted)
            a = self._attend(a, cos, sin, packed)
            x = x + self._linear(a, out, packed, sinks, adapted)
            gate, value = self._linear(self._norm(x, second), up, packed, sinks, adapted).chunk(2, -1)
            x = x + self._linear(F.silu(gate) * value, down, packed, sinks, adapted)
        logits = self._norm(x, self.norm).index_select(0, packed.before) @ self.head.T
        found = -F.cross_entropy(logits, packed.ids[packed.answers], reduction="none")
        sums = found.new_zeros(2 * packed.pairs).index_add(0, packed.answer, found)
        return sums.view(2, -1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _linear(self, x, group, packed: Packed, sinks, adapted: bool) -> torch.Tensor:
        weight, scale, factors = group
        if not adapted:
            return x @ weight.T
        own = None if sinks is None else [sinks[id(factor)] for factor in factors]
        return _Adapted.apply(x, weight, scale, packed.cuts, own, *factors)

    def _attend(self, qkv: torch.Tensor, cos, sin, packed: Packed) -> torch.Tensor:
        heads, kv = self.heads, self.kv_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv, self.size)
        qk = qkv[:, : heads + kv]
        turned = torch.cat([-qk[..., self.size // 2 :], qk[..., : self.size // 2]], -1)
        qkv = torch.cat([qk * cos + turned * sin, qkv[:, heads + kv :]], 1)
        qkv = qkv.index_select(0, packed.tokens).view(2 * packed.pairs, packed.length, -1, self.size)
        q, k, v = qkv.transpose(1, 2).split([heads, kv, kv], 1)
        # plain products, whose backward pass is faster here than that of torch's fused attention
        q = q.reshape(-1, heads // kv * packed.length, self.size)
        k, v = (part.reshape(-1, packed.length, self.size) for part in (k, v))
        causal = torch.full((packed.length, packed.length), -torch.inf).triu(1).repeat(heads // kv, 1)
        weights = torch.baddbmm(causal, q, k.transpose(1, 2), alpha=self.size**-0.5).softmax(-1)
        a = (weights @ v).view(2 * packed.pairs, heads, packed.length, self.size).transpose(1, 2)
        return a.reshape(2 * packed.pairs * packed.length, -1).index_select(0, packed.places)
