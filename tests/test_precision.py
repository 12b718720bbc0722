"""Half precision, what is not finite, and batches of pictures."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import sample as program
from dag import Guidance, sample
from dag.model import NumericsError
from kernels import convolution

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


def test_pictures_are_encoded_one_by_one(shapes, monkeypatch):
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    apart, real, sizes = torch.cat([shapes.encode(one[None]) for one in pictures]), shapes.vae.encode, []
    monkeypatch.setattr(shapes.vae, "encode", lambda x: sizes.append(len(x)) or real(x))
    assert torch.equal(shapes.encode(pictures), apart) and sizes == [1, 1, 1]


def test_attention_gets_the_layout_of_fused_kernels(shapes, monkeypatch):
    """Whatever layout the feature map of the VAE has: fused attention wants the channels next to each other."""
    seen, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or real(*qkv))
    for layout in (torch.contiguous_format, torch.channels_last):
        shapes.vae.decoder.mid.attn_1(torch.randn(1, 64, 8, 8).contiguous(memory_format=layout))
    assert len(seen) == 6 and all(x.stride()[-2:] == (64, 1) for x in seen)


@pytest.fixture
def conv():
    layer = nn.Conv2d(128, 160, 3, padding=1).requires_grad_(False)
    convolution.install(layer)
    return layer


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of winograd."""
    seen, real = [], convolution.winograd
    monkeypatch.setattr(convolution, "winograd", lambda *args: seen.append(1) or real(*args))
    return seen


@pytest.mark.parametrize("b, height, width", [(1, 64, 64), (2, 132, 32), (1, 8, 516)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_winograd(conv, calls, b, height, width, layout):
    """In one strip of tiles and in several, in every place of the picture, and each picture as if it were alone."""
    x = F.silu(torch.randn(b, 128, height, width)).contiguous(memory_format=layout)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    y = conv(x)
    assert calls and (y - exact).abs().max() <= 5e-6 * exact.abs().max()
    assert torch.equal(y[-1:], conv(x[-1:]))


def test_winograd_keeps_nothing(conv, calls):
    """Weights may be replaced, copied and parametrised between calls."""
    x, other = torch.randn(1, 128, 64, 64), nn.Conv2d(128, 160, 3, padding=1).requires_grad_(False)
    y = conv(x)
    twin = copy.deepcopy(conv)
    conv.load_state_dict(other.state_dict())
    convolution.install(other)
    assert torch.equal(conv(x), other(x)) and torch.equal(twin(x), y)
    nn.utils.parametrize.register_parametrization(conv, "weight", nn.ReLU())
    other.weight.relu_()
    assert torch.equal(conv(x), other(x))
    assert len(calls) == 6 and set(twin.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("what", ["x", "weight", "bias", "grid", "few", "dtype", "compile"])
def test_winograd_is_left_out(conv, calls, what):
    """Where gradients are wanted, and where it cannot pay or would not be exact, the library's convolution runs."""
    x = torch.randn(1, 128, 66 if what == "grid" else 60 if what == "few" else 64, 64)
    if what == "dtype":
        conv, x = conv.bfloat16(), x.bfloat16()
    inputs = {"x": x, "weight": conv.weight, "bias": conv.bias}
    if what in inputs:
        inputs[what].requires_grad_()
    run = torch.compile(conv, backend="eager", fullgraph=True) if what == "compile" else conv
    y = run(x)
    assert not calls and torch.equal(y, F.conv2d(x, conv.weight, conv.bias, padding=1))
    assert y.requires_grad == (what in inputs)
    if what in inputs:
        with torch.no_grad():
            conv(x)
        assert calls


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
