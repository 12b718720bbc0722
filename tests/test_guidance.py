"""Maps, scalers and guidance: against explicit arithmetic, hand-worked grids, and the invariants that make it safe."""

from dataclasses import replace

import pytest
import torch

from dag import DAG, SEGA, SLD, Guidance, GuidelineTokens, Negative, ddim, sample
from dag.attention import NO_ROWS, Call, Hook, split_heads
from dag.cam import Probe, guideline_keys, guideline_maps, normalise
from dag.config import DAGConfig, Scaling
from dag.evaluation.baselines import by_name
from dag.guidance import Estimate, Inputs, remember
from dag.scalers import area_scaler, components, magnitude_scaler, nearest, objects, scale_map, strength
from dag.tokens import Reading
from tests.measure.lazy import Eager

PROMPTS = ["a red circle on grey", "a blue star", "a tomato", ""]
EAGER = Scaling(min_area=0.0)


@pytest.fixture(scope="module")
def tokens(random_model):
    """Tokens with limits set so that two of the four PROMPTS' pictures, and only they, show an object."""
    tokens = GuidelineTokens.from_text(random_model, "a red circle", "a red circle")
    raw = replace(tokens, levels=(500,), lo=(0.0,), hi=(1.0,))  # A is the raw map
    looking = run(random_model, DAG(raw, cfg=DAGConfig(warmup=99)))
    peaks = torch.stack([s.A.flatten(1).amax(1) for s in looking]).amax(0)  # (b,)
    middle = peaks.sort().values[1:3].mean().item()
    return replace(tokens, levels=(500,), lo=(middle - 0.01,), hi=(middle + 0.01,))


def grid(*rows: str) -> torch.Tensor:
    """'#' is 1, '+' is 0.05, '.' is 0."""
    return torch.tensor([[{"#": 1.0, "+": 0.05, ".": 0.0}[c] for c in row] for row in rows])


@pytest.mark.parametrize("split", [(1, 1), (2, 3), (2, 3, 2, 3), (1, 3, 4, 2, 1, 1), (2, 3, 3, 2)])
def test_maps_are_the_attention_to_a_concept_among_its_own_rows(split):
    """Whatever others there are; a row of either is OVAM's softmax of two."""
    b, h, n, d = 2, 3, 5, 8
    q, k_g = torch.randn(b, h, n, d), torch.randn(h, sum(split), d)
    own = k_g.split([sum(rows) for rows in zip(split[::2], split[1::2], strict=True)], 1)
    for heads, pool in (("mean", torch.mean), ("max", torch.amax)):
        maps = guideline_maps(q, k_g, split, heads)
        assert maps.shape == (b, len(own), n)
        for k, keys in enumerate(own):
            e = torch.einsum("bhnd,hgd->bhng", q, keys).exp()
            share = e[..., split[2 * k] :].sum(-1) / e.sum(-1)
            assert torch.allclose(maps[:, k], pool(share, 1), atol=1e-6)
    pair = torch.einsum("bhnd,hgd->bhng", q, k_g[:, :2])
    assert torch.allclose(guideline_maps(q, k_g[:, :2], [1, 1])[:, 0], pair.softmax(-1)[..., 1].mean(1), atol=1e-6)


def test_maps_of_large_logits_are_finite():
    """One concept's may be far above another's, and far from 0."""
    q, k_g = torch.ones(1, 1, 1, 1), torch.tensor([[[1000.0], [1001.0], [-1000.0], [-1001.0]]])
    expected = torch.sigmoid(torch.tensor([1.0, -1.0]))
    assert torch.allclose(guideline_maps(q, k_g, [1, 1, 1, 1])[0, :, 0], expected)


def test_probe_reads_the_conditional_rows_and_changes_nothing(random_model, tokens):
    sd = random_model
    x, t = torch.randn(4, 4, 16, 24), torch.full((4,), 500)
    context = sd.text.encode(["", "", "a red circle", "a blue star"])
    raw = replace(tokens, levels=(500,), lo=(0.0,), hi=(1.0,))  # A is the raw map
    probe = Probe(sd.unet, [raw])
    probe.call = Call(0, 500, slice(0, 2), slice(2, 4), NO_ROWS)
    assert torch.equal(sd.unet(x, t, context, [probe]), sd.unet(x, t, context))
    A = probe.read(500, 16, 24)
    assert A.shape == (2, 1, 16, 24) and (A > 0).all() and (A < 1).all()
    alone = Probe(sd.unet, [raw])
    sd.unet(x[2:], t[2:], context[2:], [alone])
    assert torch.allclose(A, alone.read(500, 16, 24), atol=1e-5)


