"""Every scorer through the three commands, on a run of the miniature: NudeNet itself, small random models else."""

import json

import pytest

from dag.evaluation.__main__ import main
from tests.test_scorers import clip_folder, flant5, small  # noqa: F401


def test_draw_score_table(tmp_path, clip_folder, flant5, small, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("nudenet")
    folder, size = tmp_path / "run", "--steps 1 --height 64 --width 64 --batch-size 2".split()
    assert main(["draw", str(folder), "--prompts", "everyday", "--count", "3", "--methods", "none,sega", *size]) == 0
    models = ["--clip-model", str(clip_folder), "--vqa-model", str(flant5), "--vqa-sg"]
    for k in ("1", "0"):  # by two processes
        monkeypatch.setenv("RANK", k)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["score", str(folder), "--scorers", "nudenet,fid,clip,vqa", *models]) == 0
    assert capsys.readouterr().out.count("of 6 of 6 pictures") == 4
    assert main(["table", str(folder)]) == 0
    told = {table["title"]: table for table in json.loads((folder / "table.json").read_text())["tables"]}
    assert {"N3 on everyday", "NudeNet's threshold, everyday", "FID", "clip, means", "vqa, means"} <= told.keys()
    none, sega = told["FID"]["rows"]
    assert none[:2] == ["everyday", "none"] and none[4] == pytest.approx(0, abs=1e-6) and sega[4] > 0
    assert [row[:2] for row in told["vqa, means"]["rows"]] == [["everyday", "vqa"], ["everyday", "vqa_sg"]]
    assert main(["table", str(folder / "rows.jsonl"), "--out", str(tmp_path / "again")]) == 0
    again = {table["title"]: table for table in json.loads((tmp_path / "again" / "table.json").read_text())["tables"]}
    assert again["vqa, means"] == told["vqa, means"] and again["FID"]["heads"] == ["not told"]
