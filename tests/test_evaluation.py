"""The evaluation: its rows outlive whatever stops it, and its figures are what the rows say."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from dag import DAG, SEGA, SLD, Guidance, GuidelineTokens
from dag.cli.parsing import UsageError
from dag.config import SD14, SHAPES
from dag.evaluation import ledger, miniature, statistics
from dag.evaluation.__main__ import main
from dag.evaluation.drawing import SUITE_METHODS
from dag.evaluation.methods import NAMES, method
from dag.evaluation.scorers.shapes import packed
from dag.model import MINIATURE, NumericsError, StableDiffusion
from weights.shapes import world

TOKENS = GuidelineTokens.load(MINIATURE / "red-circle.safetensors")
SMALL = "--steps 1 --height 64 --width 64 --batch-size 2".split()


def drawn(folder, *options):
    """A small run: a few prompts in the miniature's words, unguided unless the options say more."""
    prompts = folder.parent / "few.txt"
    prompts.write_text("a tomato on sand\na red circle and a blue star\na green square on night\na sun\n")
    return main(["draw", str(folder), "--prompts", str(prompts), *SMALL, "--methods", "none", *options])


def suite(folder, *options):
    """A run of the suite `shapes` in 12 sets; steps 1, and pictures as large as the judge reads."""
    size = "--steps 1 --height 128 --width 128 --batch-size 2 --methods none,dag".split()
    return main(["draw", str(folder), "--prompts", "shapes", *size, *options])


def content(folder):
    """The rows of pictures, none twice, without what tells of time; the files."""
    rows = [row for file in folder.glob("rows/*.jsonl") for row in ledger.lines(file) if row["kind"] == "picture"]
    assert len({row["key"] for row in rows}) == len(rows)
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("pictures/**/*.*")}
    return {row["key"]: row | {"seconds": None} for row in rows}, files


@pytest.fixture
def no_model(monkeypatch):
    def refuse(args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dag.cli.setup.open_model", refuse)


def test_a_second_start_ends_before_a_model_is_loaded(tmp_path, capsys, request):
    folder = tmp_path / "run"
    assert drawn(folder) == 0
    assert "4 of 4 pictures\n" in capsys.readouterr().out
    request.getfixturevalue("no_model")
    before = content(folder)
    assert drawn(folder) == 0 and content(folder) == before
    (folder / before[0]["few/1/0/none"]["file"]).unlink()
    with pytest.raises(AssertionError):
        drawn(folder, "--debug")  # what is gone is drawn again


def test_several_processes_draw_what_one_draws(tmp_path, monkeypatch, capsys):
    """Each its part, whichever comes first; the rows are equal, and say where they were drawn."""
    options = "--images", "2", "--methods", "none,dag:warmup=0"
    drawn(tmp_path / "one", *options)
    for k in (2, 0, 1):
        monkeypatch.setenv("RANK", str(k))
        monkeypatch.setenv("WORLD_SIZE", "3")
        drawn(tmp_path / "three", *options)
    out = capsys.readouterr().out
    assert "one: 16 of 16 pictures\n" in out and "three: 10 of 16 pictures; 6 are missing: start again once all" in out
    assert content(tmp_path / "one") == content(tmp_path / "three")
    told = [row for row in ledger.Run.read(tmp_path / "three").rows if row["kind"] == "process"]
    assert sorted((row["rank"], row["world"]) for row in told) == [(0, 3), (1, 3), (2, 3)]
    assert len(list(tmp_path.glob("three/rows/draw-*.jsonl"))) == 3


def test_killed_at_any_moment_and_finished_by_others(tmp_path, monkeypatch):
    """A short form of tests/measure/kills.py."""
    options, rng = ("--images", "3", "--methods", "none,dag:warmup=0"), random.Random(1)
    drawn(tmp_path / "whole", *options)
    fork = multiprocessing.get_context("fork")
    for world_size in (1, 2):
        processes = []
        for k in range(world_size):
            monkeypatch.setenv("RANK", str(k))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            processes.append(fork.Process(target=drawn, args=(tmp_path / "broken", *options)))
            processes[-1].start()
        there, until = len(content(tmp_path / "broken")[0]), time.time() + 60
        while len(content(tmp_path / "broken")[0]) <= there and time.time() < until:
            time.sleep(rng.uniform(0.01, 0.2))  # into the batch after the next row
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    assert 0 < len(content(tmp_path / "broken")[0]) < 24
    monkeypatch.setenv("WORLD_SIZE", "3")
    for k in range(3):
        monkeypatch.setenv("RANK", str(k))
        assert drawn(tmp_path / "broken", *options) == 0
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob("*.tmp"))


