"""The runtime needs nothing of the builder, and importing the package is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import furiosa_build.runtime

BLOCKED = """
import sys

BLOCKED = ["hydra", "omegaconf", "doit", "transformers", "typer", "rich", "huggingface_hub"]
BLOCKED += [f"furiosa_build.{name}" for name in ("recipe", "plan", "store", "steps", "models", "build", "cli")]

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED):
            raise ImportError(f"{name} is not for the runtime")

sys.meta_path.insert(0, Block())
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, timeout=300
    )
    return done.stdout


def test_every_module_imports_and_generates_without_the_builder(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, pathlib, sys
import furiosa_build.runtime
names = [m.name for m in pkgutil.walk_packages(furiosa_build.runtime.__path__, "furiosa_build.runtime.")]
for name in names:
    importlib.import_module(name)
sys.path.insert(0, sys.argv[1])
from test_runtime import toy
from furiosa_build.runtime import LLM, SamplingParams
from furiosa_build.runtime.execution import rank
rank.get_backend = lambda _: toy.ToyBackend()
llm = LLM(toy.write_artifact(pathlib.Path(sys.argv[2])))
[output] = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
assert output.outputs[0].token_ids == toy.expected([1, 2], 3)
print(len(names))
"""
    tests = str(Path(__file__).parents[1])
    package = Path(furiosa_build.runtime.__file__).parent
    modules = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    assert int(python(BLOCKED + code, tests, str(tmp_path / "artifact"))) == len(modules)


def test_the_block_blocks() -> None:
    code = "try:\n    import transformers\nexcept ImportError as error:\n    print(error)"
    assert python(BLOCKED + code) == "transformers is not for the runtime\n"


def test_importing_the_package_imports_neither_torch_nor_tokenizers() -> None:
    code = "import sys, furiosa_build.runtime; print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    assert python(code) == "set()\n"


def test_the_public_names() -> None:
    assert furiosa_build.runtime.__all__ == [
        "LLM",
        "AsyncEngineArgs",
        "AsyncLLMEngine",
        "EngineArgs",
        "LLMEngine",
        "PoolingParams",
        "RequestOutput",
        "SamplingParams",
    ]
    for name in furiosa_build.runtime.__all__:
        assert getattr(furiosa_build.runtime, name).__name__ == name
        assert name in dir(furiosa_build.runtime)
    assert not hasattr(furiosa_build.runtime, "nothing")
