"""The README's tables of axes and presets, from the package's dicts; `python tests/axes_table.py` writes them."""

import re
from pathlib import Path
from typing import Any

import torch

from hf_rnn_seq2seq import PRESETS, RnnSeq2SeqForConditionalGeneration, preset
from hf_rnn_seq2seq.attention import ATTENTIONS
from hf_rnn_seq2seq.bridges import BRIDGES
from hf_rnn_seq2seq.encoders import ENCODERS
from hf_rnn_seq2seq.heads import HEADS
from hf_rnn_seq2seq.normalizers import NORMALIZERS
from hf_rnn_seq2seq.recurrent_layers import CELLS
from hf_rnn_seq2seq.wirings import WIRINGS

README = Path(__file__).parent.parent / "README.md"

AXES: dict[str, dict[str, Any]] = {
    "`cell_type`, `decoder_cell_type`": CELLS,
    "`encoder_type`": ENCODERS,
    "`bridge_type`": BRIDGES,
    "`attention_type`": ATTENTIONS,
    "`attention_normalizer`, `output_normalizer`": NORMALIZERS,
    "`wiring_type`": WIRINGS,
    "`head_type`": HEADS,
}

CITATION = re.compile(r"((?:[A-Z][\w'-]+, )*[A-Z][\w'-]+(?: & [A-Z][\w'-]+| et al\.)?),? \(?((?:19|20)\d\d)")


def paper(value: Any) -> str:
    """The first citation in a docstring or text: where it is from."""
    text = " ".join((value if isinstance(value, str) else value.__doc__ or "").split())
    found = CITATION.search(text)
    return f"{found[1]} {found[2]}" if found else ""


def axes_table() -> str:
    lines = ["| axis | value | class | paper |", "|---|---|---|---|"]
    for axis, values in AXES.items():
        for index, (name, value) in enumerate(values.items()):
            lines.append(f"| {axis if index == 0 else ''} | `{name}` | `{value.__name__}` | {paper(value)} |")
    return "\n".join(lines)


def presets_table() -> str:
    lines = ["| preset | from | parameters | the paper's count |", "|---|---|---|---|"]
    for name, found in PRESETS.items():
        with torch.device("meta"):
            model = RnnSeq2SeqForConditionalGeneration(preset(name))
        count = f"{found.parameters:,}" if found.parameters else ""
        size = sum(parameter.numel() for parameter in model.parameters())
        lines.append(f"| `{name}` | {paper(found.paper)} | {size:,} | {count} |")
    return "\n".join(lines)


def written(readme: str) -> str:
    """`readme` with the tables of today."""
    for name, table in (("axes", axes_table()), ("presets", presets_table())):
        begin, end = f"<!-- {name}: written by tests/axes_table.py -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
