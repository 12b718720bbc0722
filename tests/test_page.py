"""The page of --page: what is recorded, what is written, and what a real browser shows of it, without a network.

The browser is a Chromium of the system, driven by playwright; where one of them is missing these tests are skipped.
"""

import json
import math
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

import dag
import sample
from dag.cam import Probe, combine
from dag.cli import page
from dag.config import Scaling
from dag.guidance import remember
from dag.recording import DECODED, Recording, decode_some, film
from dag.scalers import scale_map, strength
from tests.conftest import TOKENS

HOSTILE = (
    """</script><script>document.title = "broken"</script> <img src=x onerror=alert(1)> "'&amp; \U0001f346 \u2028"""
)


@pytest.fixture(scope="module")
def tokens():
    return dag.GuidelineTokens.load(TOKENS / "red-circle.safetensors")


def contents(path) -> dict:
    """The JSON of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_recording_only_looks(shapes, tokens):
    """The steps are bit for bit the same, and the shares are those of the softmax that A is made of."""
    prompts = ["a red circle", "a star on night"]
    plain = list(dag.sample(shapes, prompts, dag.DAG(tokens), steps=8))
    recording, probe, raw = Recording(shapes, [tokens], images=1), Probe(shapes.unet, [tokens]), []
    for step, before in zip(
        dag.sample(shapes, prompts, dag.DAG(tokens), steps=8, hooks=[*recording.hooks, probe]), plain, strict=True
    ):
        recording.keep(step)
        raw.append(combine(list(probe.maps.values()), [layer.factor for layer in probe.maps], 16, 16)[0, 0])
        assert torch.equal(step.x, before.x) and torch.equal(step.S, before.S)
    words, rows = recording.read()
    assert words.shape == (1, 8, 24, 16, 16) and rows.shape == (1, 8, sum(tokens.split), 16, 16)
    for shares in (words, rows):
        assert torch.allclose(shares.sum(2), torch.ones(1, 8, 16, 16), atol=1e-5) and shares.min() >= 0
    assert torch.allclose(rows[0, :, tokens.background :].sum(1), torch.stack(raw), atol=1e-5)


def test_attention_is_kept_on_a_small_grid(shapes):
    """Without tokens the prompt's attention alone, on the model's layers; the grid's shorter side has 16 places."""
    recording = Recording(shapes, [])
    for step in dag.sample(shapes, ["a star"], dag.Guidance(), steps=1, height=256, width=384, hooks=recording.hooks):
        recording.keep(step)
    (words,) = recording.read()
    assert words.shape == (1, 1, 24, 16, 24)


def test_film(shapes):
    """Decoded steps are the decoder's; where that is linear and smooth and the latent moves on a line, all are."""

    class Linear:
        decoded = 0

        def decode(self, z):
            self.decoded += 1
            return torch.nn.functional.interpolate(z[:, :3] * 0.1 + 0.2, scale_factor=8, mode="bilinear")

    sd, (start, end) = Linear(), torch.randn(2, 4, 8, 8)
    x0 = torch.stack([torch.lerp(start, end, share) for share in torch.linspace(0, 1, 12) ** 2])
    decoded = decode_some(sd, x0, {})
    assert {0, 11} <= set(decoded) and sd.decoded == len(decoded) == DECODED
    pictures = torch.stack(list(film(x0, decoded, range(12))))
    assert torch.allclose(pictures, sd.decode(x0), atol=1e-4)
    assert torch.equal(pictures[sorted(decoded)], torch.stack([decoded[i] for i in sorted(decoded)]))
    again = decode_some(sd, x0, decoded)  # known ones cost nothing, and do not count
    assert all(again[i] is decoded[i] for i in decoded) and len(again) == 12
    assert list(film(x0[:1], decode_some(sd, x0[:1], {}), [0]))[0].shape == (3, 64, 64)


