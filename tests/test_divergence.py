"""KL and loss per token by chunks, against torch's own on everything at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from nspo2_trl.engine.divergence import token_kl, token_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(37, 50, generator=generator) * 3 for _ in range(2)]


@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_values_and_gradients_are_those_of_all_tokens_at_once(logits, chunk):
    frozen, policy = logits[0], logits[1].requires_grad_()
    log_p, log_q = frozen.log_softmax(-1), policy.log_softmax(-1)
    expected = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    found = token_kl(frozen, policy, chunk)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(kl.mean(), policy)[0] for kl in (found, expected)]
    torch.testing.assert_close(*gradients)
    targets = frozen.argmax(-1)
    torch.testing.assert_close(token_loss(policy, targets, chunk), cross_entropy(policy, targets, reduction="none"))


def test_the_same_logits_have_no_divergence(logits):
    assert token_kl(logits[0], logits[0]).abs().max() < 1e-5


def test_no_probabilities_are_kept_for_the_backward_pass(logits):
    policy = logits[1].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_kl(logits[0], policy, chunk=4)
    own = {tensor.untyped_storage().data_ptr() for tensor in logits}
    assert not [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
