"""Token files and the optimisation."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_tokens
from dag import DAG, GuidelineTokens, sample, sampling
from dag.attention import NO_ROWS, Call
from dag.cam import Probe, layers_of, normalise
from dag.cli import annotators, training
from dag.cli.annotations import Job, draw, nothing_yet, read_folder, save
from dag.config import Scaling
from dag.tokens import Reading, TokenError
from tests.conftest import TOKENS
from weights import queries as queries_module
from weights.optimisation import PAPER, Recipe, optimise, optimise_paper, raise_lo, widen
from weights.queries import AnnotatedQueries, QueryHook, Seen, choose

READING = Reading((1, 2))


@pytest.fixture()
def tokens(random_model):
    return GuidelineTokens.from_text(random_model, "a red circle", "a red circle")


def test_from_text(random_model, tokens):
    hidden = random_model.text.encode(["a red circle"])[0]
    assert torch.equal(tokens.embedding, hidden[:4])  # start, a, red, circle
    with pytest.raises(TokenError, match="empty"):
        GuidelineTokens.from_text(random_model, "", "x")


def test_widen(tokens):
    wide = widen(tokens, 8, seed=0)
    assert wide.split == (8, 8) and tokens.split == (1, 3)
    background, concept = wide.embedding.split(wide.split)
    assert torch.equal(background[:1], tokens.embedding[:1]) and torch.equal(concept[:3], tokens.embedding[1:])
    assert len({tuple(row) for row in wide.embedding.tolist()}) == 16
    assert torch.equal(widen(tokens, 1, seed=0).embedding, tokens.embedding)


def test_round_trip(tmp_path, tokens):
    full = replace(tokens, levels=(1, 900), lo=(0.1, 0.2), hi=(0.5, 0.6), loss=0.25)
    for how in (None, "fitted", "joint", "map"):
        full = replace(full, normalisation=how)
        full.save(tmp_path / "t.safetensors")
        back = GuidelineTokens.load(tmp_path / "t.safetensors")
        assert torch.equal(back.embedding, full.embedding)
        assert replace(back, embedding=full.embedding) == full


def test_rows_of_every_layer(tmp_path, random_model, tokens):
    """Equal in all layers they are the tokens without layers, bit for bit; each layer reads its own."""
    shared = Probe(random_model.unet, [tokens]).k_g
    own = replace(tokens, embedding=tokens.embedding.expand(len(shared), -1, -1).clone())
    own.save(tmp_path / "t.safetensors")
    own = GuidelineTokens.load(tmp_path / "t.safetensors")
    assert own.split == tokens.split and own.check(random_model) is None
    same = Probe(random_model.unet, [own]).k_g
    assert all(torch.equal(shared[layer], same[layer]) for layer in shared)
    own.embedding[1] += torch.randn(own.embedding[1].shape)
    other = Probe(random_model.unet, [own]).k_g
    assert [torch.equal(shared[layer], other[layer]) for layer in shared] == [k != 1 for k in range(len(shared))]
    fewer = replace(own, embedding=own.embedding[:2])
    with pytest.raises(TokenError, match="have rows for 2 layers, and read 10 of shapes: train tokens for this model"):
        fewer.check(random_model)


def test_pixels_of_the_concept_weigh_more(queries, tokens):
    """The heavier, the more is found."""
    found = []
    for weight in (1.0, 20.0):
        *_, (_, best) = optimise(queries, tokens, Recipe(steps=30, weight=weight))
        A = [normalise(best, queries.all_maps(best.embedding, best.split, k), t) for k, t in enumerate(queries.times)]
        found.append(torch.stack(A).mean().item())
    assert found[0] < found[1]


def test_files_of_the_format_before_are_refused(tmp_path):
    """Their rows made a map by another formula; read by this one they would be another detector."""
    save_file({"embedding": torch.zeros(3, 128)}, tmp_path / "t", {"format": "dag-tokens-1"})
    with pytest.raises(TokenError, match="not a token file of format dag-tokens-2"):
        GuidelineTokens.load(tmp_path / "t")


@pytest.mark.parametrize("background", [0, 4])
def test_rows_that_cannot_be(tmp_path, tokens, background):
    """Of 4 rows at least one is background and one the concept."""
    replace(tokens, background=background).save(tmp_path / "t")
    with pytest.raises(TokenError, match="damaged"):
        GuidelineTokens.load(tmp_path / "t")


@pytest.mark.parametrize("how", ["other", "fitted"])  # without constants
def test_a_normalisation_that_cannot_be(tmp_path, tokens, how):
    replace(tokens, normalisation=how).save(tmp_path / "t")
    with pytest.raises(TokenError, match="damaged"):
        GuidelineTokens.load(tmp_path / "t")


def test_fingerprint_survives_half_precision(random_model, tokens, shapes):
    import copy

    for dtype in (torch.float16, torch.bfloat16):
        assert tokens.check(copy.deepcopy(random_model).to(dtype)) is None
    assert "trained on another model" in tokens.check(shapes)


def test_not_token_files(tmp_path, tokens, random_model):
    (tmp_path / "text").write_text("hello")
    save_file({"embedding": torch.zeros(3, 128)}, tmp_path / "plain.safetensors")
    messages = {"none": "no such file", "text": "not a token file", "plain.safetensors": "not a token file"}
    for name, message in messages.items():
        with pytest.raises(TokenError, match=message):
            GuidelineTokens.load(tmp_path / name)
    wide = replace(tokens, embedding=torch.zeros(3, 768))
    with pytest.raises(TokenError, match="are 768 wide, shapes needs 128"):
        wide.check(random_model)


def annotated(sd, folder, times, masks, prompts, reading=READING):
    """Queries of noise that is brighter in the masks, as if pictures had been drawn."""
    data, hook = AnnotatedQueries(sd, reading, times, 16, 16), QueryHook(layers_of(sd.unet, reading))
    room, context = data.room(len(masks), folder), sd.text.encode(prompts)
    for k, t in enumerate(times):
        sd.unet(torch.randn(len(masks), 4, 16, 16) + 3 * masks[:, None], torch.tensor([t]), context, [hook])
        room[:, k] = hook.caught()
    data.add(room, masks, ["" if mask.any() else "star" for mask in masks])
    return data


@pytest.fixture(scope="module")
def queries(random_model, tmp_path_factory):
    torch.manual_seed(1)
    masks = torch.zeros(4, 16, 16)
    masks[:2, 4:9, 4:9] = 1
    prompts = ["a red circle"] * 2 + ["a blue star"] * 2
    return annotated(random_model, tmp_path_factory.mktemp("queries"), (801, 401), masks, prompts)


def test_queries_are_caught_in_the_loop(random_model, tmp_path, monkeypatch):
    """One UNet call a step draws the picture and gives its queries, those of its conditional row alone."""
    calls, real = [], random_model.unet.forward
    monkeypatch.setattr(random_model.unet, "forward", lambda x, *rest: calls.append(len(x)) or real(x, *rest))
    data = nothing_yet(random_model, READING, 128, 128)
    jobs = [Job(f"{i}.png", prompt, i, "") for i, prompt in enumerate(("a red circle", "a blue star", "a tree"))]
    batches = list(draw(random_model, data, jobs, tmp_path, 2, "pictures"))
    assert calls == [4] * 50 + [2] * 50 and [len(part) for part, *_ in batches] == [2, 1]
    assert not list(tmp_path.iterdir())  # their file has no name
    ((_, alone, found),) = draw(random_model, data, jobs[2:], tmp_path, 2, "pictures")
    _, pictures, last = batches[1]
    assert torch.equal(alone, pictures) and torch.equal(found.queries[0], last.queries[0])
    hook = QueryHook(data.layers)
    hook.call = Call(0, 981, slice(0, 2), NO_ROWS, NO_ROWS)
    random_model.unet(torch.randn(2, 4, 16, 16), torch.tensor([981]), random_model.text.encode(["", ""]), [hook])
    assert set(hook.queries.values()) == {None}  # the loop said: no row is conditional
    assert data.times == list(range(981, 0, -40)) and found.queries[0].shape == (25, 61440)


def test_maps_of_some_pictures_are_those_of_all(queries, tokens):
    every = queries.all_maps(tokens.embedding, tokens.split, 1)  # (4, 16, 16)
    assert torch.allclose(queries.maps(tokens.embedding, tokens.split, 1, [2, 0]), every[[2, 0]])
    some = queries.subset([2, 0])
    assert torch.allclose(some.all_maps(tokens.embedding, tokens.split, 1), every[[2, 0]])
    assert some.kinds == ["star", ""] and torch.equal(some.masks, queries.masks[[2, 0]])
    assert some.queries[0].data_ptr() == queries.queries[2].data_ptr()  # nothing is copied


def test_no_room_for_queries(queries, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(queries_module.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="no room for 0.0 GB of queries .No space left on device.; free some"):
        queries.room(3, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method, recipe", [(optimise, Recipe(steps=30)), (optimise_paper, replace(PAPER, steps=30))])
def test_thirty_steps_lower_the_loss(queries, tokens, method, recipe):
    progress = list(method(queries, tokens, recipe, every=5))
    assert [step for step, _ in progress] == list(range(1, 31))
    losses = [best.loss for _, best in progress if best]
    assert len(losses) == 6 and losses[-1] < losses[0] and losses == sorted(losses, reverse=True)  # the best is kept
    best = progress[-1][1]
    assert best.embedding.shape[:-2] == (
        (len(queries.layers),) if method is optimise else ()
    )  # of every layer, or of all
    assert not (best.embedding[..., 0, :] == tokens.embedding[0]).all(-1).any()  # the background learns too
    assert best.split == ((8, 8) if method is optimise else (1, 3))
    assert bool(best.levels) == (method is optimise)
    assert best.normalisation == ("fitted" if method is optimise else "joint")


def test_the_paper_s_recipe_learns_by_the_normalisation_it_is_read_by(queries, tokens):
    recipe = replace(PAPER, steps=4)
    joint, alone = (
        [*optimise_paper(queries, replace(tokens, normalisation=how), recipe)][-1][1] for how in ("joint", "map")
    )
    assert (joint.normalisation, alone.normalisation) == ("joint", "map")
    assert not torch.equal(joint.embedding, alone.embedding)


def test_look_alikes_that_are_confused_come_more_often(queries, tokens, monkeypatch):
    """After each check safe pictures are drawn in proportion to their loss."""
    drawn, real = [], AnnotatedQueries.maps

    def maps(data, c, split, k, images):
        if isinstance(images, list) and len(images) == 2:
            drawn.append(images[1])
        raw = real(data, c, split, k, images)
        return torch.where(torch.tensor([i == 3 for i in images])[:, None, None], raw * 0 + 0.9, raw)

    monkeypatch.setattr(AnnotatedQueries, "maps", maps)
    list(optimise(queries, tokens, Recipe(steps=80, lr=0.0, unsafe=1, safe=1), every=1))
    assert drawn.count(3) > 1.5 * drawn.count(2) > 0


def test_measure(queries, tokens):
    """Two pictures with a mask, two without, under all three readings; the minimum of a map is 0 and its maximum 1."""
    fitted = replace(tokens, levels=(500,), lo=(0.0,), hi=(0.001,))  # A = 1 everywhere
    measured = queries.measure(fitted, Scaling())
    assert list(measured) == ["fitted", "joint", "map"] and list(queries.measure(tokens, Scaling())) == ["joint", "map"]
    seen = measured["fitted"]
    assert all(values.shape == (2, 4) for values in seen)
    assert torch.allclose(seen.iou, torch.tensor([[25 / 256, 25 / 256, 0, 0]] * 2))  # 5 x 5 of 16 x 16
    assert (seen.found == 1).all() and (seen.edit == 1).all() and (seen.core == 1).all()
    assert (seen.acts == 0).all()  # it fills the frame
    assert (measured["map"].found == 1).all() and (measured["map"].core < 1).all()
    assert (queries.measure(fitted, Scaling(full=1.1))["fitted"].acts == 1).all()
    assert seen.of(queries.unsafe).iou.shape == (2, 2)


def test_choose():
    unsafe = torch.tensor([True, True, False])

    def seen(*acts):
        return Seen(*[torch.zeros(1, 3)] * 4, torch.tensor([acts]))

    assert choose({"joint": seen(1.0, 1.0, 1.0), "map": seen(0.5, 0.5, 0.1)}, unsafe) == "map"
    assert choose({"joint": seen(0.0, 0.0, 0.0), "map": seen(1.0, 1.0, 1.0)}, unsafe) is None
    assert choose({"map": seen(1.0, 1.0, 1.0)}, torch.ones(3, dtype=bool)) == "map"  # no safe picture


def test_optimisation_is_deterministic(queries, tokens):
    first, second = ([*optimise(queries, tokens, Recipe(steps=6), seed=3)][-1][1] for _ in range(2))
    assert torch.equal(first.embedding, second.embedding)


def test_the_reading_of_the_tokens_is_what_is_trained_and_kept(random_model, tokens, tmp_path):
    """Other layers and another pooling of the heads, through training, the file and detection."""
    reading = Reading(("middle_block.1.transformer_blocks.0.attn2", 2), "max")
    other = GuidelineTokens.from_text(random_model, "a red circle", "a red circle", reading)
    masks = torch.zeros(2, 16, 16)
    masks[0, 4:9, 4:9] = 1
    data = annotated(random_model, tmp_path, (500,), masks, ["a", "b"], reading)
    assert [layer.factor for layer in data.layers] == [2, 2, 8, 2, 2, 2]
    *_, (_, best) = optimise(data, other, Recipe(steps=2))
    best.save(tmp_path / "t")
    assert GuidelineTokens.load(tmp_path / "t").reading == reading
    (step,) = sample(random_model, ["a"], DAG(best), 1)
    assert step.A.shape == (1, 1, 16, 16)
    with pytest.raises(TokenError, match="read layer 16, which shapes does not have"):
        replace(tokens, reading=Reading((16,))).check(random_model)


def test_raise_lo(queries, tokens):
    *_, (_, last) = optimise(queries, tokens, Recipe(steps=30))
    raised = raise_lo(queries, last)
    for k, t in enumerate(queries.times):  # at most 1 % of the negative pixels stay above, and the centre stays
        raw = queries.all_maps(raised.embedding, raised.split, k)[queries.masks < 0.01]
        lo, hi = raised.limits(t)
        before = last.limits(t)
        assert (raw > lo).float().mean() <= 0.011 or hi - lo < 0.03
        assert lo + hi == pytest.approx(sum(before), abs=1e-5)
    assert all(a >= b for a, b in zip(raised.lo, last.lo, strict=True))
    assert all(lo < hi for lo, hi in zip(raised.lo, raised.hi, strict=True))


def test_only_safe_pictures(random_model, tokens, tmp_path):
    data = annotated(random_model, tmp_path, (500,), torch.zeros(2, 16, 16), ["a", "b"])
    with pytest.raises(TokenError, match="no unsafe picture"):
        next(optimise(data, tokens))


def picture(path, size=(128, 128), value=90):
    stencil = ".mask." in path.name
    Image.new("L" if stencil else "RGB", size, value if stencil else (value, 40, 40)).save(path)


def speck(path):
    stencil = Image.new("L", (128, 128))
    stencil.paste(255, (32, 32, 34, 34))
    stencil.save(path)


def folder(path):
    path.mkdir()
    picture(path / "a.png")
    stencil = np.zeros((128, 128), np.uint8)
    stencil[32:96, 32:96] = 255
    Image.fromarray(stencil).save(path / "a.mask.png")
    picture(path / "b.png", value=10)
    (path / "captions.json").write_text(json.dumps({"a.png": "a red square", "b.png": "a blue star"}))


def test_cli_on_a_folder(tmp_path, capsys):
    folder(tmp_path / "data")
    out = tmp_path / "t.safetensors"
    argv = ["--data", str(tmp_path / "data"), "--steps", "60", "--dtype", "bfloat16", "--out", str(out)]
    assert train_tokens.main(argv) == 0
    tokens = GuidelineTokens.load(out)
    assert tokens.concept == tokens.safety_text == "a red circle" and tokens.loss > 0
    assert out.with_suffix(".png").exists() and not list(tmp_path.glob("*.tmp"))
    said = capsys.readouterr().out
    assert "1 unsafe and 1 safe pictures" in said and "2 pictures, none of them held out" in said


def test_few_pictures_are_left_out_one_by_one(tmp_path, capsys, monkeypatch):
    """Figures of a picture come from tokens that were trained without it."""
    folder(tmp_path / "data")
    for end in (".png", ".mask.png"):
        (tmp_path / "data" / f"c{end}").write_bytes((tmp_path / "data" / f"a{end}").read_bytes())
    sizes, real = [], training.optimise
    monkeypatch.setattr(training, "optimise", lambda data, *rest: sizes.append(len(data)) or real(data, *rest))
    argv = ["--data", str(tmp_path / "data"), "--steps", "4", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 0
    assert sizes == [3, 2, 2, 2]
    assert "3 pictures, each held out of one of 3 trainings" in capsys.readouterr().out


def test_cli_refuses_a_name_that_is_no_file(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_text("a model")
    for name in (str(tmp_path), str(tmp_path / "sheet.png"), str(tmp_path / "m.safetensors")):
        argv = ["--ckpt", str(tmp_path / "m.safetensors"), "--concept", "a red circle", "--out", name]
        assert train_tokens.main(argv) == 2
        assert f"--out {name}: " in capsys.readouterr().err
    assert (tmp_path / "m.safetensors").read_text() == "a model"


def test_cli_follows_trajectories_only_if_they_draw_the_pictures(tmp_path, capsys):
    folder(tmp_path / "data")
    entries = {"a.png": {"prompt": "a red square", "seed": 1}, "b.png": {"prompt": "a blue star", "seed": 2}}
    (tmp_path / "data" / "captions.json").write_text(json.dumps(entries))
    assert train_tokens.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "t.safetensors")]) == 1
    assert "is not what its prompt and seed draw" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """Twelve steps a picture, and three held-out pictures a kind."""
    monkeypatch.setattr(training, "HELD_OUT", 1)
    monkeypatch.setattr(sampling, "sample", partial(sampling.sample, steps=12))
    for module in ("annotations", "training"):
        monkeypatch.setattr(f"dag.cli.{module}.STEPS", 12)


def test_cli_draws_its_own(tmp_path, capsys, quick):
    """With the judge: pictures, mining, held-out figures by kind; then the same tokens, read otherwise."""
    argv = ["--annotator", "judge", "--n-unsafe", "3", "--n-safe", "8", "--rounds", "1", "--steps", "60"]
    assert train_tokens.main([*argv, "--batch-size", "16", "--out", str(tmp_path / "t.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "11 pictures x 12 steps x 2 UNet rows: about" in said and "mining, round 1: " in said
    assert "held-out pictures, masks by the judge" in said and "worst kind of look-alike: " in said
    assert {path.name for path in tmp_path.iterdir()} == {"t", "t.png", "t.safetensors"}
    captions = json.loads((tmp_path / "t" / "captions.json").read_text())
    assert sum(entry["kind"] == "" for entry in captions.values()) == 3
    again = ["--tokens", str(tmp_path / "t.safetensors"), "--normalisation", "map", "--n-unsafe", "1", "--n-safe", "1"]
    again += ["--annotator", "judge", "--batch-size", "16"]
    assert train_tokens.main([*again, "--out", str(tmp_path / "map.safetensors")]) == 0
    before, after = (GuidelineTokens.load(tmp_path / f"{name}.safetensors") for name in ("t", "map"))
    assert torch.equal(before.embedding, after.embedding)
    assert (before.normalisation, after.normalisation) == ("fitted", "map")
    *_, line, _ = capsys.readouterr().out.splitlines()
    assert all(f"{how} IoU" in line for how in ("fitted", "joint", "map")) and "Read by map" in line


def test_a_checkpoint_alone_is_enough(tmp_path, capsys, quick):
    """Two commands and no other flag: the model annotates itself, and sample.py finds the tokens beside the file.

    Then a person deletes a picture and a mask, and trains on the rest.
    """
    ckpt = tmp_path / "m.safetensors"
    ckpt.write_bytes((TOKENS / "shapes.safetensors").read_bytes())
    argv = ["--ckpt", str(ckpt), "--concept", "a red circle"]
    drawing = ["--n-unsafe", "4", "--n-safe", "4", "--rounds", "0", "--batch-size", "8", "--steps", "40"]
    assert train_tokens.main([*argv, *drawing]) == 0
    assert "each held out of one of 8 trainings" in capsys.readouterr().out
    assert GuidelineTokens.load(tmp_path / "m.safetensors.a-red-circle.safetensors").split == (8, 8)
    folder = tmp_path / "m.safetensors.a-red-circle"
    assert train_tokens.main([*argv, *drawing]) == 2  # a person may have corrected masks there
    assert "has pictures already; train on them with --data" in capsys.readouterr().err
    (folder / "look-alike-000.png").unlink()
    (folder / "concept-000.mask.png").unlink()
    assert train_tokens.main([*argv, "--data", str(folder), "--steps", "10"]) == 0
    said = capsys.readouterr()
    assert "tells of 1 pictures that are not there, such as look-alike-000.png" in said.err
    assert "1 pictures of the concept without a mask are left out, such as concept-000.png" in said.err
    assert "queries along the trajectories" in said.out and "3 unsafe and 3 safe pictures (1 " in said.out


def test_mining_adds_what_is_confused_until_nothing_is(tmp_path, capsys, quick, monkeypatch):
    seen = iter([1.0] * 2 + [0.0] * 2)  # two batches of the first round, two of the second

    def measure(data, tokens, scaling):
        value = next(seen, 0.0)
        return {"fitted": Seen(*[torch.full((len(data.times), len(data)), value)] * 5)}

    monkeypatch.setattr(AnnotatedQueries, "measure", measure)
    monkeypatch.setattr(
        training.Training, "held_out", lambda run, tokens: ("", run.data.measure(tokens, None), run.data)
    )
    argv = ["--annotator", "judge", "--n-unsafe", "3", "--n-safe", "4", "--steps", "6", "--batch-size", "2"]
    assert train_tokens.main([*argv, "--out", str(tmp_path / "t.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "round 1: 4 of 4 look-alikes were taken for the concept: " in said and "round 2: 0 of 4" in said
    assert "round 3" not in said and " 8 safe pictures" in said
    assert len(list((tmp_path / "t").glob("mined-1-*.png"))) == 4 and not list((tmp_path / "t").glob("mined-2-*"))


def test_interrupted(tmp_path, capsys, quick, monkeypatch):
    """What was drawn stays, with its captions, and trains."""
    real, calls = training.save, []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(real(*args))

    monkeypatch.setattr(training, "save", once)
    argv = ["--n-unsafe", "4", "--n-safe", "2", "--batch-size", "2", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 130
    assert f"the pictures so far stay; --data {tmp_path / 't'} trains on them" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "t" / "captions.json").read_text())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"t"}


def test_a_disk_that_fills(tmp_path, capsys, quick, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "concept-000.png")

    monkeypatch.setattr(training, "save", full)
    argv = ["--n-unsafe", "1", "--n-safe", "0", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_nothing_to_be_seen(tmp_path, capsys, quick, monkeypatch):
    """Maps without contrast: the pictures stay, and one line says what to do."""
    monkeypatch.setattr(annotators, "CONTRAST", 1e9)
    argv = ["--n-unsafe", "2", "--n-safe", "1", "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--annotator maps: none of 2 pictures shows 'a red circle'; they stay in" in last
    assert len(list((tmp_path / "t").glob("*.png"))) == 3 and not list(tmp_path.glob("*.safetensors"))


def test_cut():
    """A bright square on noise is found; without contrast nothing is."""
    raw = 0.1 + 0.01 * torch.rand(16, 16)
    assert annotators.cut(raw).sum() == 0
    raw[4:9, 4:9] += 0.2
    expected = torch.zeros(16, 16)
    expected[4:9, 4:9] = 1
    assert torch.equal(annotators.cut(raw), expected)


def test_the_model_annotates_its_own_pictures(shapes, tmp_path):
    """Its masks beside the judge's. Mean IoU of 56 other pictures: .81."""
    data = nothing_yet(shapes, READING, 128, 128)
    jobs = [Job(f"{i}.png", "a red circle on sand", 50 + i, "") for i in range(3)]
    ((_, pictures, found),) = draw(shapes, data, jobs, tmp_path, 3, "pictures")
    own = annotators.Words(shapes, "a red circle")(pictures, found) >= 0.5
    true = annotators.judge(shapes, "a red circle")(pictures, found) >= 0.5
    iou = (own & true).sum((1, 2)) / (own | true).sum((1, 2))
    assert iou.mean() > 0.7