def test_written_by_sample(tmp_path, monkeypatch, capsys):
    """The same pictures with a page and without; prompts are data; nothing is recorded that is not asked for."""
    argv = ["--prompt", HOSTILE, "--prompt", "a star", "--guidance", "none,dag", "--steps", "6"]
    assert sample.main([*argv, "--page", "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"4 pictures, {tmp_path / 'a' / 'index.html'} to move")

    class Never:
        def __init__(self, *args):
            raise AssertionError("recorded, and nobody asked for it")

    for where in ("dag.recording.Recording", "dag.cli.page.Page"):
        monkeypatch.setattr(where, Never)
    assert sample.main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert not (tmp_path / "b" / "index.html").exists()
    written = contents(tmp_path / "a" / "index.html")
    entries = json.loads((tmp_path / "a" / "report.json").read_text())["pictures"]
    assert [run["entry"] for picture in written["pictures"] for run in picture["runs"]] == entries
    for entry in entries:
        a, b = (Image.open(tmp_path / folder / entry["file"]).tobytes() for folder in "ab")
        assert a == b
    assert written["pictures"][0]["prompt"] == HOSTILE and written["lacks"] == [] and len(written["t"]) == 6
    unguided, guided = written["pictures"][1]["runs"]
    assert None not in unguided["frames"] and guided["frames"] == [None] * 6  # nothing was found: the same pictures
    assert guided["unet_rows"] == [2] * 6 and guided["found"] == [[0.0]] * 6 and unguided["maps"] == {}


def test_says_what_it_lacks(tmp_path, monkeypatch):
    """More pictures than a page holds, a run without maps, one stopped by Ctrl-C, and its resumption."""
    monkeypatch.setattr("dag.cli.page.PICTURES", 2)
    argv = ["--prompt", "a star", "--steps", "1", "--guidance", "none", "--page", "--out", str(tmp_path)]
    assert sample.main([*argv, "--n-images", "3"]) == 0
    written = contents(tmp_path / "index.html")
    assert len(written["pictures"]) == 2 and written["concepts"] == []
    assert written["lacks"] == [
        "Nothing was looked for, so there are no maps.",
        "2 of 3 pictures are on this page: a page holds the first 2 that one run draws.",
    ]
    real, calls = page.webp, []

    def stopped(picture):
        calls.append(picture)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(picture)

    monkeypatch.setattr("dag.cli.page.webp", stopped)
    argv = [*argv[:-1], str(tmp_path / "b"), "--n-images", "3", "--batch-size", "1"]
    assert sample.main(argv) == 130
    written = contents(tmp_path / "b" / "index.html")
    assert len(written["pictures"]) == 1 and "The run was stopped: 2 of 3 pictures were finished." in written["lacks"]
    assert "1 of 2 pictures are on this page: " in written["lacks"][-1]
    monkeypatch.setattr("dag.cli.page.webp", real)
    monkeypatch.setattr("dag.cli.page.PICTURES", 16)
    for _ in "drawn", "nothing left to draw":
        assert sample.main([*argv, "--resume"]) == 0
    assert len(contents(tmp_path / "b" / "index.html")["pictures"]) == 1
    written = contents(tmp_path / "b" / "index-002.html")
    assert len(written["pictures"]) == 1 and "1 of 3 pictures are on this page: " in written["lacks"][-1]


def test_packed():
    """8 bits: 0 and the largest value are exact, and near tau an error is a tenth of it."""
    maps = torch.cat([torch.zeros(1), torch.logspace(-4, math.log10(3), 63)]).view(4, 16)
    error = (unpacked(page.packed(maps)) - maps).abs()
    assert error[0, 0] == error[3, 15] == 0 and error[maps < 0.011].max() < 1e-3 and error.max() < 0.013
    assert torch.equal(unpacked(page.packed(torch.zeros(2, 2))), torch.zeros(2, 2))


def unpacked(packed: dict) -> torch.Tensor:
    """A map of the JSON, by its own words."""
    import base64
    import zlib

    u = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(packed["data"]))), dtype=torch.uint8)
    return (packed["max"] * (u.double() / 255).square()).float().view(packed["shape"])


# ---- in a browser ----
@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: see extra `page`")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here; Debian has it as `chromium`")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error as e:
            pytest.skip(f"{chromium} cannot be started here: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page from file://, without a network; at the end: nothing was said on the console, nothing asked for."""
    said, asked, contexts = [], [], []

    def open_(path, width=1600, **more):
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, offline=True, **more))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("#all:not([hidden]) figure, #nothing:not([hidden])")
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert said == [] and all(url.startswith(("file:", "data:")) for url in asked), (said, asked[:9])
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


def lanes(tab) -> dict[str, int]:
    """How many steps every lane above the slider marks."""
    count = "lanes => lanes.map(lane => [lane.querySelector('.name').textContent, lane.querySelectorAll('i').length])"
    return dict(tab.eval_on_selector_all(".lane", count))