def test_a_run_grows_but_never_changes(tmp_path, capsys):
    """More methods and sets may come; other settings of what is there are refused, with what differs."""
    folder = tmp_path / "run"
    drawn(folder)
    assert drawn(folder, "--methods", "sega", "--prompts", "everyday", "--count", "4") == 0
    assert "12 of 16 pictures; 4 are missing" in capsys.readouterr().out.splitlines()[-1]  # everyday by none
    for options, message in (
        (("--steps", "3"), "was made with steps 1, now it is 3"),
        (("--count", "2"), "was made with set few {"),
        (("--batch-size", "4"), "was made with batch_size 2, now it is 4"),
    ):
        assert drawn(folder, *options) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and message in told[0] and "expected the same, or another folder" in told[0]


def test_another_machine_goes_on_in_the_same_precision(tmp_path, capsys):
    folder = tmp_path / "run"
    assert drawn(folder, "--device", "nothing") == 2 and not folder.exists()
    assert "--device nothing: not available here" in capsys.readouterr().err
    drawn(folder, "--dtype", "bfloat16", "--count", "2")
    assert drawn(folder, "--count", "2") == 0 and ledger.Run.read(folder).settings["dtype"] == "bfloat16"


def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch, capsys):
    from dag.evaluation import drawing

    inner, sizes = drawing.draw, []

    def small(sd, jobs, *rest):
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise RuntimeError("CUDA out of memory")
        return inner(sd, jobs, *rest)

    monkeypatch.setattr(drawing, "draw", small)
    assert drawn(tmp_path / "run") == 0
    assert sizes == [2] + [1] * 4 and "halving that" in capsys.readouterr().err
    monkeypatch.setattr(drawing, "draw", lambda *rest: small(rest[0], [0, 0]))
    assert drawn(tmp_path / "run", "--methods", "sega") == 1
    assert "out of memory with one picture of 64 x 64 pixels" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_fails_is_told_and_not_drawn_again(tmp_path, monkeypatch, capsys):
    def fail(sd, latent):
        raise NumericsError("the decoded picture is not finite")

    monkeypatch.setattr(StableDiffusion, "decode", fail)
    folder = tmp_path / "run"
    assert drawn(folder) == 0
    rows = ledger.Run.read(folder).pictures()
    assert {(row["file"], row["failed"]) for row in rows.values()} == {(None, "the decoded picture is not finite")}
    out, err = capsys.readouterr()
    assert err.count("no picture, the decoded picture is not finite") == len(rows) == 4
    assert "4 of 4 pictures, 4 of them failed" in out
    monkeypatch.setattr("dag.cli.setup.open_model", None)
    assert drawn(folder) == 0


def test_torn_lines(tmp_path):
    """The last line of a file may be torn, no other."""
    file = tmp_path / "rows" / "draw-a.jsonl"
    rows = ledger.Rows(tmp_path, "draw", "a")
    rows.append({"kind": "picture", "key": "s/1/0/none"})
    rows.append({"kind": "picture", "key": "s/2/0/none"})
    whole = file.read_bytes()
    for torn in (b"", b"{", b'{"kind": "picture", "key": "s/3/0/no', b'{"kind": "picture"}'):
        file.write_bytes(whole + torn)
        assert [row["key"] for row in ledger.lines(file)] == ["s/1/0/none", "s/2/0/none"]
    for line in (b"{", b"[]", b"7", b"{}", b'{"kind": 3}', b"\xff", b""):
        file.write_bytes(line + b"\n" + whole)
        with pytest.raises(ValueError, match="draw-a.jsonl, line 1: is .*; expected a row"):
            list(ledger.lines(file))


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (0, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # in a batch script, without srun
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"RANK": "a", "WORLD_SIZE": "2"}, None),
    ],
)
def test_rank(env, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UsageError, match="RANK=., WORLD_SIZE=2: expected a rank from 0"):
            ledger.rank()
    else:
        assert ledger.rank() == expected


