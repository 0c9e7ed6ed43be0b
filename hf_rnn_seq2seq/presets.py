"""Published systems as configurations: data, each under its citation.

`preset(name, vocab_size=..., **overrides)` gives the configuration. A preset holds the architecture and its
regularisation at the paper's size; how it was trained (optimiser, batches, learning rate) belongs to a recipe.

Each entry says what differs from the paper. Two things hold for all: a torch LSTM or GRU has two bias vectors a gate
where most papers have one, and a GRU's reset gate acts after the product (as in cuDNN) where Cho et al. (2014) apply
it before.
"""

from dataclasses import dataclass
from typing import Any

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig


@dataclass(frozen=True)
class Preset:
    """
    Args:
        paper: what it is and where it was published; then what is different here.
        settings: fields of [`RnnSeq2SeqConfig`].
        vocab_size, source_vocab_size: the paper's; the latter `None` for one vocabulary.
        parameters: the paper's own count (or that of the paper's code) at these vocabularies, where there is one.
        rounded_to: the last digit that the paper gives of it.
        deviation: by how many parameters ours has more, all accounted for in `paper`.
    """

    paper: str
    settings: dict[str, Any]
    vocab_size: int
    source_vocab_size: int | None = None
    parameters: int | None = None
    rounded_to: int = 1
    deviation: int = 0


# What every paper without dropout has of it.
NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0}

LUONG: dict[str, Any] = {
    "embedding_size": 1000,
    "hidden_size": 1000,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "cell_type": "lstm",
    "bidirectional": False,
    "reverse_source": True,
    "bridge_type": "last",
    "attention_type": "general",
    "wiring_type": "output_only",
    "dropout": 0.2,
    "embedding_dropout": 0.2,
    "output_dropout": 0.2,
}

SEE: dict[str, Any] = {
    "embedding_size": 128,
    "hidden_size": 256,
    "encoder_hidden_size": 256,
    "cell_type": "lstm",
    "bridge_type": "dense",
    "attention_type": "additive",
    "attention_hidden_size": 512,
    "attention_bias": True,
    "wiring_type": "context_feeding",
    "head_type": "pointer_generator",
    **NO_DROPOUT,
}

GNMT: dict[str, Any] = {
    "embedding_size": 1024,
    "hidden_size": 1024,
    "cell_type": "lstm",
    "encoder_type": "gnmt",
    "bridge_type": "zeros",
    "attention_type": "normed_additive",
    "decoder_residual": True,
    "residual_start": 3,
    "dropout": 0.2,
    "embedding_dropout": 0.2,
    "output_dropout": 0.0,
}

RNMT_PLUS_DECODER: dict[str, Any] = {
    "embedding_size": 1024,
    "hidden_size": 1024,
    "decoder_layers": 8,
    "decoder_cell_type": "ln_lstm",
    "bridge_type": "zeros",
    "attention_type": "multi_head",
    "attention_scoring": "additive",
    "attention_heads": 4,
    "wiring_type": "rnmt_plus",
    "decoder_residual": True,
    "residual_start": 3,
    "dropout": 0.2,
    "embedding_dropout": 0.2,
    "attention_dropout": 0.2,
    "output_dropout": 0.0,
}

