"""The paper's tables from rows made up by hand."""

import json
from argparse import Namespace

import pytest

from dag.evaluation import ledger, paper
from dag.evaluation.__main__ import main

CHEST, BUTTOCKS, FEET, FACE = "FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED", "FEET_EXPOSED", "FACE_FEMALE"
BOXES = {  # set, prompt, method -> (class, score) of every box
    ("i2p", "7", "none"): [(CHEST, 0.9), (CHEST, 0.6), (FEET, 0.8), (FACE, 0.9)],
    ("i2p", "8", "none"): [(BUTTOCKS, 0.61), (CHEST, 0.59)],
    ("i2p", "7", "dag"): [(CHEST, 0.7), (FACE, 0.9)],
    ("i2p", "8", "dag"): [(CHEST, 0.2)],
    ("mma", "1", "none"): [(CHEST, 0.9)] * 4,
    ("mma", "1", "dag"): [(CHEST, 0.9)],
}
VQA = {("coco", "5", "none"): 0.75, ("coco", "6", "none"): 0.5, ("coco", "5", "dag"): 0.5, ("coco", "6", "dag"): 0.5}
OPTIONS = Namespace(convention="DAG", threshold=None)


@pytest.fixture
def run(tmp_path):
    """A run's folder with these rows."""
    settings = {"format": ledger.FORMAT, "steps": 50, "images": 1, "methods": {"none": {}, "dag": {}, "foo": {}}}
    settings["sets"] = {name: {"count": n, "suite": None} for name, n in (("i2p", 2), ("mma", 1), ("coco", 2))}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    rows = ledger.Rows(tmp_path, "draw", "a")
    scores = {name: ledger.Rows(tmp_path, name, "a") for name in ("nudenet", "vqa")}
    for s, number, method in (*BOXES, *VQA):
        key = f"{s}/{number}/0/{method}"
        row = {"kind": "picture", "key": key, "set": s, "id": number, "image": 0, "method": method, "file": "x.png"}
        guided = 10 if method == "dag" and s != "coco" else 0
        row |= {"unet_rows": 100 + guided, "steps_guided": guided, "seconds": 2.0, "detected": guided > 0}
        rows.append(row)
        score = {"kind": "score", "key": key}
        if s == "coco":
            scores["vqa"].append(score | {"scorer": "vqa", "vqa": VQA[s, number, method]})
        else:
            boxes = [{"class": c, "score": x, "box": [0, 0, 9, 9]} for c, x in BOXES[s, number, method]]
            scores["nudenet"].append(score | {"scorer": "nudenet", "boxes": boxes})
    for name in scores:
        (tmp_path / "rows" / f"{name}.json").write_text(json.dumps({"version": "made up"}))
    return tmp_path


def cells(table, name):
    """A row of a table by its first cell, by its heads; a figure's value alone."""
    (row,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.heads, (getattr(cell, "value", cell) for cell in row), strict=True))


def test_tables_2_3_and_5(run):
    tables = {table.title: table for table in paper.tables(paper.Measured(ledger.Run.read(run), OPTIONS))}
    table = tables["Table 2: quality on COCO-1K, N3 on I2P-sexual"]
    assert [row[0] for row in table.rows][:3] == ["**none**", "SDv1.4, paper", "SLD-weak, paper"]
    assert [row[0] for row in table.rows][-3:] == ["**dag**", "DAG, paper", "**foo**"]
    none, dag = cells(table, "**none**"), cells(table, "**dag**")
    assert (none["Total"], none["Chest (F)"], none["Buttocks"], none["VQAScore"]) == (3, 2, 1, 0.625)
    assert (dag["Total"], dag["Chest (F)"], dag["VQAScore"], dag["FID real"]) == (1, 1, 0.5, None)
    assert cells(table, "DAG, paper")["Total"] == 86 and cells(table, "**foo**")["Total"] is None
    assert any("9,480" in note for note in table.notes)
    table = tables["Table 5: ablations"]
    assert cells(table, "**dag**")["erase rate, I2P-sexual"] == pytest.approx(2 / 3, abs=1e-4)
    assert cells(table, "(1) - AreaScaler, paper")["erase rate, I2P-sexual"] == 0.97
    table = tables["Table 3: robustness"]
    assert cells(table, "**dag**")["MMA: erase rate, %"] == 75 and cells(table, "**dag**")["MMA: Total"] == 1
    printed = cells(table, "DAG, paper")
    assert (printed["MMA: Total"], printed["MMA: Buttocks"]) == (612, 127)  # the paper prints them swapped
    assert any("swapped" in note for note in table.notes)


def test_thresholds_and_conventions_from_the_same_rows(run):
    tables = {table.title: table for table in paper.tables(paper.Measured(ledger.Run.read(run), OPTIONS))}
    sweep = tables["NudeNet's threshold, i2p"]
    assert [row[:3] for row in sweep.rows] == [
        [0.2, 4, 2], [0.3, 4, 1], [0.4, 4, 1], [0.5, 4, 1], [0.6, 3, 1], [0.7, 1, 1], [0.8, 1, 0]
    ]  # fmt: skip
    others = tables["Conventions, i2p"]
    assert (cells(others, "DAG")["none"], cells(others, "MACE")["none"], cells(others, "SPM")["none"]) == (3, 4, 4)
    assert (cells(others, "ESD")["none"], cells(others, "SDID")["none"], cells(others, "SDID")["dag"]) == (6, 2, 2)
    options = Namespace(convention="MACE", threshold=0.8)
    tables = {table.title: table for table in paper.tables(paper.Measured(ledger.Run.read(run), options))}
    assert cells(tables["Table 2: quality on COCO-1K, N3 on I2P-sexual"], "**none**")["Total"] == 2


def test_what_was_drawn(run):
    drawn = paper.tables(paper.Measured(ledger.Run.read(run), OPTIONS))[-1]
    told = {(row[0], row[1]): row[2:] for row in drawn.rows}
    assert told["i2p", "dag"] == [2, 0, 1, 1, 2.2, 2] and told["coco", "none"] == [2, 0, 0, 0, 2, 2]


def test_the_command(run, capsys):
    assert main(["table", str(run)]) == 2
    assert "5 of 15 pictures are missing" in capsys.readouterr().err
    assert main(["table", str(run), "--incomplete", "--convention", "SPM", "--threshold", "0.5"]) == 0
    assert "N3: classes from 0.5 on, as SPM counts" in capsys.readouterr().out
    assert main(["table", str(run / "rows.jsonl"), "--incomplete"]) == 0
    for options, message in (
        (["--convention", "foo"], "--convention foo: expected one of DAG, MACE"),
        (["--threshold", "0.1"], "--threshold 0.1: NudeNet tells of boxes from 0.2 on; expected 0.2 to 1"),
    ):
        capsys.readouterr()
        assert main(["table", str(run), "--incomplete", *options]) == 2
        assert message in capsys.readouterr().err
