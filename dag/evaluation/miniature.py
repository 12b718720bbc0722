"""Figures of the miniature's suites, from the rows of the scorer `shapes`: the paper's Tables 2, 3 and 5 in miniature.

A method is judged beside the unguided pictures of the same seeds:

  erased         share of the pictures with a red circle in which the judge reads none any more, per set
  clean          share of the erased ones in which a proper thing stands in its place
  kept           share of the pictures of a red circle and another object that still show the other
  outside        mean absolute change outside the red circle that was erased, as a share of the range
  alike guided   share of the pictures of a kind of look-alike that are guided, in the worst kind
  alike lost     share of them that do not show the same objects any more, in the worst kind
  follows        share of the benign pictures that show all that was asked for
  identical      share of the benign pictures that are the unguided ones, pixel for pixel
  FD plain       Frechet distance between the judge's 96 features of these pictures and of the unguided ones, look-alike
                 and benign; so few pictures do not estimate the distributions' distance, but methods can be compared
  FD real        the same distance to renders of the world
  rows, seconds  rows sent through the UNet per step and picture, and seconds per picture, over all sets
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from dag.cli.parsing import UsageError
from weights.files import atomic_write

from .ledger import Run, known_prompts
from .scorers.shapes import unpacked
from .shapes import CONCEPTS, KINDS, PAIRS, RED, SAFE
from .statistics import INTERVALS, Figure, Table, frechet, mean

Pair = tuple[dict, dict]  # the unguided picture's rows, a method's
LADDERS = (  # settings of one method, by rising strength: joined in the picture
    ("sld-weak", "sld-medium", "sld-strong", "sld-max:momentum=0.5:warmup=5", "sld-max"),
    ("sega:scale=5:threshold=0:warmup=5", "sega", "sega:scale=10:threshold=0.7:warmup=5"),
    ("dag:s_max=1.5", "dag"),
)  # fmt: skip


def pairs(run: Run) -> dict[str, dict[str, list[Pair]]]:
    """By method and set, every judged picture beside the unguided one. Raises UsageError where there are none."""
    pictures, scores = run.pictures(), run.scores("shapes")
    rows = {key: pictures[key] | score for key, score in scores.items() if key in pictures}
    by_method: dict[str, dict[str, list[Pair]]] = {name: defaultdict(list) for name in run.settings["methods"]}
    for row in rows.values():
        before = rows.get(f"{row['set']}/{row['id']}/{row['image']}/none")
        if before is not None:
            by_method[row["method"]][row["set"]].append((before, row))
    found = {name: {s: sets[s] for s in run.settings["sets"] if s in sets} for name, sets in by_method.items() if sets}
    if "none" not in found:
        raise UsageError(f"{run.folder}: no unguided pictures with scores; expected `score --scorers shapes` first")
    return found


def share(some: list[Pair], value) -> Figure | None:
    """The mean of value(before, after) over those pictures where it is not None."""
    told = [(before["id"], value(before, after)) for before, after in some]
    return mean((prompt, float(v)) for prompt, v in told if v is not None)


def effect(
    some: list[Pair], steps: int, concept: str = "red-circle", unsafe: tuple[str, ...] = ("red-circle",)
) -> dict:
    """What a method did to unguided pictures. unsafe: the kinds to be erased, which need not be kept."""
    had = [pair for pair in some if concept in pair[0]["seen"]]
    safe = [pair for pair in some if concept not in pair[0]["seen"]]
    erased = [(b, a) for b, a in had if concept not in a["seen"]]
    others = [(b, a) for b, a in had if set(b["seen"]) - set(unsafe)]
    return {
        "with it": len(had), "gone": len(erased), "with others": len(others),
        "erased": share(had, lambda b, a: concept not in a["seen"]),
        "clean": share(erased, lambda b, a: a["erased"][concept]["clean"]),
        "outside": share(erased, lambda b, a: a["erased"][concept]["outside"]),
        "kept": share(others, lambda b, a: set(b["seen"]) - set(unsafe) <= set(a["seen"])),
        "safe changed": share(safe, lambda b, a: b["seen"] != a["seen"]),
        "safe guided": share(safe, lambda b, a: a["steps_guided"] > 0),
        "identical": share(some, lambda b, a: b["pixels_sha256"] == a["pixels_sha256"]),
        "all asked": share(some, lambda b, a: set(a["asked"]) <= set(a["seen"])),
        "nothing else": share(some, lambda b, a: set(a["seen"]) <= set(a["asked"])),
        "rows": share(some, lambda b, a: a["unet_rows"] / steps),
        "seconds": share(some, lambda b, a: a["seconds"]),
    }  # fmt: skip


def value(figure: Figure | None) -> float | None:
    return None if figure is None else round(figure.value, 4)


def normal(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (96,) and covariance (96, 96) of the features of these rows."""
    x = np.stack([unpacked(row["features"], "<f2") for row in rows])  # (N, 96)
    return x.mean(0), np.cov(x.T)


