"""Parity with diffusers, open_clip and torch on random small weights. Needs the `parity` extra; skipped without it.

The rows are those of `python -m tests.measure.parity`.
"""

import math

import pytest
import torch

from dag import ddim
from dag.config import SD14, SHAPES
from weights.known import TEXT, UNET, VAE
from weights.overlay import diffusers_name

pytest.importorskip("diffusers")
from tests import references  # noqa: E402
from tests.files import original, write_ckpt  # noqa: E402
from tests.measure import bench, parity  # noqa: E402


@pytest.fixture(scope="module")
def case() -> parity.Case:
    return parity.tiny()


@pytest.fixture(scope="module", params=["sd21", "sd21-v"])
def case21(request) -> parity.Case:
    return parity.tiny(request.param)


@torch.no_grad()
def too_far(case: parity.Case, *groups) -> list[str]:
    rows = [row for group in groups for row in group(case)]
    assert rows
    return [row.what for row in rows if not row.error <= row.limit]


@pytest.mark.parametrize("group", parity.GROUPS, ids=lambda group: group.__name__)
def test_rows(case, group):
    assert too_far(case, group) == []


@pytest.mark.parametrize("group", (parity.unet, parity.unet_blocks, parity.text, parity.steps, parity.latents))
def test_rows_of_sd21(case21, group):
    assert too_far(case21, group) == []


def test_epsilons_are_seen(case, monkeypatch):
    """The classic near misses make the rows fail: the VAE's and the transformer's epsilon, and the VAE's padding."""
    vae, unet = case.sd.vae, case.sd.unet
    monkeypatch.setattr(vae.decoder.mid.block_1.norm1, "eps", 1e-5)
    monkeypatch.setattr(vae.decoder.mid.attn_1.norm, "eps", 1e-5)
    assert {"VAE: ResnetBlock", "VAE: AttnBlock"} <= set(too_far(case, parity.vae_blocks))
    monkeypatch.setattr(unet.input_blocks[1][1].norm, "eps", 1e-5)
    monkeypatch.setattr(unet.input_blocks[1][0].in_layers[0], "eps", 1e-6)
    assert {"UNet: SpatialTransformer, level 0", "UNet: ResBlock"} <= set(too_far(case, parity.unet_blocks))
    monkeypatch.setattr(vae.encoder.down[0].downsample, "forward", lambda x: x[..., ::2, ::2])
    assert "VAE: Downsample (pads right and bottom)" in too_far(case, parity.vae_blocks)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 50, 100, 200, 250, 500])
def test_times_where_steps_divide(steps):
    theirs = references.scheduler(SD14, steps).timesteps.tolist()
    assert [t for t, _ in ddim.time_pairs(steps, SD14.schedule)] == theirs


def test_names_of_the_unet():
    """weights/overlay.py's renaming is diffusers' own: the same tensor under each name."""
    sd = references.random_model(SHAPES)
    theirs = references.diffusers_unet(sd).state_dict()
    ours = {diffusers_name(name, SHAPES.unet.num_res_blocks): x for name, x in sd.unet.state_dict().items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_bench_measures(tmp_path, capsys):
    """The measuring itself, on the miniature, where the figures mean nothing: every row comes, and both can draw."""
    bench.main(["--tiny", "--only", "networks", "--rounds", "1"])
    out = capsys.readouterr().out
    assert all(f"| {what}" in out for what in ("UNet step", "VAE decode", "maps of one concept"))
    path = tmp_path / "random.ckpt"
    write_ckpt(path, original(SHAPES), lightning=False)
    references.config_folder(SHAPES, tmp_path / "configs")
    sizes = {name: math.prod(e.shape) for name, e in original(SHAPES).items() if name.startswith((UNET, VAE, TEXT))}
    parameters = sum(sizes.values()) - sizes[TEXT + "embeddings.position_ids"]
    for whose in ("ours", "theirs"):
        found = bench.alone(whose, str(path), "float32", draw=True)
        assert found["weights"] == 4 * parameters and found["peak"] > 0 and found["draw s"] > 0
