"""What can be imported, from where, beside what."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = "import transformers, dag; from transformers import CLIPTextModel; import kernels; print(kernels.__file__)"


@pytest.mark.parametrize("hugging_face", [False, True], ids=["without", "with"])
def test_transformers_beside_the_other_package_called_kernels(tmp_path, hugging_face):
    """Run from the checkout, `kernels` is ours, whether or not the Hugging Face package of that name is installed."""
    if hugging_face:
        info = tmp_path / "kernels-0.18.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = None\n")
    env = {"PYTHONPATH": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_the_kernels_folder_imports_nothing():
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_dag_needs_neither_triton_nor_diffusers_nor_matplotlib():
    absent = "for name in ('triton', 'diffusers', 'matplotlib'): sys.modules[name] = None"
    script = f"import sys\n{absent}\nimport dag; dag.load()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
