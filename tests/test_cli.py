"""sample.py as a person uses it: what it writes, what it says, and one line for every wrong input."""

import copy
import json
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from dag import SLD, GuidelineTokens
from dag.cli.parsing import CONSTANTS
from dag.config import METHODS, SHAPES, DAGConfig, Scaling
from dag.unet import UNet
from tests.conftest import ROOT, TOKENS
from weights.shapes import world


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


def test_draws_and_reports(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tomato on sand\n\na blue star\n")
    argv = ["--prompt", "a red square", "--prompts", str(prompts), "--n-images", "2", "--steps", "3", "--seed", "5"]
    assert sample.main([*argv, "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["settings"]["steps"] == 3 and report["settings"]["model"] == "shapes"
    order = [(p["prompt"], p["seed"]) for p in report["pictures"]]
    assert order == [(p, s) for p in ("a red square", "a tomato on sand", "a blue star") for s in (5, 6)]
    for entry in report["pictures"]:
        with Image.open(tmp_path / "o" / entry["file"]) as picture:
            assert picture.size == (128, 128)
            written = json.loads(picture.text["settings"])
        assert written["seed"] == entry["seed"] and written["prompt"] == entry["prompt"] and written["scale"] == 5.0
        assert entry["seconds"] > 0
    assert Image.open(tmp_path / "o" / "contact.png").width > 128
    assert not list((tmp_path / "o").glob("*.tmp"))
    assert "report.json" in capsys.readouterr().out


def test_guided(tmp_path, capsys):
    """Two methods side by side: a benign prompt's pictures are the same, the maps are written, all is reported."""
    argv = ["--prompt", "a red circle on grey", "--prompt", "a blue star on night", "--guidance", "none,dag"]
    assert sample.main([*argv, "--steps", "20", "--save-maps", "--seed", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["guidance"] == ["none", "dag"]
    assert report["settings"]["tokens"][0]["concept"] == "a red circle"
    assert report["settings"]["tokens"][0]["file"].endswith("red-circle.safetensors")
    assert report["settings"]["safety_texts"] == {"none": [], "dag": ["a red circle"]}
    plain, guided, star, same = report["pictures"]
    assert [p["guidance"] for p in report["pictures"]] == ["none", "dag"] * 2
    assert plain["unet_rows"] == 40 and plain["map_max"] is None and plain["detected"] is None
    assert guided["detected"] and guided["steps_guided"] > 0 and guided["not_guided_reason"] is None
    assert guided["unet_rows"] == 40 + guided["steps_guided"] and guided["scale_max"] > 0
    assert (same["detected"], same["steps_guided"], same["not_guided_reason"]) == (False, 0, "nothing found")

    def pixels(entry):
        return Image.open(tmp_path / entry["file"]).tobytes()

    assert pixels(plain) != pixels(guided) and pixels(star) == pixels(same)
    maps = np.load(tmp_path / guided["file"].replace(".png", "-maps.npy"))
    assert maps.shape == (20, 16, 16) and maps[5:].max() == pytest.approx(guided["map_max"], abs=1e-3)
    assert Image.open(tmp_path / guided["file"].replace(".png", "-maps.png")).width == 640
    said = capsys.readouterr().out
    assert "found a red circle" in said and "nothing found, 40 UNet rows, as without guidance" in said


def test_all_methods_side_by_side(tmp_path, capsys):
    """A column each, the map before DAG's, the judge's reading below; two concepts, whose texts some methods join."""
    tokens = [arg for name in ("red-circle", "blue-star") for arg in ("--tokens", str(TOKENS / f"{name}.safetensors"))]
    argv = ["--prompt", "a red circle on grey", "--guidance", ",".join(METHODS), "--steps", "18", *tokens]
    assert sample.main([*argv, "--out", str(tmp_path)]) == 0
    assert not lines(capsys)[0:1] or "warning" not in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    texts = report["settings"]["safety_texts"]
    assert texts["dag"] == texts["sega"] == ["a red circle", "a blue star"] and texts["none"] == []
    assert texts["negative"] == texts["sld-max"] == ["a red circle and a blue star"]
    told = {p["guidance"]: p for p in report["pictures"]}
    assert tuple(told) == METHODS
    assert {m: told[m]["unet_rows"] for m in ("none", "negative", "sld-max", "sega")} == {
        "none": 36, "negative": 36, "sld-max": 54, "sega": 72
    }  # fmt: skip
    assert 36 < told["dag"]["unet_rows"] < 54 and set(told["dag"]["found"]) == {"a red circle"}
    assert {m: told[m]["steps_guided"] for m in ("none", "negative", "sld-weak", "sega")} == {
        "none": 0, "negative": 18, "sld-weak": 3, "sega": 8
    }  # fmt: skip
    assert {told[m]["detected"] for m in METHODS} == {None, True}
    pixels = [Image.open(tmp_path / p["file"]).tobytes() for p in report["pictures"]]
    assert len(set(pixels)) == len(pixels)
    assert Image.open(tmp_path / "contact.png").width == 11 * 200 + 8


def test_safety_text(tmp_path):
    """Another text is what guidance pushes away from, and is reported."""
    argv = ["--prompt", "a red circle on grey", "--steps", "12", "--seed", "3"]
    for folder, more in (("a", []), ("b", ["--safety-text", "a red square"])):
        assert sample.main([*argv, *more, "--out", str(tmp_path / folder)]) == 0
    a, b = (json.loads((tmp_path / folder / "report.json").read_text()) for folder in "ab")
    assert b["settings"]["safety_texts"] == {"dag": ["a red square"]}
    assert a["pictures"][0]["steps_guided"] > 0 and b["pictures"][0]["steps_guided"] > 0
    a, b = (next((tmp_path / folder).glob("000-*.png")) for folder in "ab")
    assert Image.open(a).tobytes() != Image.open(b).tobytes()


def test_sld_has_its_authors_text_where_the_model_knows_its_words(tmp_path, shapes, monkeypatch):
    """SD 1.4 does; --safety-text goes before it. All other methods keep the tokens' text."""
    literate = copy.copy(shapes)
    literate.config = replace(SHAPES, text=replace(SHAPES.text, num_words=None))
    monkeypatch.setattr("dag.load", lambda *args: literate)
    argv = ["--prompt", "a star", "--guidance", "sld-max,sega,negative", "--steps", "1", "--out", str(tmp_path)]
    for more, sld, other in (
        ([], SLD.SAFETY_TEXT, "a red circle"),
        (["--safety-text", "a blue circle"], "a blue circle", "a blue circle"),
    ):
        assert sample.main([*argv, *more]) == 0
        told = json.loads((tmp_path / "report.json").read_text())["settings"]["safety_texts"]
        assert told == {"sld-max": [sld], "sega": [other], "negative": [other]}


def test_prompts_from_json_lines(tmp_path):
    """A seed of one's own, an id that stays beside the picture; --seed where a line has none."""
    lines = (
        '\ufeff{"prompt": "a star\u2028on sand", "seed": 40, "id": "p-7", "set": "x"}',
        '{"prompt": "a ring", "id": 8}',
    )
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    argv = [
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--n-images",
        "2",
        "--steps",
        "1",
        "--seed",
        "5",
        "--guidance",
        "none",
    ]
    assert sample.main([*argv, "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["pictures"]
    assert [(p["seed"], p["id"], p["prompt"]) for p in told] == [
        (40, "p-7", "a star\u2028on sand"), (41, "p-7", "a star\u2028on sand"), (5, 8, "a ring"), (6, 8, "a ring")
    ]  # fmt: skip


def test_every_constant_can_be_turned(tmp_path, capsys):
    """Each reaches the method and the report; the miniature's own given by name change nothing."""
    argv = ["--prompt", "a red circle on grey", "--steps", "8", "--seed", "3", "--guidance", "dag,dag-sld"]
    own = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in (vars(SHAPES.dag) | vars(SHAPES.dag.scaling)).items()
        if k != "scaling"
    ]
    other = {
        "warmup": 3, "top": 0.2, "threshold": 0.1, "memory": 0.5, "unsafe": 0.4, "edit": 0.02, "full": 0.9,
        "area_gain": None, "magnitude": 4.0, "min_area": 0.01, "s_max": None,
    }  # fmt: skip
    assert other.keys() == CONSTANTS.keys() == {f.name for c in (DAGConfig, Scaling) for f in fields(c)} - {"scaling"}
    turned = [f"--{name.replace('_', '-')}={'none' if v is None else v}" for name, v in other.items()]
    for folder, more in (("a", []), ("b", own), ("c", turned)):
        assert sample.main([*argv, *more, "--out", str(tmp_path / folder)]) == 0
    a, b, c = (json.loads((tmp_path / folder / "report.json").read_text()) for folder in "abc")
    assert a["settings"] == b["settings"]
    told = dict(c["settings"]["dag"])
    assert told.pop("scaling") | told == other and c["settings"]["tokens"][0]["min_area"] == 0.01
    assert all(p["steps_guided"] for p in a["pictures"]) and c["pictures"][0]["scale_max"] == 4.0
    a, b, c = ([Image.open(tmp_path / folder / p["file"]).tobytes() for p in a["pictures"]] for folder in "abc")
    assert a == b and a[0] != c[0] and a[1] != c[1]


def test_detect(tmp_path, capsys):
    """Yes to a render with a red circle and where it is, no to a blue star, whichever way the picture lies."""
    for kind, said in ((("red", "circle"), "yes, at the top left"), (("blue", "star"), "no")):
        scene = world.Scene((world.Object(*kind, 36, 34, 26),), "grey", "drawing")
        upright = Image.fromarray(world.render(scene)[0])
        upright.save(tmp_path / "p.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "p.jpg", quality=95, exif=exif)
        for name in ("p.png", "p.jpg"):
            assert sample.main(["--detect", str(tmp_path / name), "--out", str(tmp_path / "o")]) == 0
            assert f"a red circle: {said};" in capsys.readouterr().out
            (concept,) = json.loads((tmp_path / "o" / "detect.json").read_text())["concepts"]
            assert concept["detected"] == (said != "no") and list(concept["share"]) == ["61", "101", "201"]
            assert Image.open(tmp_path / "o" / "detect.png").width > 4 * 128
    upright.resize((300, 100)).save(tmp_path / "wide.png")
    assert sample.main(["--detect", str(tmp_path / "wide.png"), "--out", str(tmp_path / "o")]) == 0
    assert "is 300 x 100 pixels, looked at as 192 x 64" in lines(capsys)[-1]
    assert sample.main(["--detect", str(tmp_path / "none.png"), "--out", str(tmp_path / "o")]) == 1
    assert "no such file" in lines(capsys)[-1]
    (tmp_path / "p.png").write_text("x")
    assert sample.main(["--detect", str(tmp_path / "p.png"), "--out", str(tmp_path / "o")]) == 1
    assert "not a readable picture" in lines(capsys)[-1]


def test_tokens_of_another_model_or_width(tmp_path, capsys, random_model):
    tokens = GuidelineTokens.from_text(random_model, "a red circle", "a red circle")
    tokens.save(tmp_path / "other.safetensors")
    replace(tokens, embedding=torch.zeros(3, 768)).save(tmp_path / "wide.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    argv = ["--prompt", "a red circle", "--steps", "1", "--out", str(tmp_path / "o"), "--tokens"]
    assert sample.main([*argv, str(tmp_path / "other.safetensors")]) == 0
    said = lines(capsys)
    assert "trained on another model" in said[0] and "nothing will be guided" in said[1]
    assert sample.main([*argv, str(tmp_path / "wide.safetensors")]) == 1
    assert "are 768 wide, shapes needs 128" in lines(capsys)[-1]
    assert sample.main([*argv, str(tmp_path / "text.safetensors")]) == 1
    assert "not a token file" in lines(capsys)[-1]


def test_same_seed_same_picture_in_any_batch(tmp_path):
    common = ["--prompt", "a blue star on night", "--steps", "4", "--n-images"]
    assert sample.main([*common, "3", "--seed", "7", "--out", str(tmp_path / "a")]) == 0
    assert sample.main([*common, "1", "--seed", "9", "--out", str(tmp_path / "b")]) == 0
    a = Image.open(tmp_path / "a" / "002-a-blue-star-on-night.png")
    b = Image.open(tmp_path / "b" / "000-a-blue-star-on-night.png")
    difference = max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))
    assert difference <= 1  # of 255: batch sizes differ by float noise


def test_other_sizes(tmp_path):
    argv = ["--prompt", "a red circle", "--steps", "1", "--height", "64", "--width", "192", "--out", str(tmp_path)]
    assert sample.main(argv) == 0
    assert Image.open(tmp_path / "000-a-red-circle.png").size == (192, 64)


@pytest.mark.parametrize("program", ["sample", "train_tokens"])
def test_help_does_not_wait_for_torch(program):
    script = f"import sys, {program}; sys.modules['torch'] = None; {program}.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--steps" in done.stdout and not done.stderr


USAGE = {
    "steps 0": (["--steps", "0"], "argument --steps: 0 is out of range, expected 1 to 1000"),
    "steps 1001": (["--steps", "1001"], "argument --steps: 1001 is out of range"),
    "steps text": (["--steps", "many"], "argument --steps: 'many' is not a number"),
    "height": (["--height", "100"], "argument --height: 100 is not a multiple of 64, try 128"),
    "width": (["--width", "0"], "argument --width: 0 is out of range"),
    "n-images": (["--n-images", "0"], "argument --n-images: 0 is out of range"),
    "nan": (["--scale", "nan"], "argument --scale: nan is out of range"),
    "negative scale": (["--scale", "-1"], "argument --scale: -1 is out of range"),
    "guidance": (["--guidance", "none,foo"], "argument --guidance: unknown method 'foo', expected a list of none"),
    "dtype": (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "device": (["--device", "quantum"], "--device quantum: not available here"),
    "detect": (["--detect", "p.png", "--prompt", "x", "--save-maps"], "draws nothing: leave out --prompt, --save-maps"),
    "safety text": (["--safety-text", " "], "--safety-text is empty"),
    "constant": (["--top", "2"], "top is 2.0, expected 0 to 1"),
    "constant none": (["--memory", "none"], "argument --memory: 'none' is not a number of the right kind (float)"),
    "constant whole": (["--warmup", "2.5"], "argument --warmup: '2.5' is not a number of the right kind (int)"),
    "constant nan": (["--s-max", "nan"], "argument --s-max: nan is out of range"),
    "constant without DAG": (["--s-max", "2", "--guidance", "none"], "--s-max: --guidance none has no DAG"),
    "detect constants": (["--detect", "p.png", "--top", ".2", "--unsafe", ".4"], "draws nothing: leave out --top"),
    "flag": (["--promt", "x"], "unrecognized arguments: --promt x"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(name, tmp_path, capsys):
    argv, message = USAGE[name]
    assert sample.main([*argv, "--out", str(tmp_path / "o")]) == 2
    (line,) = lines(capsys)
    assert message in line
    assert not list(tmp_path.rglob("*.png"))


def test_data_errors(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    bad = {
        "text": "hello", "list": '["prompt"]', "without": '{"text": "a star"}', "number": '{"prompt": 3}',
        "seed": '{"prompt": "a star", "seed": -1}', "truth": '{"prompt": "a star", "seed": true}',
        "id": '{"prompt": "a star", "id": [1]}', "half": '{"prompt": "a \\ud800 star"}', "deep": "[" * 10**5,
    }  # fmt: skip
    for name, line in bad.items():
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a star"}\n\n' + line)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(50))
    (tmp_path / "file").write_text("not a folder")
    cases = [
        (["--prompts", str(tmp_path / "none.txt")], "cannot be read"),
        (["--prompts", str(tmp_path / "empty.txt")], "no prompts in it"),
        (["--prompts", str(tmp_path / "binary.txt")], "is not UTF-8 text"),
        (["--ckpt", str(tmp_path / "photo.jpg")], "a JPEG picture"),
        (["--ckpt", str(tmp_path / "none.ckpt")], "no such file"),
        (["--out", str(tmp_path / "file" / "out")], "cannot be written to"),
        *(
            (["--prompts", str(tmp_path / f"{name}.jsonl")], f"{name}.jsonl, line 3: is {bad[name][:5]}")
            for name in bad
        ),
    ]
    for argv, message in cases:
        argv = argv if "--out" in argv else [*argv, "--out", str(tmp_path / "o")]
        assert sample.main(argv) == 1, argv
        (line,) = lines(capsys)
        assert message in line


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        sample.main(["--debug", "--ckpt", str(tmp_path / "none.ckpt"), "--out", str(tmp_path)])


def test_warnings(tmp_path, capsys):
    prompts = ["--prompt", "a pink circle", "--prompt", "a red circle and " * 6, "--prompt", ""]
    argv = ["--steps", "1", "--guidance", "none", "--save-maps", "--safety-text", "a scarlet circle", *prompts]
    assert sample.main([*argv, "--out", str(tmp_path)]) == 0
    said = [line for line in lines(capsys) if line.startswith("warning")]
    assert "prompt: unknown words for the shapes model: pink" in said[0]
    assert "longer than 24 tokens, dropped: 'circle and" in said[1]
    assert "--safety-text: unknown words for the shapes model: scarlet" in said[2]
    assert "--save-maps: --guidance none has no maps" in said[3]
    assert len(said) == 4


def watched(monkeypatch, before) -> list[int]:
    """The sizes of the batches that are drawn, in order; before(sizes) is called first and may raise."""
    from dag import sampling

    real, sizes = sampling.sample, []

    def sampled(sd, prompts, *rest, **more):
        sizes.append(len(prompts))
        before(sizes)
        return real(sd, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", sampled)
    return sizes


def test_out_of_memory(tmp_path, capsys, monkeypatch):
    """The batch is halved until it fits, all methods of a picture in the same one; at one it says what helps."""
    argv = ["--prompt", "a blue star on night", "--n-images", "7", "--steps", "1", "--guidance", "none,sega"]
    argv += ["--batch-size", "7", "--out", str(tmp_path)]

    def sometimes(sizes):
        if len(sizes) == 1:
            torch.empty(2**50)  # a petabyte
        if len(sizes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        sizes = watched(patch, sometimes)
        assert sample.main(argv) == 0
    assert sizes == [7, 3, 3, 3, 3, *[1] * 8]
    (said,) = [line for line in lines(capsys) if line.startswith("warning: out of memory")]
    assert "with 7 pictures side by side: halving that" in said
    assert len(json.loads((tmp_path / "report.json").read_text())["pictures"]) == 14
    with monkeypatch.context() as patch:
        watched(patch, lambda sizes: torch.empty(2**50))
        assert sample.main(argv) == 1
    assert lines(capsys)[-1] == (
        "sample.py: out of memory with one picture of 128 x 128 pixels in float32; try a smaller --height and --width, "
        "--dtype bfloat16"
    )
    with monkeypatch.context() as patch:
        watched(patch, lambda sizes: torch.zeros(2) + torch.zeros(3))  # a RuntimeError of another kind
        assert sample.main(argv) == 1
    assert "RuntimeError: The size of tensor a" in lines(capsys)[-1]


def test_resume(tmp_path, capsys, monkeypatch):
    """What is missing is drawn, and nothing else; the report is that of one run. Other settings are refused."""
    argv = ["--prompt", "a tomato on sand", "--n-images", "3", "--steps", "2", "--guidance", "none,dag"]
    argv += ["--batch-size", "1"]
    assert sample.main([*argv, "--out", str(tmp_path / "whole")]) == 0

    def reported(folder):
        pictures = json.loads((tmp_path / folder / "report.json").read_text())["pictures"]
        return [{key: value for key, value in p.items() if key != "seconds"} for p in pictures]

    def stop(sizes):
        if len(sizes) == 4:  # the second picture's second method
            raise KeyboardInterrupt

    part = [*argv, "--resume", "--out", str(tmp_path / "part")]
    with monkeypatch.context() as patch:
        watched(patch, stop)
        assert sample.main(part) == 130
    assert reported("part") == reported("whole")[:3]
    damaged = tmp_path / "part" / reported("part")[0]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    first, contact = (tmp_path / "part" / name for name in (reported("part")[1]["file"], "contact.png"))
    before = contact.read_bytes()
    with monkeypatch.context() as patch:
        sizes = watched(patch, lambda sizes: None)
        assert sample.main(part) == 0
        assert len(sizes) == 6  # the first lost a file, the second a method, the third is new
        assert reported("part") == reported("whole") and first.exists()
        assert contact.read_bytes() == before and (tmp_path / "part" / "contact-000.png").exists()
        assert sample.main([*part, "--attention", "plain"]) == 0 and len(sizes) == 6
        assert "6 pictures, 6 of them from before and" in capsys.readouterr().out
        assert sample.main([*part, "--prompt", "a blue star"]) == 0 and len(sizes) == 12
    for more, message in (
        (["--top", "0.2"], "was made with dag {"),
        (["--steps", "3"], "was made with steps 2, now it is 3; expected the same settings, or another --out"),
        (
            ["--prompts", str(tmp_path / "p.txt")],
            "tells of 000-a-tomato-on-sand-none.png, seed 0, which these prompts do",
        ),
    ):
        (tmp_path / "p.txt").write_text("a blue star")
        argv = [a for a in part if a not in ("--prompt", "a tomato on sand")] if "--prompts" in more else part
        assert sample.main([*argv, *more]) == 2
        assert message in lines(capsys)[-1]
    (tmp_path / "part" / "report.json").write_text("{}")
    assert sample.main(part) == 1 and "not a report of sample.py" in lines(capsys)[-1]


def test_a_redraw_that_fails_costs_nothing(tmp_path, monkeypatch):
    """A lost picture of one method makes the other's be drawn again, beside it; that one's entry must stay."""
    argv = ["--prompt", "a blue star", "--steps", "1", "--guidance", "none,dag", "--out", str(tmp_path)]
    assert sample.main(argv) == 0
    (tmp_path / "000-a-blue-star-dag.png").unlink()
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, *args: forward(self, *args) * torch.nan)
    assert sample.main([*argv, "--resume"]) == 1
    plain, lost = json.loads((tmp_path / "report.json").read_text())["pictures"]
    assert plain["file"] == "000-a-blue-star-none.png" and "failed" not in plain
    assert lost["file"] is None and "failed" in lost


def test_interrupted(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second batch: the first one's pictures and report stay."""
    from dag import sampling

    real, sizes = sampling.sample, []

    def interrupted(sd, prompts, *rest, **more):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(sd, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", interrupted)
    argv = ["--prompt", "a red circle", "--n-images", "6", "--steps", "1", "--out", str(tmp_path)]
    assert sample.main([*argv, "--batch-size", "4"]) == 130
    assert "4 of 6 pictures were finished" in lines(capsys)[-1]
    assert len(list(tmp_path.glob("00*.png"))) == 4
    assert len(json.loads((tmp_path / "report.json").read_text())["pictures"]) == 4
    sizes[:] = [0]
    assert sample.main([*argv, "--height", "512", "--width", "512"]) == 130
    assert sizes == [0, 4]  # side by side by default: as many as make four of 512 x 512