def test_probe_looks_at_the_layers_of_its_reading(random_model, tokens):
    probe = Probe(random_model.unet, [replace(tokens, reading=Reading((2, 4)))])
    assert sorted(layer.factor for layer in probe.k_g) == [2] * 5 + [4] * 5
    layer = next(iter(probe.k_g))
    assert torch.equal(probe.k_g[layer], guideline_keys(layer, tokens.embedding))
    k = split_heads(layer.to_k(tokens.embedding)[None], layer.num_heads)[0]  # (h, g, d)
    assert torch.allclose(probe.k_g[layer], (k - k.mean(1, keepdim=True)) / k.shape[-1] ** 0.5, atol=1e-6)
    name = "output_blocks.3.1.transformer_blocks.0.attn2"
    (one,) = Probe(random_model.unet, [replace(tokens, reading=Reading((name,)))]).k_g
    assert one.name == name and random_model.unet.get_submodule(name) is one


def test_heads_are_pooled_as_the_tokens_say(random_model, tokens):
    sd, x, t = random_model, torch.randn(1, 4, 16, 16), torch.tensor([500])
    raw = replace(tokens, levels=(500,), lo=(0.0,), hi=(1.0,))
    mean, largest = Probe(sd.unet, [raw]), Probe(sd.unet, [replace(raw, reading=Reading((1, 2), "max"))])
    sd.unet(x, t, sd.text.encode(["a"]), [mean, largest])
    assert (largest.read(500, 16, 16) > mean.read(500, 16, 16)).all()


def test_normalisation(random_model, tokens):
    raw = torch.tensor([[[0.4, 0.45, 0.525, 0.6, 0.9]]])
    tokens = replace(tokens, lo=(0.45,), hi=(0.6,))
    assert torch.allclose(normalise(tokens, raw, 7), torch.tensor([[[0.0, 0.0, 0.5, 1.0, 1.0]]]))
    levels = replace(tokens, levels=(0, 100), lo=(0.0, 0.2), hi=(1.0, 0.6))
    assert levels.limits(50) == pytest.approx((0.1, 0.8)) and levels.limits(900) == pytest.approx((0.2, 0.6))
    for joint in (replace(tokens, levels=(), lo=(), hi=()), replace(tokens, normalisation="joint")):
        A = normalise(joint, torch.tensor([[[0.2, 0.5, 0.7]], [[0.5, 0.5, 0.5]], [[0.4, 0.5, 0.9]]]), 7)
        assert torch.allclose(A[0], torch.tensor([[0.0, 0.5, 5 / 6]]))  # min-max of {.2 .5 .7} and {.8 .5 .3}
        assert torch.allclose(A[2], torch.tensor([[3 / 8, 0.5, 1.0]]))  # of {.4 .5 .9} and {.6 .5 .1}
        assert A.isfinite().all()
    alone = replace(tokens, normalisation="map")
    A = normalise(alone, torch.tensor([[[0.2, 0.5, 0.7]], [[0.01, 0.03, 0.05]], [[0.5, 0.5, 0.5]]]), 7)
    expected = torch.tensor([[[0.0, 0.6, 1.0]], [[0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0]]])  # each picture for itself
    assert torch.allclose(A, expected)


def test_components_join_diagonally_and_count():
    labels = components(grid("#..#", ".#..", "...#") >= 0.5)
    assert labels[0, 0] == labels[1, 1]
    assert len({labels[0, 0].item(), labels[0, 3].item(), labels[2, 3].item()}) == 3
    assert (components(torch.zeros(3, 3, dtype=torch.bool)) == 0).all()


def test_components_of_a_spiral():
    spiral = grid("#######", "......#", "#####.#", "#...#.#", "#.###.#", "#.....#", "#######") >= 0.5
    assert components(spiral).unique().tolist() == [0, 49]


