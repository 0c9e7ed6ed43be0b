"""The public names, registration, and what importing the package costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

import hf_rnn_seq2seq
from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqModel


def test_public_names() -> None:
    for name in hf_rnn_seq2seq.__all__:
        assert getattr(hf_rnn_seq2seq, name) is not None
    from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer

    assert hf_rnn_seq2seq.RnnSeq2SeqTrainer is RnnSeq2SeqTrainer
    with pytest.raises(AttributeError, match="no attribute 'RnnSeq2Seq'"):
        _ = hf_rnn_seq2seq.RnnSeq2Seq


def test_auto_classes() -> None:
    config = tiny_config()
    assert type(AutoConfig.for_model("rnn_seq2seq")) is type(config)
    assert type(AutoModel.from_config(config)) is RnnSeq2SeqModel
    assert type(AutoModelForSeq2SeqLM.from_config(config)) is RnnSeq2SeqForConditionalGeneration


def test_importing_the_model_imports_nothing_for_training() -> None:
    code = (
        "import json, sys, hf_rnn_seq2seq\n"
        "print(json.dumps([m for m in ('datasets', 'evaluate', 'matplotlib', "
        "'hf_rnn_seq2seq.trainer') if m in sys.modules]))"
    )
    root = str(Path(hf_rnn_seq2seq.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_what_travels_imports_its_siblings_in_the_one_form_that_is_followed() -> None:
    """transformers finds the files that a checkpoint carries by a regular expression for `from .file import name`."""
    package = Path(hf_rnn_seq2seq.__file__).parent
    waiting = [package / f"{name}_rnn_seq2seq.py" for name in ("configuration", "modeling", "tokenization")]
    travelling: set[Path] = set()
    while waiting:
        path = waiting.pop()
        travelling.add(path)
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith(("from .", "from hf_rnn_seq2seq", "import hf_rnn_seq2seq")):
                found = re.fullmatch(r"from \.(\w+) import .*", line)
                assert found, f"{path.name}: {line}"
                sibling = package / f"{found[1]}.py"
                assert sibling.is_file(), f"{path.name}: {line}"
                if sibling not in travelling:
                    waiting.append(sibling)
    names = {path.stem for path in travelling}
    assert {"recurrent_layers", "attention", "encoders", "bridges", "wirings", "decoder", "heads"} < names
    assert not {"trainer", "tokenizer_training", "presets"} & names
