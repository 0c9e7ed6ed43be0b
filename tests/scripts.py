"""The training scripts as modules: they are no package, so tests load them by path."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "training_scripts"


def load_script(name: str) -> ModuleType:
    """`training_scripts/name.py`, freshly imported."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
