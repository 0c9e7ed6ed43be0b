"""Every bridge behind every kind of encoder against a plain one, row by row and layer by layer."""

from typing import Any, get_args

import pytest
import torch
from models import ragged_batch
from plain_encoders import BODIES, affine, tiny_encoder

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq.bridges import BRIDGES
from hf_rnn_seq2seq.configuration_rnn_seq2seq import BridgeType

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def test_the_dict_is_the_literal() -> None:
    assert tuple(BRIDGES) == get_args(BridgeType)


def test_dense_bridge_has_the_published_number_of_parameters() -> None:
    """See et al. 2017's `reduce_states`: two affine maps from 512 to 256 with their biases."""
    bridge = BRIDGES["dense"](RnnSeq2SeqConfig(hidden_size=256, encoder_hidden_size=256, bridge_type="dense"))
    assert sum(parameter.numel() for parameter in bridge.parameters()) == 2 * (512 * 256 + 256)


BRIDGE_SETTINGS: list[dict[str, Any]] = [
    {**BODIES["rnn"], "decoder_layers": 3},
    {**BODIES["rnn"], "decoder_layers": 2, "layer_norm": True},
    {**BODIES["rnn"], "cell_type": "gru", "decoder_cell_type": "lstm", "decoder_layers": 1},
    {**BODIES["gnmt"], "cell_type": "lstm", "decoder_cell_type": "gru", "decoder_layers": 2},
    {**BODIES["pyramidal"], "encoder_hidden_size": 3, "decoder_layers": 2},
    {**BODIES["conv"], "decoder_layers": 2},
    {**BODIES["transformer"], "decoder_layers": 3, "decoder_cell_type": "gru"},
    {**BODIES["embedding"], "decoder_layers": 2},
]


def normed(p: dict[str, torch.nn.Parameter], x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Layer normalisation of one layer's state, where there is one (Ba et al. 2016)."""
    if "norm.weight" not in p:
        return x
    centred = x - x.mean()
    return p["norm.weight"][rows] * centred / (centred.square().mean() + 1e-5).sqrt() + p["norm.bias"][rows]


@pytest.mark.parametrize("kind", BRIDGES)
@pytest.mark.parametrize("setting", BRIDGE_SETTINGS)
def test_bridges_equal_plain_ones(kind: str, setting: dict[str, Any]) -> None:
    encoder = tiny_encoder(**setting, bridge_type=kind)
    config = encoder.config
    source, mask = ragged_batch([5, 1, 4], "both")
    with torch.no_grad():
        out = encoder(source, mask)
    bridge = BRIDGES[kind](config).double()
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.copy_(torch.randn_like(parameter))
    p = dict(bridge.named_parameters())
    states = 2 if config.decoder_cell == "lstm" else 1
    found = bridge(out)
    assert len(found) == config.decoder_layers
    assert all(len(layer) == states for layer in found)
    for row in range(3):
        final = out.final_state[row]  # [L, N, M]
        tokens = out.last_hidden_state[row][out.memory_mask[row]]
        for layer, index in ((layer, index) for layer in range(config.decoder_layers) for index in range(states)):
            rows = slice((layer * states + index) * 8, (layer * states + index + 1) * 8)
            if kind == "zeros" or (kind == "last" and index >= final.shape[1]):
                expected = torch.zeros(8).double()
            elif kind == "learned":
                expected = p["initial"][layer, index]
            elif kind == "last":
                expected = final[min(layer, final.shape[0] - 1), index]
                expected = affine(p, "projection", expected) if p else expected
            elif kind == "dense":
                state = torch.cat([one[min(index, final.shape[1] - 1)] for one in final])
                expected = affine(p, f"projections.{index}", state).clamp(min=0)[layer * 8 : layer * 8 + 8]
            elif kind == "layerwise":
                state = final[min(layer, final.shape[0] - 1), min(index, final.shape[1] - 1)]
                expected = affine(p, f"projections.{index}", state)
            else:
                summary = tokens.mean(0) if kind == "mean" else final[-1, 0]
                expected = normed(p, affine(p, "projection", summary)[rows], rows)
                expected = expected if kind == "affine" else torch.tanh(expected)
            torch.testing.assert_close(found[layer][index][row], expected, **CLOSE)