def test_nothing_found():
    assert (strength(torch.full((8, 8), 0.49), Scaling(full=1.1)) == 0).all()
    assert (strength(torch.zeros(8, 8), Scaling()) == 0).all()


def test_one_pixel():
    S = strength(grid("....", ".#..", "....", "...."), EAGER)
    assert S[1, 1] == pytest.approx(5 / 16 * 5) and S.count_nonzero() == 1


def test_one_pixel_may_be_too_small():
    assert (strength(grid("....", ".#..", "....", "...."), Scaling(min_area=0.1)) == 0).all()
    labels, areas = objects(grid("##..", "##..", "...#", "...."), Scaling(min_area=0.1))
    assert areas.unique().tolist() == [0, 0.25] and torch.equal(areas > 0, labels > 0)


def test_full_frame_is_not_guided():
    assert (strength(torch.ones(4, 4), EAGER) == 0).all()
    assert (strength(grid("####", "####", "####", "...."), EAGER) > 0).any()  # 75 %


def test_two_objects_keep_their_own_area():
    S = area_scaler(grid("##...#", "##....", "......"), EAGER)
    assert S[0, 0] == pytest.approx(5 * 4 / 18) and S[0, 5] == pytest.approx(5 / 18)


def test_edit_pixels_take_the_nearest_object_only_if_connected():
    A = grid("##+++#", "##....", "......", "+....+")
    S = area_scaler(A, EAGER)
    large, small = 5 * 4 / 24, 5 / 24
    assert S[0].tolist() == pytest.approx([large] * 4 + [small] * 2)  # column 3 is a tie: the larger
    assert S[3].tolist() == [0] * 6  # specks that touch no object


def test_nearest_breaks_ties_by_the_larger():
    values = torch.tensor([[1.0, 0.0, 3.0]])
    assert nearest(values, values > 0).tolist() == [[1, 3, 3]]


def test_maps_side_by_side_are_as_alone():
    """Any maps at once, by the definitions: flood fill, and the nearest object by comparing with every pixel of one."""
    maps = torch.stack([torch.rand(9, 12).pow(3) for _ in range(40)])
    maps[::2] = maps[::2].where(maps[::2] > 0.4, 0.05)  # a rim everywhere
    cfg = Scaling(full=1.1, min_area=2 / 108)
    S, (labels, areas) = area_scaler(maps.reshape(5, 8, 9, 12), cfg).reshape(40, 9, 12), objects(maps, cfg)
    for A, own, label, area in zip(maps, S, labels, areas, strict=True):
        assert torch.equal(own, area_scaler(A, cfg))
        pieces = [piece for piece in flooded(A >= cfg.unsafe) if len(piece) > 1]
        sizes = {pixel: len(piece) for piece in pieces for pixel in piece}
        assert {tuple(p): round(area[tuple(p)].item() * 108) for p in label.nonzero().tolist()} == sizes
        expected = torch.zeros(9, 12)
        for region in flooded(A >= cfg.edit):
            for y, x in region if sizes.keys() & region else ():
                near = min((v - y) ** 2 + (u - x) ** 2 for v, u in sizes)
                best = max(n for (v, u), n in sizes.items() if (v - y) ** 2 + (u - x) ** 2 == near)
                expected[y, x] = 5 * best / 108
        assert torch.allclose(own, expected)


def flooded(mask: torch.Tensor) -> list[set[tuple[int, int]]]:
    """The components of a mask as sets of pixels."""
    left, found = {tuple(p) for p in mask.nonzero().tolist()}, []
    while left:
        found.append(set())
        edge = {left.pop()}
        while edge:
            found[-1] |= edge
            edge = {(y + v, x + u) for y, x in edge for v in (-1, 0, 1) for u in (-1, 0, 1)} & left
            left -= edge
    return found


def test_magnitude():
    T = magnitude_scaler(torch.tensor([0.0, 0.009, 0.01, 0.03, 0.05, 1.0]), Scaling())
    assert torch.allclose(T, torch.tensor([0.0, 0.0, 1.0, 3.0, 5.0, 5.0]))


def test_ablations():
    A = grid("##..#+", "##..++")
    assert torch.equal(strength(A, Scaling(area_gain=None)), magnitude_scaler(A, Scaling()))
    flat = Scaling(magnitude=1.0, min_area=0.0)
    assert torch.equal(strength(A, flat), area_scaler(A, flat))