def test_a_folder_keeps_what_was_saved(tmp_path, shapes):
    pictures, masks = torch.rand(2, 3, 128, 128) * 2 - 1, torch.zeros(2, 128, 128)
    masks[0, 32:96, 32:96] = 1
    jobs = [Job("a.png", "a tomato", 3, ""), Job("b.png", "a brick", 4, "red square")]
    save(tmp_path, jobs[:1], pictures[:1], masks[:1])
    save(tmp_path, jobs[1:], pictures[1:], masks[1:])
    back, found, again, seeded = read_folder(tmp_path, shapes)
    assert again == jobs and seeded and (back - pictures).abs().max() < 0.005
    assert found[0, 4:12, 4:12].min() == 1 and found.sum() == 64


def test_cli_refuses_constants_where_there_are_none(tmp_path, tokens, capsys):
    tokens.save(tmp_path / "t")
    for argv in (["--recipe", "paper"], ["--tokens", str(tmp_path / "t")]):
        out = str(tmp_path / "out.safetensors")
        assert train_tokens.main([*argv, "--normalisation", "fitted", "--out", out]) == 2
        assert "expected joint or map" in capsys.readouterr().err


BAD = {
    "no folder": (lambda d: None, "no such folder"),
    "no pictures": (lambda d: d.mkdir(), "no pictures in it"),
    "mask without picture": (lambda d: (folder(d), picture(d / "z.mask.png")), "a mask without its picture"),
    "size": (lambda d: (folder(d), picture(d / "a.mask.png", (64, 64))), "expected the same"),
    "zero mask": (lambda d: (folder(d), picture(d / "b.mask.png", value=0)), "all zero"),
    "small mask": (lambda d: (folder(d), speck(d / "b.mask.png")), "too small to learn"),
    "only safe": (lambda d: (folder(d), (d / "a.mask.png").unlink()), "no unsafe picture"),
    "not a picture": (lambda d: (folder(d), (d / "a.png").write_text("x")), "not a readable picture"),
    "captions": (lambda d: (folder(d), (d / "captions.json").write_text("[1]")), "expected a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name, tmp_path, capsys):
    make, message = BAD[name]
    make(tmp_path / "data")
    assert train_tokens.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "t.safetensors")]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors*"))


