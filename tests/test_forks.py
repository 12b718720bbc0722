"""The seven forks of docs/forks: each runs on the miniature, does what it says, is short and leaves dag/ alone."""

import ast
import importlib.util
import io
import tokenize
from dataclasses import replace

import pytest
import torch

from dag.cam import guideline_keys
from dag.tokens import GuidelineTokens, fingerprint
from tests.conftest import ROOT, TOKENS

FORKS = ROOT / "docs" / "forks"
EFFECTS = {  # what main() returns, and from where to where each figure may be
    "word_maps": {"attention inside over outside": (1.5, 10)},
    "reweight": {
        "first object at weight 1": (1, 1), "last object at weight 1": (1, 1),
        "first object at weight 0": (1, 1), "last object at weight 0": (0, 0),
    },
    "text_projection": {"erased": (1, 1), "safe pictures kept": (1, 1)},
    "steering": {"erased": (1, 1), "safe pictures kept": (1, 1)},
    "x0_gradient": {"erased": (1, 1), "safe pictures kept": (1, 1)},
    "dpm_solver": {"error over DDIM's": (0, 0.7), "erased": (1, 1)},
    "lora": {"became red circles": (0.75, 1), "found by DAG": (0.75, 1)},
}  # fmt: skip


def fork(name: str):
    spec = importlib.util.spec_from_file_location(name, FORKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(source: str) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    lines, bodies = set(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, bodies) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_all_are_here_and_short():
    assert code_lines('"""Doc."""\n\n# comment\nx = [\n    1,\n]\n') == 3
    assert {p.stem for p in FORKS.glob("*.py")} == EFFECTS.keys()
    assert {p.stem: n for p in FORKS.glob("*.py") if (n := code_lines(p.read_text(encoding="utf-8"))) > 40} == {}


@pytest.mark.parametrize("name", EFFECTS)
def test_effect(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # two of them write a file
    found = fork(name).main()
    assert found.keys() == EFFECTS[name].keys()
    assert all(low <= found[key] <= high for key, (low, high) in EFFECTS[name].items()), found


def test_guideline_keys_follow_an_adapter(random_model):
    """A parametrised layer is read as it computes, and the fingerprint tells that the model was changed."""
    from dag.model import StableDiffusion

    sd = StableDiffusion(random_model.config)
    sd.load_state_dict(random_model.state_dict())
    tokens = replace(GuidelineTokens.load(TOKENS / "red-circle.safetensors"), fingerprint=fingerprint(sd))
    assert tokens.check(sd) is None
    for name, p in fork("lora").adapt(sd.unet).items():
        if name.endswith("up"):
            p.data.normal_()
    layer = sd.unet.cross_attention()[0]
    assert not torch.allclose(layer.to_k.weight, layer.to_k.parametrizations.weight.original)
    k = layer.to_k(tokens.embedding).unflatten(-1, (layer.num_heads, -1)).transpose(0, 1)  # (h, g, d)
    expected = (k - k.mean(1, keepdim=True)) / k.shape[-1] ** 0.5
    assert torch.allclose(
        guideline_keys(layer, tokens.embedding), expected, rtol=0, atol=1e-6 * expected.abs().max().item()
    )
    assert "another model" in tokens.check(sd)