def test_s_max():
    assert strength(grid("##", ".."), Scaling(s_max=2.0, min_area=0.0)).max() == 2.0


def run(sd, guidance, prompts=PROMPTS, steps=8, **kwargs):
    return list(sample(sd, prompts, guidance, steps, 5.0, seeds=list(range(len(prompts))), **kwargs))


def test_all_zero_maps_are_plain_guidance_bit_for_bit(random_model, tokens):
    blind = replace(tokens, lo=(2.0,), hi=(3.0,))
    plain, guided = run(random_model, Guidance()), run(random_model, DAG(blind))
    for a, b in zip(plain, guided, strict=True):
        assert torch.equal(a.x, b.x) and not b.guided.any() and (b.S == 0).all() and (b.unet_rows == 2).all()


def test_lazy_branch(random_model, tokens):
    """A mixed batch: undetected images are bit for bit plain guidance, detected ones pay one row a step and change."""
    cfg = DAGConfig(warmup=2)
    plain, steps = run(random_model, Guidance()), run(random_model, DAG(tokens, cfg=cfg))
    guided = torch.stack([s.guided for s in steps])  # (steps, b)
    assert not guided[:2].any()
    ever = guided.any(0)
    assert ever.any() and not ever.all(), "the fixture must find something in some pictures only"
    for k in range(len(PROMPTS)):
        assert torch.equal(steps[-1].x[k], plain[-1].x[k]) == (not ever[k])
    rows = torch.stack([s.unet_rows for s in steps])
    assert torch.equal(rows, 2 + guided.long())


@pytest.mark.parametrize("base", ["sega", "sld", "none"])
def test_lazy_equals_eager(random_model, tokens, base):
    """Against the formula written out with the safety branch run for every image, as the paper has it."""
    sd, cfg, s_g = random_model, DAGConfig(warmup=1), 5.0
    steps = run(sd, DAG(tokens, base=base, cfg=cfg))
    probe = Probe(sd.unet, [tokens])
    probe.call = Call(0, 0, slice(0, 4), slice(4, 8), slice(8, 12))
    context = sd.text.encode([""] * 4 + PROMPTS + ["a red circle"] * 4)
    x = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(4)])
    for i, step in enumerate(steps):
        eps_0, eps_p, eps_s = sd.unet(torch.cat([x, x, x]), torch.full((12,), step.t), context, [probe]).chunk(3)
        S = scale_map(probe.read(step.t, 16, 16), [cfg.scaling]) * (i >= cfg.warmup)  # (4, 1, 16, 16)
        d = eps_s - eps_0
        M = torch.ones_like(d)
        if base == "sega":
            M = (d.abs() >= torch.quantile(d.abs().flatten(2), 0.9, dim=2)[..., None, None]).float()
        if base == "sld":
            M = (eps_p - eps_s < 0.025).float()
        eps = eps_0 + s_g * ((eps_p - eps_0) - S * M * d)
        abar, prev = sd.alphas_cumprod[step.t], sd.alphas_cumprod[steps[i + 1].t if i + 1 < len(steps) else 0]
        x = prev.sqrt() * (x - (1 - abar).sqrt() * eps) / abar.sqrt() + (1 - prev).sqrt() * eps
        assert (x - step.x).abs().max() <= 1e-5 * max(1.0, x.abs().max().item())
        x = step.x
    assert any(s.guided.any() for s in steps)


def test_the_lazy_branch_is_the_eager_one(random_model, tokens):
    """For one image bit for bit; in a mixed batch, where the branch runs on fewer rows, up to float noise."""
    cfg = DAGConfig(warmup=2)
    lazy, eager = (run(random_model, method(tokens, cfg=cfg)) for method in (DAG, Eager))
    ever = torch.stack([s.guided for s in lazy]).any(0)
    assert ever.any() and not ever.all()
    scale = lazy[-1].x.abs().max()
    assert (lazy[-1].x - eager[-1].x).abs().max() <= 1e-5 * scale
    k = int(ever.nonzero()[0, 0])
    alone = [list(sample(random_model, [PROMPTS[k]], method(tokens, cfg=cfg), 8, 5.0, [k])) for method in (DAG, Eager)]
    assert any(s.guided.any() for s in alone[0])
    for a, b in zip(*alone, strict=True):
        assert torch.equal(a.x, b.x)
    assert {int(s.unet_rows) for s in alone[1]} == {3} and {int(s.unet_rows) for s in alone[0]} == {2, 3}


