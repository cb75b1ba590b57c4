import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspo2_trl.engine.strategies import trust_alpha


@given(
    removed=st.floats(0, 100, allow_subnormal=False),
    norm=st.floats(0, 100, allow_subnormal=False),
    radius=st.floats(1e-3, 2),
)
@settings(max_examples=200, deadline=None)
def test_alpha_is_the_largest_that_holds_the_bound(removed, norm, radius):
    removed_, norm_ = torch.tensor([removed], dtype=torch.float64), torch.tensor([norm], dtype=torch.float64)
    alpha = trust_alpha(removed_, norm_, radius).item()
    assert 0 <= alpha <= 1
    assert alpha * removed <= radius * norm * (1 + 1e-9)
    if alpha < 1:
        assert (alpha + 1e-3) * removed > radius * norm


def test_scale_free():
    removed, norm = torch.tensor([3.0, 0.1]), torch.tensor([4.0, 4.0])
    assert torch.allclose(trust_alpha(removed * 1e9, norm * 1e9, 0.1), trust_alpha(removed, norm, 0.1))


def test_nothing_removed_means_no_bound():
    assert trust_alpha(torch.zeros(2), torch.tensor([0.0, 5.0]), 0.1).tolist() == [1.0, 1.0]
