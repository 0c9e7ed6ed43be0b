"""The training scripts as modules: they are no package, so tests load them by path."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "training_scripts"
sys.path.append(str(FOLDER))  # where Python looks first when it runs a script, for what one imports from another


def load_script(name: str) -> ModuleType:
    """`training_scripts/name.py`, freshly imported."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
