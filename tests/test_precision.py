"""Half precision, what is not finite, and batches of pictures."""

import copy
import json

import pytest
import torch
from PIL import Image

import sample as program
from dag import Guidance, sample
from dag.model import NumericsError

PROMPTS, SEEDS = ["a red circle on grey", "a blue star"], [1, 2]


@pytest.fixture(scope="module")
def exact(shapes):
    return [step.x for step in sample(shapes, PROMPTS, Guidance(), steps=4, seeds=SEEDS)]


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision(shapes, exact, dtype, limit):
    """The networks run in it; latents stay float32 and near those of float32, from the very same noise."""
    half = copy.deepcopy(shapes).to(dtype)
    steps = list(sample(half, PROMPTS, Guidance(), steps=4, seeds=SEEDS))
    for ours, reference in zip(steps, exact, strict=True):
        assert ours.x.dtype == torch.float32
        assert 0 < (ours.x - reference).abs().max() <= limit * reference.abs().max()
    corner = (slice(1), slice(None), slice(8), slice(8))  # a CPU decodes float16 fifty times slower than float32
    picture = half.decode(steps[-1].x[corner])
    assert picture.dtype == torch.float32
    assert (picture - shapes.decode(exact[-1][corner])).abs().mean() <= limit


def test_islands(shapes, monkeypatch):
    """The time's cosines and sines are float32 whatever the networks run in: bfloat16 cannot tell 981 from 982."""
    from dag import unet

    seen = []
    real = unet.timestep_embedding

    def spy(t, dim):
        seen.append(real(t, dim))
        return seen[-1]

    monkeypatch.setattr(unet, "timestep_embedding", spy)
    half = copy.deepcopy(shapes).to(torch.bfloat16)
    half.unet(torch.zeros(2, 4, 8, 8), torch.tensor([981, 982]), half.text.encode(PROMPTS))
    assert seen[0].dtype == torch.float32 and (seen[0][0] - seen[0][1]).abs().max() > 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(shapes, value):
    """A step that goes wrong is named; a decoder that does is not hidden by clamping infinity to white."""
    broken = copy.deepcopy(shapes)
    broken.unet.out[2].bias[0] = value
    with pytest.raises(NumericsError, match=r"no latent is finite after step 1 \(t = 667\); try --dtype float32"):
        list(sample(broken, PROMPTS, Guidance(), steps=3))
    broken = copy.deepcopy(shapes)
    broken.vae.decoder.conv_out.bias[0] = value
    with pytest.raises(NumericsError, match="the decoded picture is not finite, not even in float32"):
        broken.decode(torch.zeros(1, 4, 8, 8))


def test_a_decoder_that_overflows_decodes_again_in_float32(shapes):
    loud = copy.deepcopy(shapes)
    loud.vae.decoder.conv_in.weight *= 1e5  # normalised later, but more than float16 holds
    half, z = copy.deepcopy(loud).half(), torch.randn(2, 4, 8, 8)
    assert not half.vae.decode((z[:1] / half.config.vae.scale_factor).half()).isfinite().all()
    assert (half.decode(z) - loud.decode(z)).abs().mean() < 0.01
    assert half.dtype == torch.float16


@pytest.mark.parametrize("lost", [(1,), (0, 1, 2)])
def test_pictures_that_are_not_finite_do_not_cost_the_others(lost, tmp_path, capsys, monkeypatch):
    """They are told in the report, and exit status 1; their neighbours are bit for bit what they were."""
    from dag import sampling

    argv = ["--prompt", "a red circle on grey", "--n-images", "3", "--steps", "8", "--seed", "3"]
    assert program.main([*argv, "--out", str(tmp_path / "a")]) == 0
    real = sampling.noise

    def spoilt(seeds, shape):
        x = real(seeds, shape)
        x[list(lost), 0, 0, 0] = float("nan")
        return x

    monkeypatch.setattr(sampling, "noise", spoilt)
    capsys.readouterr()
    assert program.main([*argv, "--out", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert f"(seed {3 + lost[0]}), dag: no picture, the latent is not finite after step 1 (t = 876)" in said[0]
    assert said[-1] == f"sample.py: {len(lost)} of 3 pictures failed, see the warnings above"
    a, b = (json.loads((tmp_path / folder / "report.json").read_text())["pictures"] for folder in "ab")
    for k in range(3):
        if k in lost:
            assert b[k]["file"] is None and "not finite" in b[k]["failed"] and b[k]["seed"] == 3 + k
        else:
            one, other = (Image.open(tmp_path / folder / a[k]["file"]).tobytes() for folder in "ab")
            assert one == other and b[k]["found"] == a[k]["found"]
    assert len(list((tmp_path / "b").glob("0*.png"))) == 3 - len(lost)


def test_pictures_are_decoded_one_by_one(shapes):
    """So memory does not grow with the batch, and a picture does not depend on its neighbours."""
    z = torch.randn(3, 4, 16, 16)
    assert torch.equal(shapes.decode(z), torch.cat([shapes.decode(one[None]) for one in z]))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_size(size, tmp_path, monkeypatch):
    from dag import sampling

    sizes, real = [], sampling.sample

    def noted(sd, prompts, *rest, **more):
        sizes.append(len(prompts))
        return real(sd, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", noted)
    argv = ["--prompt", "a blue star on night", "--n-images", "5", "--steps", "2", "--guidance", "none"]
    assert program.main([*argv, "--batch-size", str(size), "--out", str(tmp_path)]) == 0
    assert max(sizes) == size and sum(sizes) == 5
    assert len(json.loads((tmp_path / "report.json").read_text())["pictures"]) == 5
    assert Image.open(tmp_path / "004-a-blue-star-on-night.png").size == (128, 128)