def test_a_run_in_the_browser(opened, shapes, tokens, tmp_path):
    argv = ["--prompt", "a red circle on grey", "--prompt", HOSTILE, "--guidance", "none,dag", "--steps", "12"]
    assert sample.main([*argv, "--seed", "3", "--page", "--out", str(tmp_path)]) == 0
    entry = json.loads((tmp_path / "report.json").read_text())["pictures"][1]
    steps = list(dag.sample(shapes, ["a red circle on grey", HOSTILE], dag.DAG(tokens), steps=12, seeds=[3, 3]))
    tab = opened(tmp_path / "index.html")

    # The numbers are report.json's and the loop's.
    where = entry["found"]["a red circle"]
    told = tab.inner_text("#summary")
    for number in (
        f"guided on {entry['steps_guided']} of 12",
        f"{entry['unet_rows']} UNet rows",
        f"at the {where['place']}",
    ):
        assert number in told
    identical = next(i for i, step in enumerate(steps) if step.guided[0])
    assert lanes(tab) == {"identical": identical, "found": where["steps"], "guided": entry["steps_guided"]}
    tab.evaluate("page.state.place = [(4 + .5) / 16, (9 + .5) / 16]")
    tab.focus("#play")
    for key, i in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("End", 11),
        *(("ArrowLeft", i) for i in range(10, 7, -1)),
    ):
        tab.keyboard.press(key)
        assert tab.inner_text("#step") == f"step {i + 1} of 12, t = {steps[i].t}"
        values = [float(x) for x in tab.locator("#inspector > .meter .value").all_inner_texts()]
        expected = [steps[i].A[0, 0, 9, 4], steps[i].A_acted[0, 0, 9, 4], steps[i].S[0, 9, 4]]
        assert values == pytest.approx([float(x) for x in expected], abs=0.016)
    here = sum(bool(step.guided[0] and step.S[0, 9, 4] > 0) for step in steps)
    assert tab.inner_text(".told") == (f"Guided here on {here} of 12 steps." if here else "Never guided here.")

    # Words: those of the prompt, ranked; pointing at one draws its map.
    assert tab.locator("#words button").all_inner_texts() == [
        "start",
        "a",
        "red",
        "circle",
        "on",
        "grey",
        "end and padding",
    ]
    shares = [float(x.split()[0]) for x in tab.locator("#ranked .value").all_inner_texts()]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) < 100

    def drawn():
        return tab.eval_on_selector_all("figure canvas", "all => all.map(canvas => canvas.toDataURL())")

    before = drawn()
    tab.hover("#words button:has-text('circle')")
    assert all(a != b for a, b in zip(before, drawn(), strict=True)) and "circle" in tab.inner_text("#shown")
    tab.mouse.move(0, 0)
    assert drawn() == before
    tab.click("#ranked button >> nth=0")
    assert tab.get_attribute("#ranked button >> nth=0", "aria-pressed") == "true" and drawn() != before
    tab.click("#layers button:has-text('picture alone')")
    assert "picture alone" in tab.inner_text("#shown").lower()

    # A click moves the ring, in either picture; Shift and arrows by a cell; both pictures can be asked.
    box = tab.locator("figure canvas >> nth=0").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.28)
    assert "unguided, step 9" in tab.inner_text("#inspector") and "has no A and no S" in tab.inner_text(".told")
    assert tab.evaluate("page.state.place") == pytest.approx([0.75, 0.28], abs=0.01)
    tab.keyboard.press("Shift+ArrowDown")
    assert tab.evaluate("page.state.place[1]") == pytest.approx(5.5 / 16)

    # Play runs to the end and stops; the slider and the lanes move, too.
    tab.keyboard.press("Home")
    tab.click("h2 >> nth=0")
    tab.keyboard.press("Space")
    assert tab.get_attribute("#play", "aria-label") == "Pause"
    tab.wait_for_selector("#play[aria-label=Play]")
    assert tab.evaluate("page.state.step") == 11
    box = tab.locator("#slider").bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tab.evaluate("page.state.step") in (5, 6)
    tab.mouse.click(box["x"] + box["width"] - 9, box["y"] - 8)
    assert tab.evaluate("page.state.step") == 11

    # Knobs: Algorithm 1 again on the recorded maps, as dag/ computes it.
    def replayed():
        data = tab.evaluate("""() => {
            const { A } = page.runs[1].maps, { data, state } = page;
            const constants = { ...data.concepts[0].constants, ...state.knobs };
            const all = page.replay(A.data, A.shape, [constants], data.memory, data.warmup);
            return { A: [...A.data], S: all.S.map(S => [...S]), guided: all.guided, knobs: state.knobs ?? {} };
        }""")
        cfg = shapes.config.dag
        scalings = [replace(tokens.adapt(cfg.scaling), **data["knobs"])]
        acted, expected = torch.zeros(()), []
        for A in torch.tensor(data["A"]).view(12, 1, 1, 16, 16):
            acted = remember(A, acted, replace(cfg, scaling=scalings[0]), scalings)
            expected.append(scale_map(acted, scalings)[0, 0])
        found = torch.tensor(data["S"], dtype=torch.float32).view(12, 16, 16)
        assert torch.allclose(found, torch.stack(expected), rtol=0, atol=1e-3)
        return data["knobs"], sum(data["guided"])

    assert replayed() == ({}, entry["steps_guided"])
    for name, value in (("unsafe", 300), ("edit", 700), ("area_gain", 100), ("min_area", 50)):
        tab.evaluate(f"() => {{ const k = document.getElementById('knob-{name}'); k.value = {value}; k.oninput(); }}")
        knobs, guided = replayed()
        assert name in knobs and f"would act on {guided} of 12" in tab.inner_text("#knobs-told")
        assert lanes(tab)["guided"] == guided
    tab.click("#reset")
    assert lanes(tab)["guided"] == entry["steps_guided"] and tab.evaluate("page.state.knobs") is None

    # The other prompt is text, whatever it says.
    tab.click(".choice >> nth=1")
    tab.wait_for_selector(".choice:nth-child(2)[aria-pressed=true]")
    assert "nothing found; never guided; 24 UNet rows" in tab.inner_text("#summary")
    assert tab.title() == "Detect-and-Guide, step by step" and tab.locator("img[src=x]").count() == 0
    assert HOSTILE.strip() in tab.text_content(".choice >> nth=1") or HOSTILE in tab.text_content(".choice >> nth=1")
    assert tab.text_content("#words").startswith("start</script><script>document")