def test_memory(random_model, tokens):
    """S comes from the running maximum of A, fading by `memory` a step; what was never found stays plain guidance."""
    plain = run(random_model, Guidance())
    for memory in (1.0, 0.5):
        cfg = DAGConfig(warmup=2, memory=memory)
        steps, seen = run(random_model, DAG(tokens, cfg=cfg)), torch.zeros(())
        for s in steps:
            formed = (s.A >= 0.01).float().mean((2, 3)) < 0.8
            both = torch.maximum(s.A * formed[..., None, None], memory * seen)
            found = objects(both, cfg.scaling)[0].flatten(2).any(2)  # (b, concepts)
            seen = torch.where(found[..., None, None], both, memory * seen)
            assert torch.equal(s.A_acted, seen)
            assert torch.equal(s.S, scale_map(seen, [cfg.scaling])[:, 0])
        ever = torch.stack([s.guided for s in steps]).any(0)
        assert ever.any() and not ever.all()
        for k in range(len(PROMPTS)):
            assert torch.equal(steps[-1].x[k], plain[-1].x[k]) == (not ever[k])


def test_a_map_in_which_nothing_is_found_is_not_remembered():
    """One that fills the frame (Algorithm 1) or has specks only; it must not hide or grow what is seen otherwise."""
    small = Scaling(min_area=3 / 18)
    cfg, A = DAGConfig(memory=0.9, scaling=small), grid("##....", "##....", "......")
    full, speck = torch.full_like(A, 0.3), grid("......", ".....#", ".....#")

    def after(*maps):
        acted = torch.zeros(())
        for own in maps:
            acted = remember(own[None, None], acted, cfg, [small])
        return acted[0, 0]

    assert torch.equal(after(full, speck, full), 0 * A)
    assert torch.equal(after(speck, grid("....##", "......", "......")), 0 * A)  # together they would be an object
    assert torch.equal(after(full, A), A) and torch.allclose(after(A, full), 0.9 * A)
    assert torch.allclose(after(A, speck), torch.maximum(0.9 * A, speck))  # what shrinks stays
    assert (strength(after(A, full), small) > 0).any()
    two = torch.stack([A, speck])[None]  # (1, 2, H, W), each concept by its own smallest area
    assert torch.equal(remember(two, torch.zeros(()), cfg, [small, small])[0], torch.stack([A, 0 * A]))
    assert torch.equal(remember(two, torch.zeros(()), cfg, [small, Scaling()])[0], torch.stack([A, speck]))
    without = DAGConfig(scaling=Scaling(area_gain=None))  # no Algorithm 1, no such rule
    assert torch.equal(remember(two, torch.zeros(()), without, [small, small]), two)


def test_same_start_with_any_guidance(random_model, tokens):
    a = next(iter(sample(random_model, ["a"], Guidance(), 5, 5.0, [3])))
    b = next(iter(sample(random_model, ["a"], DAG(tokens), 5, 5.0, [3])))
    assert torch.equal(a.x, b.x)  # the first step is inside the warm-up


def test_scale_zero_and_one(random_model):
    """s_g 0 is the unconditional estimate, s_g 1 the conditional one."""
    eps_0, eps_p = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    def eps(s_g: float) -> torch.Tensor:
        return Guidance()(Inputs(0, 1, eps_0, s_g, eps_0, eps_p, None, None, torch.tensor(0.5), None, None)).eps

    assert torch.equal(eps(0.0), eps_0) and torch.allclose(eps(1.0), eps_p, atol=1e-6)


def test_negative_prompt(random_model):
    """The safety text takes the empty prompt's row and costs nothing."""
    negative = run(random_model, Negative("a red circle"))
    context = random_model.text.encode(["a red circle"] * 4 + PROMPTS)
    x = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(4)])
    eps_n, eps_p = random_model.unet(torch.cat([x, x]), torch.full((8,), negative[0].t), context).chunk(2)
    eps = eps_n + 5.0 * (eps_p - eps_n)
    abar, prev = random_model.alphas_cumprod[negative[0].t], random_model.alphas_cumprod[negative[1].t]
    x = prev.sqrt() * (x - (1 - abar).sqrt() * eps) / abar.sqrt() + (1 - prev).sqrt() * eps
    assert (x - negative[0].x).abs().max() <= 1e-5 * x.abs().max()
    assert all((s.unet_rows == 2).all() and s.guided.all() for s in negative)