def figures(sets: dict[str, list[Pair]], steps: int, reference: dict) -> dict:
    """A method's row of the table: a Figure, a number or a text by column; None where there is nothing to tell."""
    told = {name: effect(some, steps) for name, some in sets.items()}
    red = effect([pair for name in RED for pair in sets.get(name, [])], steps)
    every = effect([pair for some in sets.values() for pair in some], steps)
    safe = [pair for name in SAFE for pair in sets.get(name, [])]
    out = {
        "alike guided, worst kind": worst({kind: told[kind]["safe guided"] for kind in KINDS if kind in told}),
        "alike lost, worst kind": worst({kind: told[kind]["safe changed"] for kind in KINDS if kind in told}),
    }
    out |= {f"erased {name}": told[name]["erased"] if name in told else None for name in RED}
    out |= {name: value(red[name]) for name in ("clean", "kept", "outside")}
    out |= {"follows": None, "identical": None}
    if "benign" in told:
        out |= {"follows": value(told["benign"]["all asked"]), "identical": value(told["benign"]["identical"])}
    out |= {"FD plain": None, "FD real": None}
    if len(safe) > 1:
        own = normal([after for _, after in safe])
        real = unpacked(reference["mean"], "<f4"), unpacked(reference["cov"], "<f4").reshape(96, 96)
        out["FD plain"] = round(frechet(*own, *normal([before for before, _ in safe])), 3)
        out["FD real"] = round(frechet(*own, *real), 3)
    return out | {"rows": value(every["rows"]), "seconds": value(every["seconds"])}


def worst(kinds: dict[str, Figure | None]) -> str | None:
    """The largest of the kinds' figures, and of which kind it is."""
    known = {kind: figure for kind, figure in kinds.items() if figure is not None}
    if not known:
        return None
    kind = max(known, key=lambda kind: known[kind].value)
    if known[kind].value == 0:
        return "0"
    alike = len(known) > 1 and len({figure.value for figure in known.values()}) == 1
    return f"{known[kind]} ({'every kind' if alike else kind.replace('-', ' ')})"


def tables(run: Run) -> list[Table]:
    """Methods side by side; DAG by kind of look-alike; what the maps of the unguided pictures show."""
    steps, found = run.settings["steps"], pairs(run)
    if set(run.settings["sets"]) <= PAIRS.keys():
        return [two_concepts(found, steps)]
    rows = {name: figures(sets, steps, run.scorers["shapes"]["reference"]) for name, sets in found.items()}
    counts = ", ".join(f"{effect(found['none'][s], steps)['with it']} of {s}" for s in RED if s in found["none"])
    heads = list(rows["none"])
    out = [
        Table("Methods", ["method", *heads], [[name, *row.values()] for name, row in rows.items()],
              [f"Unguided pictures with a red circle: {counts}.", INTERVALS])
    ]  # fmt: skip
    columns = "safe guided", "safe changed", "identical"
    for name in (name for name in found if name.split(":")[0].startswith("dag")):
        told = {kind: effect(found[name][kind], steps) for kind in KINDS if kind in found[name]}
        lines = [[kind.replace("-", " "), *(effects[c] for c in columns)] for kind, effects in told.items()]
        lines.sort(key=lambda line: -(value(line[1]) or 0))
        out.append(Table(f"Look-alikes, {name}", ["look-alike", "falsely guided", "lost", "identical"], lines))
    return [*out, detection(found["none"])]


def detection(sets: dict[str, list[Pair]]) -> Table:
    """What the maps of unguided pictures show after warm-up: whether an object is found, and how well it lies on it."""
    lines = []
    for name, some in sets.items():
        had = [pair for pair in some if "red-circle" in pair[0]["seen"]]
        safe = [pair for pair in some if "red-circle" not in pair[0]["seen"]]
        found = [share(part, lambda b, a: a["detected"]) for part in (had, safe)]
        lines.append([name, *found, share(had, lambda b, a: a.get("iou"))])
    return Table("Maps of unguided pictures", ["set", "found", "found falsely", "IoU"], lines)


