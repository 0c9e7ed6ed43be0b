"""The published systems: their sizes against the papers', and that each of them learns."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, preset
from hf_rnn_seq2seq.losses import token_loss
from hf_rnn_seq2seq.presets import PRESETS
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer, train_tokenizer

NAMES = [
    "sutskever2014", "cho2014", "bahdanau2015_rnnsearch50", "luong2015_global", "luong2015_local_p",
    "luong2015_input_feeding", "gnmt2016", "gnmt_v2_4layer", "nematus2017", "see2017_pointer_generator",
    "see2017_coverage", "chen2018_rnmt_plus", "hybrid_transformer_rnn", "gehring2017_conv", "ssru_student",
    "kann2016_med", "deepspin2020_g2p", "las2016_text", "tutorial_gru", "tutorial_gru_attention", "tutorial_lstm_dot",
    "tutorial_conv_lstm", "tutorial_multi_head",
]  # fmt: skip

# Fifty words that are not spelt as they are spoken, with their pronunciations.
WORDS = {
    "night": "N AY T", "knight": "N AY T", "through": "TH R UW", "thought": "TH AO T", "tough": "T AH F",
    "laugh": "L AE F", "phone": "F OW N", "church": "CH ER CH", "judge": "JH AH JH", "queue": "K Y UW",
    "rhythm": "R IH DH AH M", "island": "AY L AH N D", "debt": "D EH T", "psalm": "S AA M", "gnome": "N OW M",
    "schism": "S K IH Z AH M", "yacht": "Y AA T", "aisle": "AY L", "colonel": "K ER N AH L", "one": "W AH N",
    "two": "T UW", "eight": "EY T", "ocean": "OW SH AH N", "nation": "N EY SH AH N", "vision": "V IH ZH AH N",
    "school": "S K UW L", "chef": "SH EH F", "choir": "K W AY ER", "doubt": "D AW T", "honest": "AA N AH S T",
    "hour": "AW ER", "listen": "L IH S AH N", "castle": "K AE S AH L", "muscle": "M AH S AH L", "sword": "S AO R D",
    "answer": "AE N S ER", "wrist": "R IH S T", "tomb": "T UW M", "bomb": "B AA M", "comb": "K OW M",
    "sugar": "SH UH G ER", "sure": "SH UH R", "women": "W IH M AH N", "busy": "B IH Z IY", "bury": "B EH R IY",
    "fruit": "F R UW T", "guess": "G EH S", "tongue": "T AH NG", "league": "L IY G", "unique": "Y UW N IY K",
}  # fmt: skip


def test_names() -> None:
    assert list(PRESETS) == NAMES
    assert len(WORDS) == 50


def parameters(config: RnnSeq2SeqConfig) -> int:
    with torch.device("meta"):
        model = RnnSeq2SeqForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_size_is_the_papers(name: str) -> None:
    """Up to what the paper rounds, and to differences that the preset accounts for."""
    found = PRESETS[name]
    size = parameters(preset(name))
    if found.parameters is None:
        assert "No count" in found.paper or name.startswith("tutorial")
        assert size > 0
        return
    assert abs(size - found.deviation - found.parameters) <= found.rounded_to / 2


def test_pointer_and_coverage_cost_exactly_what_see_et_al_say() -> None:
    plain = parameters(preset("see2017_pointer_generator", head_type="linear"))
    pointer = parameters(preset("see2017_pointer_generator"))
    coverage = parameters(preset("see2017_coverage"))
    assert (pointer - plain, coverage - pointer) == (1153, 512)
    assert plain - 3 * 1024 == 21_499_600  # the second biases of three LSTMs


def scaled_down(config: RnnSeq2SeqConfig, **sizes: Any) -> dict[str, Any]:
    """What makes a preset small enough for a test, leaving what it is."""
    small: dict[str, Any] = {
        "hidden_size": 64,
        "embedding_size": 32,
        "encoder_layers": min(config.encoder_layers, config.residual_start),  # 3 where the third adds its input
        "decoder_layers": min(config.decoder_layers, 2),
        **dict.fromkeys(("dropout", "embedding_dropout", "output_dropout", "attention_dropout"), 0),
        "recurrent_dropout": 0,
        **sizes,
    }
    for field, size in (
        ("encoder_hidden_size", 32),
        ("attention_hidden_size", 64),
        ("head_hidden_size", 32),
        ("encoder_ffn_size", 128),
    ):
        if getattr(config, field) is not None:
            small[field] = size
    small["encoder_heads"], small["attention_heads"] = 4, min(config.attention_heads, 4)
    return small


@pytest.mark.parametrize("name", NAMES)
def test_learns_fifty_words_by_heart(name: str) -> None:
    spelt = [" ".join(word) for word in WORDS]
    spoken = list(WORDS.values())
    if PRESETS[name].source_vocab_size is None:
        tokenizer = train_tokenizer([*spelt, *spoken], "symbols")
        sizes = {"vocab_size": len(tokenizer)}
    else:
        kinds = TokenizerArguments(source_tokenizer_kind="symbols", target_tokenizer_kind="symbols")
        tokenizer = build_tokenizer(spelt, spoken, kinds)
        sizes = {"vocab_size": tokenizer.target_vocab_size, "source_vocab_size": tokenizer.source_vocab_size}
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(preset(name, **scaled_down(preset(name), **sizes)))
    batch = tokenizer(spelt, text_target=spoken, padding=True, return_tensors="pt")
    labels = batch.pop("labels")
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def said() -> dict[int, list[str]]:
        """By greedy and by beam search."""
        model.eval()
        ids = {beams: model.generate(**batch, num_beams=beams, max_new_tokens=8) for beams in (1, 4)}
        model.train()
        return {beams: tokenizer.batch_decode(found, skip_special_tokens=True) for beams, found in ids.items()}

    steps = 400  # most presets need a quarter of them
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        output = model(**batch, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # coverage loss, where there is some, never vanishes: a letter may well have two sounds
        tokens = token_loss(output.logits, labels, "softmax")
        if tokens < 0.02:  # under dropout, which may pass over a word
            found = said()
            if all(words == spoken for words in found.values()):
                break
    assert tokens < 0.02
    assert found == dict.fromkeys(found, spoken)


def test_overrides_and_vocabularies() -> None:
    config = preset("bahdanau2015_rnnsearch50", vocab_size=800, hidden_size=50, cell_type="lstm")
    assert (config.vocab_size, config.source_vocab_size, config.hidden_size) == (800, 800, 50)
    assert (config.cell_type, config.wiring_type, config.head_hidden_size) == ("lstm", "bahdanau", 500)
    assert preset("bahdanau2015_rnnsearch50", vocab_size=800, source_vocab_size=None).shared_vocabulary
    assert preset("gnmt_v2_4layer", vocab_size=800).shared_vocabulary
    assert preset("gnmt_v2_4layer").vocab_size == 32_320
    assert preset("gnmt_v2_4layer", source_vocab_size=7).source_size == 7


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no preset 'gnmt'; there are: sutskever2014, cho2014"):
        preset("gnmt")
    with pytest.raises(StrictDataclassClassValidationError, match="context"):
        preset("cho2014", attention_type="additive")
    with pytest.raises(ValueError, match="hiden_size"):
        preset("cho2014", hiden_size=3)