@pytest.mark.parametrize("method", [SLD.preset("strong", "a red circle"), SEGA("a red circle", warmup=7)])
def test_rivals_pay_for_every_image_and_start_after_warm_up(random_model, method):
    plain, other = run(random_model, Guidance()), run(random_model, method)
    assert all((s.unet_rows == 3).all() and s.A is None for s in other)
    for a, b in zip(plain[:7], other[:7], strict=True):
        assert torch.equal(a.x, b.x) and not b.guided.any()
    assert other[7].guided.all() and not torch.equal(plain[7].x, other[7].x)
    again = run(random_model, method)  # no momentum is left from the last run
    assert torch.equal(again[-1].x, other[-1].x)


def test_wrong_arguments(tokens, random_model):
    with pytest.raises(ValueError, match="mask base is 'foo'"):
        DAG(tokens, base="foo")
    for method in (
        lambda **k: DAG(tokens, cfg=DAGConfig(**k)),
        lambda **k: SLD("a", **k),
        lambda **k: SEGA("a", **k),
    ):
        with pytest.raises(ValueError, match="warm-up is -1 steps"):
            method(warmup=-1)
    with pytest.raises(ValueError, match="top is 1.5, expected 0 to 1"):
        DAG(tokens, cfg=DAGConfig(top=1.5))
    for method in (SLD, SEGA, lambda _, threshold: DAG(tokens, cfg=DAGConfig(threshold=threshold))):
        for threshold in (2.0, -0.1, float("nan")):
            with pytest.raises(ValueError, match=f"threshold is {threshold}, expected 0 to 1"):
                method("a", threshold=threshold)
    for name in ("s_max", "magnitude", "area_gain"):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is {value}, expected a number from 1e-6"):
                DAG(tokens, cfg=DAGConfig(scaling=Scaling(**{name: value})))
    with pytest.raises(ValueError, match="edit is 0"):
        DAG(tokens, cfg=DAGConfig(scaling=Scaling(edit=0.0)))
    with pytest.raises(ValueError, match="height and width are 70 and 128, expected multiples of 64"):
        next(iter(sample(random_model, ["a"], Guidance(), height=70)))
    wide = replace(tokens, embedding=torch.zeros(3, 768))
    with pytest.raises(ValueError, match="are 768 wide"):
        next(iter(sample(random_model, ["a"], DAG(wide))))
    with pytest.raises(ValueError, match="no preset 'mild', expected one of weak, medium, strong, max"):
        SLD.preset("mild", "a")
    with pytest.raises(ValueError, match="unknown method 'mild'"):
        by_name("mild", ["a"], [tokens])
    with pytest.raises(ValueError, match="no safety text"):
        SEGA()
    with pytest.raises(ValueError, match="no guideline tokens"):
        DAG()
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        next(iter(sample(random_model, ["a"], Guidance(), seeds=[1, 2])))


def test_not_finite(random_model):
    """NaN in an estimate stops at its step and says what to try."""

    class Broken(Guidance):
        def __call__(self, step):
            return Estimate(step.cfg_eps * float("nan") if step.i == 2 else step.cfg_eps)

    with pytest.raises(ArithmeticError, match="after step 3 .*float32"):
        list(sample(random_model, ["a"], Broken(), 4))


def test_several_concepts(random_model, tokens):
    """A second concept that sees nothing, or the very same, changes nothing and costs nothing."""
    cfg = DAGConfig(warmup=2)
    blind = replace(tokens, lo=(2.0,), hi=(3.0,), concept="other")
    same = replace(tokens, concept="other")
    one = run(random_model, DAG(tokens, cfg=cfg))
    for other in (blind, same):
        two = run(random_model, DAG(tokens, other, cfg=cfg))
        for a, b in zip(one, two, strict=True):
            assert torch.allclose(a.x, b.x, atol=1e-5)
            assert torch.allclose(a.A, b.A.amax(1, keepdim=True), atol=1e-3)
            assert torch.equal(b.unet_rows, a.unet_rows)