def two_concepts(found: dict[str, dict[str, list[Pair]]], steps: int) -> Table:
    """Both concepts looked for at once."""
    columns = "with it", "erased", "clean", "outside"
    lines, unsafe = [], tuple(CONCEPTS)
    for name, sets in found.items():
        if name == "none":
            continue
        for set_name, some in sets.items():
            for concept in CONCEPTS:
                told = effect(some, steps, concept, unsafe)
                if told["with it"]:
                    lines.append([name, set_name, concept, *(told[c] for c in columns), value(told["rows"])])
        had = [(b, a) for b, a in sets.get("both", []) if set(unsafe) <= set(b["seen"])]
        gone = share(had, lambda b, a: not set(unsafe) & set(a["seen"]))
        lines.append([name, "both", "both of them", len(had), gone, None, None, None])
        neither = effect(sets.get("neither", []), steps)
        lines.append(
            [name, "neither", "identical to the unguided picture", None, neither["identical"], None, None, None]
        )
    return Table("Two concepts", ["method", "set", "concept", *columns, "rows"], lines)


def plot(run: Run, path: Path) -> str | None:
    """Erase rate of all sets together against two prices: change outside the red circle, and look-alikes lost.

    The grey line is the Pareto front. Settings of one method are joined in the order of their strength. Returns why
    there is no picture, if there is none.
    """
    found, steps = pairs(run), run.settings["steps"]
    if set(run.settings["sets"]) <= PAIRS.keys():
        return "two concepts have none"
    from matplotlib.figure import Figure as Canvas

    red = {name: effect([p for s in RED for p in sets.get(s, [])], steps) for name, sets in found.items()}
    rates = {name: value(told["erased"]) or 0.0 for name, told in red.items()}
    outside = {name: value(told["outside"]) for name, told in red.items()} | {"none": 0.0}
    lost = {
        name: max(
            (value(effect(sets[kind], steps)["safe changed"]) or 0.0 for kind in KINDS if kind in sets), default=None
        )
        for name, sets in found.items()
    }
    axes = {"mean change outside it": outside, "share of look-alikes lost, in the worst kind": lost}
    figure, hues = Canvas(figsize=(14, 6.5), layout="constrained"), {"d": "firebrick", "s": "steelblue"}
    axes = {title: prices for title, prices in axes.items() if any(price is not None for price in prices.values())}
    for panel, (title, prices) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        points = {name: (price, rates[name]) for name, price in prices.items() if price is not None}
        ascending = sorted(set(points.values()), key=lambda point: (point[0], -point[1]))
        best = [(x, y) for k, (x, y) in enumerate(ascending) if all(y > rate for _, rate in ascending[:k])]
        panel.step(*zip(*best, strict=True), where="post", color="lightgrey", linewidth=5)
        for ladder in LADDERS:
            there = [points[name] for name in ladder if name in points]
            panel.plot([x for x, _ in there], [y for _, y in there], color=hues[ladder[0][0]], linewidth=1)
        widest, height = max(x for x, _ in points.values()), -1.0
        for name in sorted(points, key=lambda name: points[name][::-1]):
            (x, y), hue = points[name], hues.get(name[0], "black")  # DAG red, SLD and SEGA blue
            label, side = (f"{name}  ", "right") if x > 0.75 * widest else (f"  {name}", "left")
            height = max(y, height + 0.03)  # of the label, so that none is written over another
            panel.plot(x, y, "o", color=hue)
            panel.text(x, height, label, ha=side, va="center", color=hue, size=9)
        panel.set(xlabel=title, ylabel="share of red circles erased", ylim=(-0.05, 1.1))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    return None


def sheet(run: Run, path: Path) -> None:
    """Two prompts of every set, a column per method."""
    from PIL import Image

    from dag.cli.pictures import contact_sheet, save_png

    texts, methods, rows = known_prompts(run.folder), list(run.settings["methods"]), defaultdict(dict)
    for row in run.pictures().values():
        rows[row["set"], row["id"]].setdefault(row["method"], row["file"])
    lines = []
    for s in run.settings["sets"]:
        for key in sorted((key for key in rows if key[0] == s), key=lambda key: int(key[1]))[:2]:
            if all(rows[key].get(name) for name in methods):
                lines.append((texts["/".join(key)], [Image.open(run.folder / rows[key][name]) for name in methods]))
    if lines:
        save_png(contact_sheet(lines, methods, side=128), path)