def test_every_method_has_a_row():
    for row in (*SUITE_METHODS["shapes"].split(","), *NAMES):
        assert isinstance(method(row, SHAPES, [TOKENS]), Guidance)
    assert type(method("none", SD14, [])) is Guidance and isinstance(method("none", SHAPES, [TOKENS]), DAG)
    assert method("sld-max", SD14, [TOKENS]).safety_texts == (SLD.SAFETY_TEXT,)
    assert (
        method("dag", SD14, [TOKENS]).cfg == SD14.dag
        and method("dag-no-area", SD14, [TOKENS]).cfg.scaling.area_gain is None
    )
    made = method("dag-sld:memory=0.5:warmup=1:s_max=none:area_gain=7", SHAPES, [TOKENS])
    assert isinstance(made, DAG) and made.base == "sld"
    assert (made.cfg.memory, made.cfg.warmup, made.cfg.scaling.s_max, made.cfg.scaling.area_gain) == (0.5, 1, None, 7)
    made = method("sld-max:momentum=0.25:warmup=5", SHAPES, [TOKENS])
    assert isinstance(made, SLD)
    assert vars(made) == vars(method("sld-max", SHAPES, [TOKENS])) | {"momentum": 0.25, "warmup": 5}
    made = method("sega:scale=5", SHAPES, [TOKENS])
    assert isinstance(made, SEGA) and vars(made) == vars(method("sega", SHAPES, [TOKENS])) | {"scale": 5}


@pytest.mark.parametrize(
    "row, message",
    [
        ("foo", "unknown method 'foo', expected one of none, negative, sld-weak, "),
        ("sega:1", "no field '1', expected field=value with one of scale, threshold, warmup, momentum, beta"),
        ("dag-sld:3", "no field '3', expected field=value with one of warmup, top, threshold, memory, unsafe, edit, "),
        ("none:1", "no field '1', expected the name alone"),
        ("dag:scaling=1", "no field 'scaling'"),
        ("sld-max:warmup=2.5", "warmup is '2.5', expected a whole number"),
        ("sega:scale=nan", "scale is 'nan', expected a number"),
        ("dag:s_max=", "s_max is '', expected a number or none"),
        ("dag:top=none", "top is 'none', expected a number"),
        ("dag:memory=2", "memory is 2.0, expected 0 to 1"),
    ],
)
def test_rows_that_cannot_be(row, message, tmp_path, capsys):
    """One line, before anything is drawn."""
    with pytest.raises(ValueError) as error:
        method(row, SHAPES, [TOKENS])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert drawn(tmp_path / "run", "--methods", f"dag,{row}") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "run").exists()


def test_dag_needs_tokens_of_a_given_checkpoint():
    with pytest.raises(ValueError, match="dag looks for something: give --tokens"):
        method("dag", SD14, [])


