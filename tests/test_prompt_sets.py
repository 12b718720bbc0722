"""Prompt sets, from files made with the headers that their authors publish."""

import csv
import json

import pytest

from dag.evaluation import prompts
from dag.evaluation.__main__ import draw_parser, main

I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
).split(",")
FILLED = {"hard": "0", "sd_image_width": "512", "sd_image_height": "512", "sd_model": "Stable Diffusion"}


def write(path, columns, rows, bom=False, end="\r\n"):
    """A CSV file of rows, each a dict of some columns."""
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator=end)
        writer.writeheader()
        writer.writerows(FILLED | row if "categories" in columns else row for row in rows)
    return path


def read(*texts):
    options = [part for text in texts for part in (text if isinstance(text, list) else ["--prompts", text])]
    return prompts.read(draw_parser().parse_args(["run", *options]))


ODD = [
    {"prompt": 'a "quoted" word, and a comma', "categories": "hate, sexual", "sd_seed": "3868412893"},
    {"prompt": "two\nlines", "categories": "sexual", "sd_seed": "5.0"},
    {"prompt": "caf\u00e9, na\u00efve", "categories": "violence", "sd_seed": "7"},
    {"prompt": "a trailing comma,", "categories": "sexual, self-harm", "sd_seed": "0"},
]


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_i2p(tmp_path, bom, end):
    """Quotes, commas and newlines in prompts; a byte order mark; both ends of lines; whole categories only."""
    rows = [row | {"sd_guidance_scale": "7"} for row in ODD]
    rows.append({"prompt": "x", "categories": "homosexual", "sd_seed": "1", "sd_guidance_scale": "7.5"})
    (found,) = read(f"i2p={write(tmp_path / 'i2p.csv', I2P, rows, bom, end)}")
    assert [p.text for p in found.prompts] == [ODD[k]["prompt"] for k in (0, 1, 3)]
    assert [(p.id, p.seed, p.scale) for p in found.prompts] == [("0", 3868412893, 7), ("1", 5, 7), ("3", 0, 7)]
    assert found.name == "i2p" and found.about["rows"] == 5 and "authors'" in found.about["variant"]
    assert found.about["seeds"] == "column sd_seed" and found.about["scales"] == "column sd_guidance_scale"
    (every,) = read(f"i2p={tmp_path / 'i2p.csv'}", ["--i2p", "all", "--seed", "9", "--scale", "4"])
    assert len(every.prompts) == 5 and {(p.seed, p.scale) for p in every.prompts} == {(None, None)}


def test_i2p_with_the_seeds_of_the_unlearning_papers(tmp_path):
    columns = ["", *I2P, "evaluation_seed", "evaluation_guidance", "case_number"]
    more = {"evaluation_seed": "11", "evaluation_guidance": "7", "sd_guidance_scale": "9"}
    rows = [row | more | {"case_number": str(40 + k), "": str(k)} for k, row in enumerate(ODD)]
    (found,) = read(f"i2p={write(tmp_path / 'i2p.csv', columns, rows)}", ["--count", "2"])
    assert [(p.id, p.seed, p.scale) for p in found.prompts] == [("40", 11, 7), ("41", 11, 7)]
    assert "unlearning" in found.about["variant"] and found.about["ids"] == "column case_number"


def test_ring_a_bell_and_mma_in_both_variants(tmp_path):
    own = write(tmp_path / "own.csv", ["prompt", "case_number", "evaluation_seed"], [
        {"prompt": "a b", "case_number": "3", "evaluation_seed": "8"}])  # fmt: skip
    copy = write(tmp_path / "copy.csv", ["sensitive prompt", "normal prompt"], [
        {"sensitive prompt": "c d", "normal prompt": "e"}])  # fmt: skip
    for path, text, seed in ((own, "a b", 8), (copy, "c d", None)):
        (found,) = read(f"ring-a-bell={path}")
        assert [(p.text, p.seed) for p in found.prompts] == [(text, seed)]
    columns = "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt".split(
        ","
    )
    path = write(tmp_path / "mma.csv", columns, [dict(zip(columns, "tascl", strict=True))])
    assert [read(f"mma={path}", ["--mma", m])[0].prompts[0].text for m in ("adversarial", "sanitized")] == ["a", "s"]


def test_coco_is_drawn_by_a_seed(tmp_path):
    columns = ["case_number", "source", "prompt", "evaluation_seed", "coco_id"]
    rows = [
        {"case_number": str(k), "source": "coco-30k", "prompt": f"a picture of {k} cats", "evaluation_seed": str(k)}
        | {"coco_id": str(900 + k)}
        for k in range(1500)
    ]
    path = write(tmp_path / "coco_30k.csv", columns, rows)
    (found,) = read(f"coco={path}")
    assert len(found.prompts) == 1000 and found.about["drawn"] == "1000 of 1500, seed 0"
    assert all(p.text == f"a picture of {p.seed} cats" for p in found.prompts)
    assert read(f"coco={path}")[0] == found
    (other,) = read(f"coco={path}", ["--coco-seed", "1", "--count", "20"])
    assert len(other.prompts) == 20 and other.prompts != found.prompts[:20]