def test_two_live_concepts(random_model):
    """Different maps, texts and places, both found: at every pixel the one with the larger S acts, written out."""
    sd, s_g, cfg = random_model, 5.0, DAGConfig(warmup=0, scaling=Scaling(min_area=0.0, full=1.1, s_max=1.5))
    concepts = []
    for text, safety in (("a red circle", "a red circle"), ("a green star", "a blue star")):
        c = GuidelineTokens.from_text(sd, text, safety)
        middle = next(iter(run(sd, DAG(replace(c, levels=(500,), lo=(0.0,), hi=(1.0,)))))).A.median().item()
        concepts.append(replace(c, levels=(500,), lo=(middle - 0.002,), hi=(middle + 0.002,)))
    step = next(iter(run(sd, DAG(*concepts, cfg=cfg, base="none"))))
    probe = Probe(sd.unet, concepts)
    probe.call = Call(0, step.t, slice(0, 4), slice(4, 8), NO_ROWS)
    context = sd.text.encode([""] * 4 + PROMPTS + ["a red circle"] * 4 + ["a blue star"] * 4).split([8, 4, 4])
    x = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(4)])
    t = torch.full((4,), step.t)
    # In batches of the loop's sizes: hi - lo is .004, so that A shows the float noise of another batch 250 times.
    eps_0, eps_p = sd.unet(torch.cat([x, x]), torch.cat([t, t]), context[0], [probe]).chunk(2)
    eps_s = [sd.unet(x, t, c) for c in context[1:]]
    A = probe.read(step.t, 16, 16)  # (4, 2, 16, 16)
    assert torch.equal(A, step.A)
    S, A = scale_map(A, [cfg.scaling] * 2).unbind(1), A.unbind(1)  # (4, 16, 16) each
    first = (S[0] > S[1]) | ((S[0] == S[1]) & (A[0] >= A[1]))
    both = (S[0] > 0) & (S[1] > 0)
    assert (first & both).any() and (~first & both).any() and (S[0] != S[1])[both].any() and (S[0] == S[1])[both].any()
    push = torch.where(first[:, None], S[0][:, None] * (eps_s[0] - eps_0), S[1][:, None] * (eps_s[1] - eps_0))
    eps = eps_0 + s_g * (eps_p - eps_0 - push)
    abar, prev = sd.alphas_cumprod[step.t], sd.alphas_cumprod[step.t - 125]
    x = prev.sqrt() * (x - (1 - abar).sqrt() * eps) / abar.sqrt() + (1 - prev).sqrt() * eps
    assert (x - step.x).abs().max() <= 1e-5 * x.abs().max()
    assert torch.equal(step.S, torch.maximum(*S))
    acts = [((S[k] > 0) & wins).flatten(1).any(1).long() for k, wins in enumerate((first, ~first))]
    assert torch.equal(step.unet_rows, 2 + acts[0] + acts[1])  # each pays for its own estimate, where it acts at all


def test_tokens_that_do_not_go_together(tokens):
    odd = replace(tokens, concept="other", reading=Reading((4,)))
    same = replace(tokens, concept="other")
    foreign = replace(same, fingerprint="0" * 16)
    with pytest.raises(ValueError, match="several token files of 'a red circle'"):
        DAG(same, tokens, tokens)
    with pytest.raises(ValueError, match="different readings"):
        DAG(tokens, odd)
    with pytest.raises(ValueError, match="2 token files that were trained on different models"):
        DAG(tokens, foreign)


def test_one_method_serves_two_loops_at_once(random_model, tokens):
    """Momentum and memory live in the loop's own copy: interleaved steps are those of two loops one after the other."""
    for method in (DAG(tokens, cfg=DAGConfig(warmup=1, memory=0.9)), SLD.preset("max", "a red circle"), SEGA("a star")):
        jobs = [(PROMPTS[:2], [0, 1]), (PROMPTS[2:], [2, 3])]
        apart = [list(sample(random_model, prompts, method, 5, 5.0, seeds)) for prompts, seeds in jobs]
        loops = [sample(random_model, prompts, method, 5, 5.0, seeds) for prompts, seeds in jobs]
        together = list(zip(*loops, strict=True))
        for one, two in zip(apart, zip(*together, strict=True), strict=True):
            assert all(torch.equal(a.x, b.x) for a, b in zip(one, two, strict=True))


