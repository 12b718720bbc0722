import pytest
import torch

from dag import ddim
from dag.config import SD14

CFG = SD14.schedule


def test_exactly_as_many_steps_as_asked():
    for steps in range(1, 1001):
        pairs = ddim.time_pairs(steps, CFG)
        times = [t for t, _ in pairs]
        assert len(pairs) == steps
        assert times == sorted(set(times), reverse=True)
        assert all(0 <= t <= 999 for t in times)
        assert [t_prev for _, t_prev in pairs] == [*times[1:], 0]


def test_fifty_steps_are_the_originals():
    pairs = ddim.time_pairs(50, CFG)
    assert pairs[0] == (981, 961) and pairs[-2:] == [(21, 1), (1, 0)]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_wrong_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected 1 to 1000"):
        ddim.time_pairs(steps, CFG)


def test_schedule():
    abar = ddim.alphas_cumprod(CFG)
    assert abar.shape == (1000,) and abar.dtype == torch.float32
    assert abar[0] == pytest.approx(1 - 0.00085)
    assert abar[-1] == pytest.approx(0.0046602, rel=1e-4)
    assert (abar.diff() < 0).all()


def test_step_with_the_true_noise_recovers_the_picture():
    abar = ddim.alphas_cumprod(CFG)
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x = ddim.add_noise(x0, noise, abar[[500, 500]])
    x_prev, predicted = ddim.step(x, noise, abar[500], abar[300])
    assert torch.allclose(predicted, x0, atol=1e-5)
    assert torch.allclose(x_prev, ddim.add_noise(x0, noise, abar[300]), atol=1e-5)