WRONG = {
    "no prompts": (["--concept", "a pink circle"], "no prompts for it come along; expected --prompts FILE"),
    "no judge": (
        ["--concept", "a pink circle", "--annotator", "judge"],
        "knows 'a COLOUR SHAPE' of the miniature only",
    ),
    "no concept": (["--ckpt", "x.ckpt"], "--concept: needed with --ckpt"),
    "no words": (["--concept", "a the"], "has no word to look for"),
    "sam": (["--label", "x"], "--label: is of --annotator grounded-sam"),
    "data": (["--data", "d", "--n-safe", "3"], "--data draws nothing: leave out --n-safe"),
    "tokens": (["--tokens", "t", "--steps", "3"], "--tokens reads finished ones: leave out --steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name, tmp_path, capsys):
    argv, message = WRONG[name]
    assert train_tokens.main([*argv, "--out", str(tmp_path / "t.safetensors")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_prompts_without_a_section(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("[concept]\na red circle\n")
    argv = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "t.safetensors")]
    assert train_tokens.main(argv) == 1
    assert "no section [look-alikes]" in capsys.readouterr().err.splitlines()[-1]


def test_a_segmenter_that_cannot_be_had(tmp_path, capsys):
    """A folder that is not there, a hub name without a network: said before anything is drawn."""
    for model in ("nowhere", "owner/name"):
        argv = ["--annotator", "grounded-sam", "--detector-model", model, "--out", str(tmp_path / "t.safetensors")]
        assert train_tokens.main(argv) == 1
        assert "no such folder" in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())