def test_frechet_distance():
    """Zero for itself; for two normal distributions with the same covariance, the squared distance of their means."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 5))

    def distance(a, b):
        return statistics.frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))

    assert distance(x, x) == pytest.approx(0, abs=1e-6)
    assert distance(x, x + [3.0, 0, 0, 4, 0]) == pytest.approx(25, rel=1e-4)
    assert distance(x, 2 * x) == pytest.approx(5, rel=0.1)  # each of five deviations is one larger


def test_intervals_are_over_prompts():
    """All pictures of a prompt are drawn together: copies of them make nothing more certain."""
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, 400)
    once = statistics.mean((str(k), v) for k, v in enumerate(values))
    assert once.value == pytest.approx(values.mean(), abs=1e-6)
    assert once.high - once.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    thrice = statistics.mean((str(k), v) for k, v in enumerate(values) for _ in range(3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert statistics.total([("a", 2), ("b", 5), ("a", 1)]).value == 8
    assert statistics.mean([]) is None
    rate = statistics.erase_rate([("a", 4, 1), ("b", 0, 0), ("c", 4, 1)])
    assert rate.value == 0.75 and rate.low == rate.high == 0.75  # 3 of 4 in every prompt that has some
    assert statistics.erase_rate([("a", 0, 3)]) is None


def judged(key, seen, unet_rows=200, guided=0, pixels="a", asked=(), **more):
    """The rows of one judged picture."""
    s, number, i, name = key.split("/")
    row = {"kind": "picture", "key": key, "set": s, "id": number, "image": int(i), "method": name, "file": "x.png"}
    row |= {"seed": 0, "unet_rows": unet_rows, "steps_guided": guided, "pixels_sha256": pixels, "asked": list(asked)}
    row |= {"detected": None, "seconds": 1.0, "prompt_sha256": ""}
    features = packed(np.full(96, float(int(number) % 5)), "<f2")
    return [
        row,
        {"kind": "score", "scorer": "shapes", "key": key, "seen": list(seen), "erased": {}, "features": features}
        | more,
    ]


def run_of(*rows, sets, scorers=None):
    """A run with these rows."""
    methods = {row["method"]: {} for pair in rows for row in pair if row["kind"] == "picture"}
    settings = {"steps": 100, "images": 1, "methods": methods}
    settings["sets"] = {name: {"count": n, "suite": suite} for name, (n, suite) in sets.items()}
    return ledger.Run(None, settings, scorers or {}, iter(row for pair in rows for row in pair))


def test_what_a_method_did_to_pictures():
    """Four pictures: a red circle erased, one left, a look-alike changed, a picture untouched."""
    red, star, square = "red-circle", "blue-star", "red-square"
    after = [
        judged("explicit/0/0/dag", [star], 300, 100, "b", [red], erased={red: {"clean": True, "outside": 0.125}}),
        judged("explicit/1/0/dag", [red], 200, 0, "a", [red]),
        judged("red-square/0/0/dag", [], 250, 50, "c", [square]),
        judged("benign/0/0/dag", [star], 200, 0, "a", [star]),
    ]
    seen = ([red, star], [red], [square], [star])
    before = [judged(rows[0]["key"][:-3] + "none", some) for rows, some in zip(after, seen, strict=True)]
    sets = {"explicit": (2, "shapes"), "red-square": (1, "shapes"), "benign": (1, "shapes")}
    run = run_of(*before, *after, sets=sets)
    pairs = miniature.pairs(run)
    told = miniature.effect([pair for some in pairs["dag"].values() for pair in some], 100)
    assert (told["with it"], told["gone"], told["erased"].value) == (2, 1, 0.5)
    assert (told["with others"], told["kept"].value, told["clean"].value, told["outside"].value) == (1, 1, 1, 0.125)
    assert (told["safe changed"].value, told["safe guided"].value, told["identical"].value) == (0.5, 0.5, 0.5)
    assert told["rows"].value == 2.375 and told["all asked"].value == 0.5
    both = miniature.effect(pairs["dag"]["explicit"], 100, red, (red, star))
    assert both["with others"] == 0 and both["kept"] is None  # the blue star is unsafe too
    reference = {"mean": packed(np.zeros(96), "<f4"), "cov": packed(np.eye(96), "<f4")}
    row = miniature.figures(pairs["dag"], 100, reference)
    assert row["alike guided, worst kind"] == row["alike lost, worst kind"] == "1 [1, 1] (red square)"
    assert row["erased explicit"].value == 0.5 and row["erased nickname"] is None and row["identical"] == 1


@pytest.fixture
def few_renders(monkeypatch):
    monkeypatch.setattr("dag.evaluation.scorers.shapes.RENDERS", 40)


def test_judge_and_tables_end_to_end(tmp_path, capsys, monkeypatch, few_renders):
    """Renders in the place of drawn pictures: red circles painted over, one look-alike lost, everything else equal.

    The table can be made again from the one file of rows, without torch and without matplotlib.
    """
    folder = tmp_path / "run"
    monkeypatch.setattr("dag.evaluation.drawing.drawn", lambda *rest: 0)
    suite(folder, "--count", "2", "--steps", "50")
    rows, texts = ledger.Rows(folder, "draw", "test"), ledger.known_prompts(folder)
    for k, key in enumerate(texts):
        s, number = key.split("/")
        kind = world.UNSAFE if s in ("explicit", "nickname", "colourless") else ("blue", "star")
        kind = tuple(s.split("-")) if s.count("-") else kind
        scene = world.scene_of([kind, ("purple", "square")], random.Random(k))
        pictures = {"none": world.render(scene, k)[0]}
        other = [o for o in scene.objects if o.kind not in (world.UNSAFE, ("red", "square"))]
        pictures["dag"] = world.render(world.Scene(tuple(other), scene.ground, scene.style), k)[0]
        for name, picture in pictures.items():
            row, _ = judged(
                f"{key}/0/{name}",
                [],
                150 if name == "dag" else 100,
                50 * (name == "dag"),
                picture.tobytes().hex()[-99:],
            )
            row |= {"file": f"pictures/{s}/{name}/{number}-0.png", "detected": name == "dag"}
            (folder / row["file"]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / row["file"])
            rows.append(row)
    assert main(["table", str(folder)]) == 2
    assert "no unguided pictures with scores; expected `score --scorers shapes` first" in capsys.readouterr().err
    assert main(["score", str(folder), "--scorers", "shapes", "--sets", "explicit"]) == 0
    assert "shapes of 4 of 4 pictures" in capsys.readouterr().out
    for k in ("1", "0"):  # by two processes
        monkeypatch.setenv("RANK", k)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["score", str(folder), "--scorers", "shapes"]) == 0
    assert "shapes of 48 of 48 pictures" in capsys.readouterr().out
    monkeypatch.setattr("dag.evaluation.scoring.score", None)
    assert main(["score", str(folder), "--scorers", "shapes"]) == 0  # nothing is missing: no scorer is made
    assert main(["table", str(folder)]) == 0
    told = json.loads((folder / "table.json").read_text())["tables"]
    row = dict(zip(told[0]["heads"], told[0]["rows"][1], strict=True))
    assert row["erased explicit"] == row["erased colourless"] == [1, 1, 1] and row["clean"] == 1 and row["kept"] == 1
    assert row["alike lost, worst kind"] == "1 [1, 1] (red square)" and row["outside"] < 0.01
    assert row["FD plain"] > 0 and told[0]["rows"][0][told[0]["heads"].index("FD plain")] == 0
    assert (folder / "sheet.png").exists()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert main(["table", str(folder / "rows.jsonl"), "--out", str(tmp_path / "again")]) == 0
    assert "table.png: not written, matplotlib is missing" in capsys.readouterr().err
    assert (tmp_path / "again" / "table.md").read_bytes() == (folder / "table.md").read_bytes()


def test_an_incomplete_run_is_refused_unless_told(tmp_path, monkeypatch, capsys, few_renders):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    suite(tmp_path, "--count", "1", "--batch-size", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["score", str(tmp_path), "--scorers", "shapes"]) == 0
    (file,) = tmp_path.glob("rows/shapes-*.jsonl")
    torn = file.read_bytes()[:-9]
    file.write_bytes(torn)
    capsys.readouterr()
    assert main(["table", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert (
        "12 of 24 pictures are missing; shapes has seen 1 of 2 pictures of red-" in told and len(told.splitlines()) == 1
    )
    assert main(["table", str(tmp_path), "--incomplete"]) == 0
    assert "**Incomplete**: 12 of 24 pictures are missing" in (tmp_path / "table.md").read_text()


def test_a_scorer_keeps_its_settings(tmp_path, capsys, few_renders):
    suite(tmp_path, "--count", "1", "--methods", "none")
    assert main(["score", str(tmp_path), "--scorers", "shapes", "--sets", "benign"]) == 0
    told = json.loads((tmp_path / "rows" / "shapes.json").read_text())
    (tmp_path / "rows" / "shapes.json").write_text(json.dumps(told | {"sha256": "other"}))
    assert main(["score", str(tmp_path), "--scorers", "shapes"]) == 2
    assert 'shapes.json has sha256 "other", now it is ' in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "found '', expected draw, score, table (--help tells more)"),
        (["paint"], "found 'paint', expected draw, score, table"),
        (["score", "nothing", "--scorers", "foo"], "unknown scorer 'foo', expected a list of nudenet, fid, clip,"),
        (["score", "nothing", "--scorers", "shapes"], "nothing: no such folder or file; expected a run's folder"),
        (["table", "."], "has no run.json; expected a folder made by `python -m dag.evaluation draw`"),
        (["draw", "run"], "the following arguments are required: --prompts"),
    ],
)  # fmt: skip
def test_commands_that_cannot_be(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_two_concepts():
    """The red circle is erased, the blue star is not; a picture of neither is untouched."""
    red, star = "red-circle", "blue-star"
    erased = {red: {"clean": True, "outside": 0.25}}
    after = [judged("both/0/0/dag", [star], 250, 50, "b", erased=erased), judged("neither/0/0/dag", ["red-square"])]
    before = [judged("both/0/0/none", [red, star]), judged("neither/0/0/none", ["red-square"])]
    run = run_of(*before, *after, sets={"both": (1, "concepts"), "neither": (1, "concepts")})
    (table,) = miniature.tables(run)
    told = {tuple(row[1:3]): [getattr(cell, "value", cell) for cell in row[3:]] for row in table.rows}
    assert told["both", red] == [1, 1, 1, 0.25, 2.5] and told["both", star] == [1, 0, None, None, 2.5]
    assert told["both", "both of them"][:2] == [1, 0]
    assert told["neither", "identical to the unguided picture"][1] == 1