def test_text_json_lines_and_what_comes_along(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\na dog\n")
    line = {"prompt": "a bird", "seed": 4, "id": "b/1"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    everyday, mine, own = read("everyday", str(tmp_path / "mine.txt"), str(tmp_path / "own.jsonl"))
    assert len(everyday.prompts) == 24 and everyday.name == "everyday"
    assert [(p.id, p.text, p.seed) for p in mine.prompts] == [("1", "a cat", None), ("3", "a dog", None)]
    assert [(p.id, p.text, p.seed) for p in own.prompts] == [("b/1", "a bird", 4)]


SEEDED = "prompt,case_number,evaluation_seed"


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("i2p", "target_prompt,adv_prompt\na,b\n", "columns target_prompt, adv_prompt, which are those of mma;"),
        ("i2p", f"{SEEDED}\na,1,2\n", "which are those of ring-a-bell or coco; expected for i2p: prompt, categories"),
        ("mma", f"{','.join(I2P)}\n", "which are those of i2p; expected for mma: target_prompt, adv_prompt"),
        ("coco", "prompt,evaluation_seed,categories\na,1,sexual\n", "which are those of i2p; expected for coco"),
        ("coco", "text,seed\na,1\n", "has the columns text, seed; expected for coco: prompt, evaluation_seed, coco_id"),
        ("coco", "", "has the columns ; expected for coco"),
        ("ring-a-bell", f"{SEEDED}\n", "no prompts in it; expected at least one"),
        ("ring-a-bell", f"{SEEDED}\na,1\n", "line 2: has 2 fields, the header has 3; expected as many, with quotes"),
        ("ring-a-bell", f"{SEEDED}\na, b,1,2\n", "line 2: has 4 fields, the header has 3"),
        ("ring-a-bell", f'{SEEDED}\n"a"b,1,2\n', "line 2: "),
        ("ring-a-bell", f'{SEEDED}\n"a,1,2\n', "line 2: "),
        ("ring-a-bell", f"{SEEDED}\n  ,1,2\n", "line 2: column prompt is empty; expected a prompt"),
        ("ring-a-bell", f"{SEEDED}\na,1,\n", "line 2: evaluation_seed is '', expected a whole number from 0 to 2^62"),
        ("ring-a-bell", f"{SEEDED}\na,1,1.5\n", "evaluation_seed is '1.5', expected a whole number"),
        ("ring-a-bell", f"{SEEDED}\na,1,-1\n", "evaluation_seed is '-1', expected a whole number"),
        ("ring-a-bell", f"{SEEDED}\na,1,inf\n", "evaluation_seed is 'inf', expected a whole number"),
        ("ring-a-bell", f"{SEEDED},prompt\na,1,2,b\n", "has two columns called 'prompt'; expected each once"),
        ("ring-a-bell", f"{SEEDED}\n\xff,1,2\n", "is not UTF-8 text; expected a CSV file"),
        ("ring-a-bell", None, "cannot be read (No such file or directory); expected a CSV file"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(kind, text, message, tmp_path, capsys):
    """One line, before anything is drawn."""
    path = tmp_path / "file.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert main(["draw", str(tmp_path / "run"), "--prompts", f"{kind}={path}"]) in (1, 2)
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and str(path) in told
    assert not (tmp_path / "run").exists()


def test_31_odd_rows(tmp_path):
    """31 prompts of everything that a CSV may hold come back as they were."""
    parts = ['"', ",", "\n", "\r\n", "'", ";", "\t", "\u00e9", "\u65e5\u672c", "\U0001f600", "#", "=", "\\", " a", "b "]
    texts = [f"x{part}y {k}" for k, part in enumerate(parts)] + [f"{part}" * 2 + "z" for part in parts] + ["a" * 5000]
    rows = [{"prompt": text, "case_number": str(k), "evaluation_seed": str(k)} for k, text in enumerate(texts)]
    path = write(tmp_path / "odd.csv", ["prompt", "case_number", "evaluation_seed"], rows)
    (found,) = read(f"ring-a-bell={path}")
    assert len(texts) == 31 and [p.text for p in found.prompts] == texts


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "some.csv"], "which set is it? Expected i2p=FILE, ring-a-bell=FILE, mma=FILE, coco=FILE"),
        (["--prompts", "everyday", "--prompts", "everyday"], "two sets are called 'everyday'; expected each once"),
        (["--prompts", "everyday", "--prompts", "shapes"], "the miniature's suites are runs of their own"),
        (["--prompts", "shapes", "--count", "501"], "--count: 501 prompts per set, expected at most 500"),
        (["--prompts", "shapes", "--scale", "3"], "--scale 3: --prompts shapes is told of at the miniature's own"),
        (["--prompts", "shapes", "--ckpt", "x.ckpt"], "--prompts shapes is the miniature's; leave out --ckpt"),
        (["--count", "3"], "the following arguments are required: --prompts"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["draw", str(tmp_path / "run"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "run").exists()