# The text that stands out least: its contrast by WCAG 2, and what it is.
CONTRAST = """() => {
  const linear = v => v <= 10.3 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => rgb(colour).slice(0, 3).reduce((sum, v, k) => sum + linear(v) * [.2126, .7152, .0722][k], 0);
  const ground = e => (rgb(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0 ? ground(e.parentElement) : e;
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.disabled
    && e.tagName !== "OPTION" && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
    const both = [getComputedStyle(e).color, getComputedStyle(ground(e)).backgroundColor].map(light);
    return [(Math.max(...both) + .05) / (Math.min(...both) + .05), e.tagName + " " + e.textContent.slice(0, 30)];
  }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_fits_and_is_readable(opened, tmp_path, width):
    """Nothing sticks out, in either theme text stands out from its ground (WCAG AA), everything has a name."""
    page.write(tmp_path / "p.html", example())
    for theme in ("light", "dark"):
        tab = opened(tmp_path / "p.html", width, color_scheme=theme)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        outside = """marks => marks.filter(mark => {
            const [own, all] = [mark, mark.parentElement].map(e => e.getBoundingClientRect());
            return own.left < all.left - 1 || own.right > all.right + 1;
        }).length"""
        assert tab.locator(".lane i").count() > 0 and tab.eval_on_selector_all(".lane i", outside) == 0
        name = "(e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent).trim()"
        nameless = f"all => all.filter(e => e.checkVisibility() && !{name}).length"
        assert tab.eval_on_selector_all("canvas, button, input", nameless) == 0
        worst = tab.evaluate(CONTRAST)
        assert worst[0] >= 4.5, worst


def example(words: int = 3, steps: int = 3, concepts: int = 2) -> dict:
    """The JSON as a fork might fill it: random maps, two concepts, a map of its own, a picture that failed."""
    A, S = torch.rand(steps, concepts, 8, 8), 2 * torch.rand(steps, 8, 8)
    frame = page.webp(Image.new("RGB", (64, 64), (90, 120, 160)))
    entry = {
        "found": {},
        "detected": False,
        "not_guided_reason": "nothing found",
        "steps_guided": 0,
        "unet_rows": 2 * steps,
    }
    run = {
        "method": "mine", "entry": entry, "frames": [frame] * steps, "decoded": [0], "guided": [0] * steps,
        "unet_rows": [2] * steps, "found": [[0.2] * concepts] * steps if concepts else None,
        "maps": {"A": page.packed(A), "S": page.packed(S), "curl": page.packed(S)} if concepts else {},
        "words": page.packed(torch.rand(steps, words + 2, 4, 4)),
        "rows": [page.packed(torch.rand(steps, 4, 4, 4))] * concepts,
    }  # fmt: skip
    chart = [{"text": f"word{w}", "kind": "word"} for w in range(words)]
    chart = [
        {"text": "start", "kind": "start"},
        *chart,
        {"text": "end", "kind": "rest"},
        {"text": "cut", "kind": "dropped"},
    ]
    runs = [run, {"method": "none", "entry": {"failed": "the latent is not finite"}}, run | {"method": "dag"}]
    return {
        "version": 1, "model": {"name": "any", "layers": ["one"]}, "t": list(range(steps, 0, -1)), "s_g": 5.0,
        "memory": 0.5, "warmup": 1, "lacks": ["Something."],
        "concepts": [
            {"name": f"c{k}", "safety_text": "s", "background": 2, "rows": 4, "constants": asdict(Scaling())}
            for k in range(concepts)
        ],
        "pictures": [{"prompt": "any", "seed": k, "words": chart, "runs": runs[: 3 - 2 * k]} for k in range(2)],
    }  # fmt: skip


def test_any_data(opened, tmp_path):
    """A fork's own map has a button; a failed picture says why; concepts are chosen; 75 words, none, one step."""
    page.write(tmp_path / "p.html", example())
    tab = opened(tmp_path / "p.html")
    tab.click("#layers button:has-text('curl')")
    assert tab.get_attribute("#layers button:has-text('curl')", "aria-pressed") == "true"
    tab.select_option("#concept", "1")
    assert "c1" in tab.inner_text("#inspector")
    tab.select_option("figcaption select >> nth=0", "1")
    assert "the latent is not finite" in tab.inner_text("#figures")
    assert "Something." in tab.inner_text("footer")
    tab.click(".choice >> nth=1")  # a single run
    tab.wait_for_selector(".figures.single")
    for name, data in (
        ("many", example(words=75, steps=1)), ("none", example(words=0, concepts=0)),
        ("empty", example() | {"pictures": []}),
    ):  # fmt: skip
        page.write(tmp_path / f"{name}.html", data)
        tab = opened(tmp_path / f"{name}.html")
        shown = tab.inner_text("body")
        assert {"many": "63 more words", "none": "the prompt is empty", "empty": "No picture was recorded."}[
            name
        ] in shown
        if name == "many":
            assert tab.inner_text("#step") == "step 1 of 1, t = 1"


