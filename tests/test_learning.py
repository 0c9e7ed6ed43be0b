"""That models learn, not only run: real words and pronunciations by heart, then exact output by every search."""

from typing import Any

import pytest
import torch
from models import name_of

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer

WORDS = {
    "night": "N AY T", "knight": "N AY T", "through": "TH R UW", "thought": "TH AO T", "tough": "T AH F",
    "laugh": "L AE F", "phone": "F OW N", "church": "CH ER CH", "judge": "JH AH JH", "queue": "K Y UW",
    "rhythm": "R IH DH AH M", "island": "AY L AH N D", "debt": "D EH T", "psalm": "S AA M", "gnome": "N OW M",
    "schism": "S K IH Z AH M", "yacht": "Y AA T", "aisle": "AY L", "colonel": "K ER N AH L", "one": "W AH N",
}  # fmt: skip

# Every cell, attention, wiring and bridge at least once.
SETTINGS: list[dict[str, Any]] = [
    {"cell_type": "lstm", "attention_type": "additive", "wiring_type": "input_feeding", "bridge_type": "linear"},
    {"cell_type": "gru", "attention_type": "dot", "wiring_type": "output_only", "bridge_type": "last"},
    {"cell_type": "gru", "attention_type": "normed_additive", "wiring_type": "bahdanau", "bridge_type": "mean"},
    {"cell_type": "lstm", "attention_type": "none", "wiring_type": "output_only", "bridge_type": "last"},
    {"cell_type": "rnn_tanh", "attention_type": "general", "wiring_type": "input_feeding", "bridge_type": "zeros"},
    {"cell_type": "rnn_relu", "attention_type": "scaled_dot", "wiring_type": "output_only", "bridge_type": "linear"},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_learns_by_heart(setting: dict[str, Any]) -> None:
    kinds = TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="symbols")
    tokenizer = build_tokenizer(WORDS.keys(), WORDS.values(), kinds)
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            vocab_size=tokenizer.target_vocab_size,
            source_vocab_size=tokenizer.source_vocab_size,
            hidden_size=64,
            embedding_size=32,
            dropout=0,
            embedding_dropout=0,
            output_dropout=0,
            **setting,
        )
    )
    batch = tokenizer(list(WORDS), text_target=list(WORDS.values()), padding=True, return_tensors="pt")
    labels = batch.pop("labels")
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.005:
            break
    assert loss < 0.02
    model.eval()
    for beams in (1, 4):
        ids = model.generate(**batch, num_beams=beams, max_new_tokens=8)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == list(WORDS.values())