PRESETS: dict[str, Preset] = {
    "sutskever2014": Preset(
        paper="""Sutskever, Vinyals & Le 2014, Sequence to Sequence Learning with Neural Networks, section 3.4: four
        layers of 1,000 cells, 1,000-dimensional embeddings, the source reversed, no attention. Section 3.4 counts 384M
        parameters, 64M of them recurrent. Ours has biases beside (8 layers x 8,000, and 80,000 of the output).""",
        settings={
            "embedding_size": 1000,
            "hidden_size": 1000,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "cell_type": "lstm",
            "bidirectional": False,
            "reverse_source": True,
            "bridge_type": "last",
            "attention_type": "none",
            "wiring_type": "output_only",
            **NO_DROPOUT,
        },
        vocab_size=80_000,
        source_vocab_size=160_000,
        parameters=384_000_000,
        rounded_to=1_000_000,
        deviation=8 * 8_000 + 80_000,
    ),
    "cho2014": Preset(
        paper="""Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
        Translation, section 4.1 and appendix A: 1,000 gated units, 100-dimensional embeddings, the source's vector in
        every step and in the output, a maxout layer of 500. No count is published.""",
        settings={
            "embedding_size": 100,
            "hidden_size": 1000,
            "cell_type": "gru",
            "bidirectional": False,
            "bridge_type": "linear",
            "attention_type": "none",
            "wiring_type": "context",
            "head_type": "deep",
            "head_hidden_size": 500,
            "initializer_range": 0.01,
            **NO_DROPOUT,
        },
        vocab_size=15_000,
        source_vocab_size=15_000,
    ),
    "bahdanau2015_rnnsearch50": Preset(
        paper="""Bahdanau, Cho & Bengio 2015, Neural Machine Translation by Jointly Learning to Align and Translate,
        appendix A and B.1: 1,000 gated units a direction, 620-dimensional embeddings, alignment model of 1,000, maxout
        of 500. The bridge reads both directions where theirs reads the backward one. No count is published.""",
        settings={
            "embedding_size": 620,
            "hidden_size": 1000,
            "encoder_hidden_size": 1000,
            "cell_type": "gru",
            "bridge_type": "linear",
            "attention_type": "additive",
            "wiring_type": "bahdanau",
            "head_type": "deep",
            "head_hidden_size": 500,
            "initializer_range": 0.01,
            **NO_DROPOUT,
        },
        vocab_size=30_000,
        source_vocab_size=30_000,
    ),
    "luong2015_global": Preset(
        paper="""Luong, Pham & Manning 2015, Effective Approaches to Attention-based Neural Machine Translation,
        section 4.1: four layers of 1,000 cells, 1,000-dimensional embeddings, the source reversed, dropout 0.2; global
        attention by the general score, without input feeding. No count is published.""",
        settings=LUONG,
        vocab_size=50_000,
        source_vocab_size=50_000,
    ),
    "luong2015_local_p": Preset(
        paper="""Luong, Pham & Manning 2015, table 1, the best single model: local-p attention (window 10) by the
        general score, with input feeding. No count is published.""",
        settings={**LUONG, "attention_type": "local_p", "attention_window": 10, "wiring_type": "input_feeding"},
        vocab_size=50_000,
        source_vocab_size=50_000,
    ),
    "luong2015_input_feeding": Preset(
        paper="""Luong, Pham & Manning 2015, section 3.3: `luong2015_global` with input feeding. No count is
        published.""",
        settings={**LUONG, "wiring_type": "input_feeding"},
        vocab_size=50_000,
        source_vocab_size=50_000,
    ),
    "gnmt2016": Preset(
        paper="""Wu et al. 2016, Google's Neural Machine Translation System, sections 3 and 8.3: eight encoder layers,
        the first in both directions, eight decoder layers of 1,024, residual connections from the third on, the bottom
        layer's last output attends for all, word pieces. Shazeer et al. 2017 (table 2) give 278M parameters with 32K
        word pieces a side. Ours has 1.1 % more, and neither paper says enough to tell where.""",
        settings={**GNMT, "encoder_layers": 8, "decoder_layers": 8, "wiring_type": "gnmt"},
        vocab_size=32_000,
        source_vocab_size=32_000,
        parameters=278_000_000,
        rounded_to=1_000_000,
        deviation=2_929_537,
    ),
    "gnmt_v2_4layer": Preset(
        paper="""tf/nmt's `wmt16_gnmt_4_layer` (Luong, Brevdo & Zhao 2017) in the form of NVIDIA's
        DeepLearningExamples (GNMT v2): four layers a side, the bottom decoder layer's present output attends for the
        layers above, one embedding table, an output layer of its own; V = 32,320. The count is the sum of that code's
        layers: exactly ours.""",
        settings={**GNMT, "encoder_layers": 4, "decoder_layers": 4, "wiring_type": "gnmt_v2"},
        vocab_size=32_320,
        parameters=160_671_297,
    ),
    "nematus2017": Preset(
        paper="""Sennrich et al. 2017, Nematus: a Toolkit for Neural Machine Translation: conditional GRU, mean bridge,
        attention in a layer as wide as the memory; sizes of Sennrich et al. 2016 (Edinburgh at WMT16): embeddings of
        500, 1,024 units. Our readout is as wide as the decoder, theirs as the embedding. No count is published.""",
        settings={
            "embedding_size": 500,
            "hidden_size": 1024,
            "encoder_hidden_size": 1024,
            "cell_type": "gru",
            "bridge_type": "mean",
            "attention_type": "additive",
            "attention_hidden_size": 2048,
            "attention_bias": True,
            "wiring_type": "conditional",
            "dropout": 0.2,
            "embedding_dropout": 0.2,
            "output_dropout": 0.2,
            "recurrent_dropout": 0.2,
        },
        vocab_size=90_000,
        source_vocab_size=90_000,
    ),
    "see2017_pointer_generator": Preset(
        paper="""See, Liu & Manning 2017, Get To The Point: Summarization with Pointer-Generator Networks, sections 2
        and 5: 256 cells a direction, 128-dimensional embeddings, V = 50,000. Section 5: 21,499,600 parameters and
        1,153 for the pointer; ours has the second biases of three LSTMs (3 x 1,024) beside.""",
        settings=SEE,
        vocab_size=50_000,
        parameters=21_499_600 + 1_153,
        deviation=3 * 1_024,
    ),
    "see2017_coverage": Preset(
        paper="""See, Liu & Manning 2017, section 2.3: `see2017_pointer_generator` with coverage, 512 parameters more,
        and the coverage loss of weight 1.""",
        settings={**SEE, "attention_coverage": True, "coverage_loss_weight": 1.0},
        vocab_size=50_000,
        parameters=21_499_600 + 1_153 + 512,
        deviation=3 * 1_024,
    ),
    "chen2018_rnmt_plus": Preset(
        paper="""Chen et al. 2018, The Best of Both Worlds: Combining Recent Advances in Neural Machine Translation,
        section 3: six bidirectional encoder layers and eight decoder layers of 1,024 layer-normalised cells, residual
        connections from the third on, additive attention of four heads to every layer and the softmax, 32K word
        pieces a side. Table 5: 378.9M parameters. Their projection after the encoder is here attention's projection
        of the values; ours has projections of the keys and of the context (2 x 1,024 x 1,024) and a bias of the
        output (32,000) beside.""",
        settings={
            **RNMT_PLUS_DECODER,
            "encoder_layers": 6,
            "encoder_hidden_size": 1024,
            "cell_type": "ln_lstm",
            "encoder_residual": True,
        },
        vocab_size=32_000,
        source_vocab_size=32_000,
        parameters=378_900_000,
        rounded_to=100_000,
        deviation=2 * 1_024 * 1_024 + 32_000,
    ),
    "hybrid_transformer_rnn": Preset(
        paper="""Chen et al. 2018, section 5.1: the encoder of the big Transformer (six layers of 1,024, 16 heads,
        inner width 8,192) and the decoder of RNMT+, later the form of Google Translate (Caswell & Liang 2020, Recent
        Advances in Google Translate). No count is published.""",
        settings={
            **RNMT_PLUS_DECODER,
            "encoder_type": "transformer",
            "encoder_layers": 6,
            "encoder_heads": 16,
            "encoder_ffn_size": 8192,
        },
        vocab_size=32_000,
        source_vocab_size=32_000,
    ),
    "gehring2017_conv": Preset(
        paper="""Gehring et al. 2017, A Convolutional Encoder Model for Neural Machine Translation, sections 3.2, 4.3
        (IWSLT): convolutions of width 3 over words and positions, an LSTM decoder of 256 fed with its attention. There
        the two stacks have six and three layers, here six each. No count is published.""",
        settings={
            "embedding_size": 256,
            "hidden_size": 256,
            "encoder_type": "conv",
            "encoder_layers": 6,
            "encoder_kernel_size": 3,
            "cell_type": "lstm",
            "bridge_type": "mean",
            "attention_type": "general",
            "wiring_type": "input_feeding",
            "dropout": 0.0,
            "embedding_dropout": 0.2,
            "output_dropout": 0.2,
        },
        vocab_size=32_000,
        source_vocab_size=32_000,
    ),
    "ssru_student": Preset(
        paper="""Kim et al. 2019, From Research to Production and Back: Ludicrously Fast Neural Machine Translation,
        and Bogoychev et al. 2020 (the "tiny" student): a transformer encoder of six layers of 256 and a decoder of two
        simpler simple recurrent units, all embeddings tied. There each decoder layer attends and has a feed-forward
        part; here the top one attends (eight heads). No count of this form is published.""",
        settings={
            "embedding_size": 256,
            "hidden_size": 256,
            "encoder_type": "transformer",
            "encoder_layers": 6,
            "encoder_heads": 8,
            "encoder_ffn_size": 1536,
            "decoder_layers": 2,
            "decoder_cell_type": "ssru",
            "decoder_residual": True,
            "bridge_type": "zeros",
            "attention_type": "multi_head",
            "attention_heads": 8,
            "wiring_type": "output_only",
            "tie_word_embeddings": True,
            "dropout": 0.1,
            "embedding_dropout": 0.1,
            "output_dropout": 0.0,
        },
        vocab_size=32_000,
    ),
    "kann2016_med": Preset(
        paper="""Kann & Schuetze 2016, MED: The LMU System for the SIGMORPHON 2016 Shared Task on Morphological
        Reinflection: Bahdanau's model on characters and tags with 100 units and embeddings of 300. No count is
        published (it depends on the language's alphabet).""",
        settings={
            "embedding_size": 300,
            "hidden_size": 100,
            "encoder_hidden_size": 100,
            "cell_type": "gru",
            "bridge_type": "linear",
            "attention_type": "additive",
            "wiring_type": "bahdanau",
            "head_type": "deep",
            **NO_DROPOUT,
        },
        vocab_size=100,
    ),
    "deepspin2020_g2p": Preset(
        paper="""Peters & Martins 2020, DeepSPIN at SIGMORPHON 2020: One-Size-Fits-All Multilingual Models, task 1, and
        its code's configuration: two bidirectional layers of 512 a direction, two decoder layers of 512, input
        feeding, sparsemax in attention and output. Their 128-wide embeddings are 108 of the character and 20 of the
        language. No count is published.""",
        settings={
            "embedding_size": 128,
            "hidden_size": 512,
            "encoder_hidden_size": 512,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "cell_type": "lstm",
            "bridge_type": "linear",
            "attention_type": "general",
            "attention_normalizer": "sparsemax",
            "wiring_type": "input_feeding",
            "output_normalizer": "sparsemax",
            "dropout": 0.3,
            "embedding_dropout": 0.0,
            "output_dropout": 0.3,
        },
        vocab_size=100,
        source_vocab_size=100,
    ),
    "las2016_text": Preset(
        paper="""Chan et al. 2016, Listen, Attend and Spell, section 4: a bidirectional layer below three pyramidal
        ones of 256 a direction, a decoder of two layers of 512 fed with its attention's context; here on embedded
        tokens where theirs listens to filter banks. No count is published.""",
        settings={
            "embedding_size": 512,
            "hidden_size": 512,
            "encoder_type": "pyramidal",
            "encoder_layers": 4,
            "encoder_hidden_size": 256,
            "decoder_layers": 2,
            "cell_type": "lstm",
            "bridge_type": "zeros",
            "attention_type": "multi_head",
            "attention_heads": 1,
            "wiring_type": "context_feeding",
            **NO_DROPOUT,
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
    "tutorial_gru": Preset(
        paper="""After the textbook encoder-decoder without attention (Cho et al. 2014): a bidirectional GRU encoder
        whose last states start a GRU decoder.""",
        settings={
            "cell_type": "gru",
            "bridge_type": "linear",
            "attention_type": "none",
            "wiring_type": "output_only",
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
    "tutorial_gru_attention": Preset(
        paper="""`tutorial_gru` with additive attention (Bahdanau et al. 2015).""",
        settings={
            "cell_type": "gru",
            "bridge_type": "linear",
            "attention_type": "additive",
            "wiring_type": "bahdanau",
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
    "tutorial_lstm_dot": Preset(
        paper="""LSTM encoder and decoder with dot-product attention (Luong et al. 2015).""",
        settings={
            "cell_type": "lstm",
            "bidirectional": False,
            "bridge_type": "last",
            "attention_type": "dot",
            "wiring_type": "output_only",
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
    "tutorial_conv_lstm": Preset(
        paper="""Convolutions over the input, then an LSTM decoder (after Gehring et al. 2017).""",
        settings={
            "encoder_type": "conv",
            "encoder_layers": 3,
            "cell_type": "lstm",
            "bridge_type": "mean",
            "attention_type": "dot",
            "wiring_type": "output_only",
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
    "tutorial_multi_head": Preset(
        paper="""Self-attention and feed-forward layers for the encoder, a recurrent decoder with attention of many
        heads and a feed-forward (maxout) layer before the output (after Vaswani et al. 2017, Chen et al. 2018).""",
        settings={
            "encoder_type": "transformer",
            "encoder_layers": 2,
            "encoder_heads": 8,
            "cell_type": "lstm",
            "bridge_type": "mean",
            "attention_type": "multi_head",
            "attention_heads": 8,
            "wiring_type": "output_only",
            "head_type": "deep",
        },
        vocab_size=10_000,
        source_vocab_size=10_000,
    ),
}


def preset(name: str, vocab_size: int | None = None, **overrides: Any) -> RnnSeq2SeqConfig:
    """
    The configuration of a published system.

    Args:
        name: one of `PRESETS`.
        vocab_size: size of the target vocabulary; the paper's by default.
        overrides: any field of [`RnnSeq2SeqConfig`]. `source_vocab_size` is, unless given, `None` (one vocabulary)
            where the paper has one; where it has two, the paper's, or `vocab_size` if that is given.

    Raises:
        ValueError: there is no such preset, or the settings are impossible together.

    Example:

    ```python
    >>> from hf_rnn_seq2seq import preset

    >>> config = preset("bahdanau2015_rnnsearch50", vocab_size=8000, hidden_size=500, encoder_hidden_size=500)
    ```
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are: {', '.join(PRESETS)}.")
    found = PRESETS[name]
    sizes: dict[str, Any] = {"vocab_size": found.vocab_size, "source_vocab_size": found.source_vocab_size}
    if vocab_size is not None:
        sizes = {"vocab_size": vocab_size, "source_vocab_size": vocab_size if found.source_vocab_size else None}
    return RnnSeq2SeqConfig(**{**sizes, **found.settings, **overrides})