def test_algorithm_1_is_that_of_the_scalers(opened, tmp_path):
    """On maps given as they are, several objects, rims and ties among them: S in JavaScript is S in Python."""
    page.write(tmp_path / "p.html", example())
    tab = opened(tmp_path / "p.html")
    blobs = torch.nn.functional.interpolate(torch.rand(12, 1, 5, 4), (20, 14), mode="bilinear")[:, 0]
    maps = torch.cat([blobs, (torch.rand(3, 20, 14) > 0.4).float(), torch.zeros(1, 20, 14), torch.ones(1, 20, 14)])
    maps[:6] = (maps[:6] - 0.3).clamp(min=0)  # less than `full` of the frame
    for scaling in (
        Scaling(full=0.97, min_area=0.01), Scaling(unsafe=0.3, edit=0.05, full=2.0, area_gain=40.0, s_max=3.0),
        Scaling(area_gain=None, magnitude=1.0), Scaling(unsafe=0.7, edit=0.2, magnitude=2.5, min_area=0.0, full=0.97),
    ):  # fmt: skip
        found = tab.evaluate(
            "([maps, c]) => maps.map(A => [...page.strength(Float32Array.from(A), c, 20, 14).S])",
            [maps.flatten(1).tolist(), asdict(scaling)],
        )
        expected = strength(maps, scaling)
        assert expected.max() > 0
        assert torch.allclose(torch.tensor(found, dtype=torch.float32).view(-1, 20, 14), expected, rtol=1e-6, atol=0)