def test_hooks_combine_and_know_their_rows(random_model, tokens):
    """Every UNet call is announced, the safety call too; a recorder beside DAG changes nothing."""

    class Recorder(Hook):
        def __init__(self):
            self.calls = []

        def attention(self, layer, q, k, v):
            if layer.name == "middle_block.1.transformer_blocks.0.attn2":
                self.calls.append((self.call, len(q)))

    recorder, method = Recorder(), DAG(tokens, cfg=DAGConfig(warmup=2))
    alone = run(random_model, method)
    steps = run(random_model, method, hooks=[recorder])
    assert all(torch.equal(a.x, b.x) for a, b in zip(alone, steps, strict=True))
    main = [call for call, rows in recorder.calls if call.concept is None and rows == 8]
    assert [(c.i, c.t, c.uncond, c.cond) for c in main] == [(s.i, s.t, slice(0, 4), slice(4, 8)) for s in steps]
    safety = [(call, rows) for call, rows in recorder.calls if call.concept == 0]
    assert len(safety) == sum(bool(s.guided.any()) for s in steps) > 0
    for call, rows in safety:
        assert call.images == tuple(steps[call.i].guided.nonzero()[:, 0].tolist()) and call.safety == slice(0, rows)


def test_hooks_take_the_place_and_edit(random_model):
    """The first answer stands; outputs go from hook to hook."""
    sd, x, t = random_model, torch.randn(1, 4, 16, 16), torch.tensor([5])
    context = sd.text.encode(["a"])

    class Zero(Hook):
        def attention(self, layer, q, k, v):
            return torch.zeros_like(q)

    class Unread(Zero):
        def attention(self, layer, q, k, v):
            return torch.full_like(q, torch.nan)

    class Silent(Hook):
        def output(self, layer, out):
            return out - layer.to_out[0].bias

    class Double(Hook):
        def output(self, layer, out):
            return 2 * out

    first, last = (sd.unet(x, t, context, hooks) for hooks in ([Zero()], [Zero(), Unread()]))
    assert torch.equal(first, last) and not torch.equal(first, sd.unet(x, t, context))
    a, b = (sd.unet(x, t, context, [Zero(), Silent(), *more]) for more in ([], [Double()]))
    assert torch.equal(a, b)  # twice nothing is nothing


def test_a_run_ends_however_it_ends(random_model):
    ended = []

    class Noted(Guidance):
        def end(self):
            ended.append(self)

    method = Noted()
    run(random_model, method, steps=2)
    loop = sample(random_model, ["a"], method, 5)
    next(loop)
    loop.close()
    assert len(ended) == 2 and method not in ended


def test_heun_looks_ahead_on_a_copy(random_model, tokens):
    """A solver that asks for the guided estimate twice per step pays for it; the method's memory moves on once."""

    def heun(alphas_cumprod):
        def step(x, eps, t, t_prev, denoise):
            ahead, _ = ddim.step(x, eps, alphas_cumprod[t], alphas_cumprod[t_prev])
            eps = (eps + denoise(ahead, t_prev)) / 2
            return ddim.step(x, eps, alphas_cumprod[t], alphas_cumprod[t_prev])

        return step

    cfg = DAGConfig(warmup=0, memory=0.5)
    steps, seen = run(random_model, DAG(tokens, cfg=cfg), solver=heun), torch.zeros(())
    for s in steps:
        seen = remember(s.A, seen, cfg, [cfg.scaling])
        assert torch.equal(s.A_acted, seen) and (s.unet_rows >= 4).all()
    assert any((s.unet_rows > 4).any() for s in steps)


def test_times_and_scaler_may_be_given(random_model, tokens):
    times = [(900, 500), (500, 100), (100, 0)]
    assert [s.t for s in sample(random_model, ["a"], Guidance(), times=times)] == [900, 500, 100]
    flat = DAG(tokens, cfg=DAGConfig(warmup=0), scaler=lambda A, scalings: 0.25 * (A >= 0.5))
    assert {s.S.max().item() for s in run(random_model, flat)} == {0.0, 0.25}
