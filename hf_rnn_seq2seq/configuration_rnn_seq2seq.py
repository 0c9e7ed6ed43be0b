"""Configuration of a recurrent encoder-decoder: one field an axis, checked when it is built and when it is saved."""

import difflib
from dataclasses import fields
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .pipeline_rnn_seq2seq import with_custom_pipelines

CellType = Literal["lstm", "gru", "rnn_tanh", "rnn_relu", "ln_lstm", "ln_gru", "nematus_gru", "marian_gru", "ssru"]
EncoderType = Literal["rnn", "gnmt", "pyramidal", "conv", "transformer", "embedding"]
BridgeType = Literal["zeros", "last", "mean", "linear", "affine", "layerwise", "dense", "learned"]
AttentionType = Literal[
    "none", "dot", "scaled_dot", "general", "additive", "normed_additive", "multi_head", "location", "local_m",
    "local_p", "monotonic",
]  # fmt: skip
ScoringType = Literal["dot", "scaled_dot", "general", "additive"]
NormalizerType = Literal["softmax", "sparsemax", "entmax15"]
WiringType = Literal[
    "output_only", "input_feeding", "context_feeding", "bahdanau", "bahdanau_joined", "context", "conditional",
    "gnmt", "gnmt_v2", "rnmt_plus",
]  # fmt: skip
HeadType = Literal["linear", "deep", "deep_tanh", "pointer_generator"]

# Cells whose state is (h, c), not h alone.
CELLS_WITH_MEMORY = ("lstm", "ln_lstm", "ssru")
# Encoders made of recurrent layers; the others see the whole source at once.
RECURRENT_ENCODERS = ("rnn", "gnmt", "pyramidal")

# Probabilities that are no part of the weights' shape or meaning: they may change from one training to the next.
REGULARIZATION = (
    "dropout", "embedding_dropout", "output_dropout", "attention_dropout", "recurrent_dropout", "zoneout",
)  # fmt: skip
# Numbers of things; `None` where a default is filled in.
AT_LEAST_ONE = (
    "vocab_size", "source_vocab_size", "embedding_size", "decoder_embedding_size", "hidden_size",
    "encoder_hidden_size", "encoder_layers", "decoder_layers", "encoder_heads", "encoder_ffn_size",
    "encoder_kernel_size", "max_source_positions", "attention_hidden_size", "attention_heads",
    "attention_window", "location_filters", "location_kernel_size", "head_hidden_size", "encoder_transition_depth",
)  # fmt: skip
# What else says how to train, not what the weights are.
TRAINING_ONLY = (*REGULARIZATION, "coverage_loss_weight", "monotonic_noise")


@strict
class RnnSeq2SeqConfig(PreTrainedConfig):
    r"""
    Configuration of [`RnnSeq2SeqModel`] and [`RnnSeq2SeqForConditionalGeneration`].

    Args:
        vocab_size (`int`, defaults to 32000):
            Size of the target vocabulary V; with one shared vocabulary, of the only one.
        source_vocab_size (`int`, *optional*):
            Size of the source vocabulary when it differs from the target's. `None` means one vocabulary, with one
            embedding table for both sides; a number, even one equal to `vocab_size`, means two tables.
        embedding_size (`int`, defaults to 256):
            Width of the embeddings of the source side and, unless `decoder_embedding_size` is given, of the target.
        decoder_embedding_size (`int`, *optional*):
            Width E of the target embeddings when it differs (two vocabularies only).
        hidden_size (`int`, defaults to 512):
            Width H of the decoder's layers.
        encoder_hidden_size (`int`, *optional*):
            Width of the encoder's layers *in each direction*. Defaults to `hidden_size // 2` for a bidirectional and
            `hidden_size` for a unidirectional encoder, so that the encoder's output is as wide as the decoder.
        encoder_layers (`int`, defaults to 1), decoder_layers (`int`, defaults to 1):
            Number of layers.
        cell_type (`str`, defaults to `"lstm"`):
            `lstm` (Hochreiter & Schmidhuber 1997), `gru` (Cho et al. 2014), `rnn_tanh` (Elman 1990), `rnn_relu`
            (Le et al. 2015), `ln_lstm` and `ln_gru` (layer-normalised: Ba et al. 2016, Chen et al. 2018),
            `nematus_gru` and `marian_gru` (layer-normalised as in Nematus, Sennrich et al. 2017, and in Marian,
            Junczys-Dowmunt et al. 2018), `ssru` (no recurrent matrix: Kim et al. 2019).
        decoder_cell_type (`str`, *optional*):
            The decoder's cell where it differs.
        encoder_type (`str`, defaults to `"rnn"`):
            Encoder body: `rnn`; `gnmt`, the first layer in both directions and the rest in one, with residual
            connections from the third on (Wu et al. 2016); `pyramidal`, every layer after the first joins
            neighbouring steps and so halves the length (Chan et al. 2016); `conv`, two stacks of convolutions, one
            for the scores and one for what is attended to (Gehring et al. 2017); `transformer`, self-attention
            (Vaswani et al. 2017, with the norm first: Chen et al. 2018); `embedding`, the embeddings alone.
        bidirectional (`bool`, defaults to `True`):
            Whether every layer of an `rnn` or `pyramidal` encoder reads the source in both directions.
        encoder_transition_depth (`int`, defaults to 1):
            Number of cells that a step of a recurrent encoder's layer goes through, all after the first without input
            (deep transition: Miceli Barone et al. 2017).
        reverse_source (`bool`, defaults to `False`):
            The encoder reads the source from its end (Sutskever et al. 2014, section 3.3). Its output stays in the
            source's order.
        encoder_residual (`bool`, defaults to `False`), decoder_residual (`bool`, defaults to `False`):
            Adds a layer's input to its output (Wu et al. 2016, eq. 5-6), for the encoder of an `rnn` one.
        residual_start (`int`, defaults to 2):
            The first layer, counted from 1, with such a residual connection.
        encoder_heads (`int`, defaults to 8), encoder_ffn_size (`int`, *optional*):
            Heads and inner width of a `transformer` encoder; the width defaults to four times the encoder's.
        encoder_kernel_size (`int`, defaults to 3):
            Width of a `conv` encoder's kernels; odd.
        max_source_positions (`int`, defaults to 1024):
            Number of learnt positions of a `conv` encoder, which is the longest source it can read.
        bridge_type (`str`, defaults to `"linear"`):
            How the decoder's first state is made: `zeros`; `last`, the encoder's final states layer by layer
            (Sutskever et al. 2014); `mean`, an affine map and tanh of the mean memory (Sennrich et al. 2017);
            `linear`, an affine map and tanh of the top layer's final state (Bahdanau et al. 2015), `affine` without
            the tanh; `layerwise`, an affine map of each layer's (fairseq); `dense`, an affine map and a rectifier of
            all layers' final states, for h and c each (See et al. 2017); `learned`, parameters alone (Yoyodyne).
        attention_type (`str`, defaults to `"additive"`):
            `none`, `dot` and `general` (Luong et al. 2015), `scaled_dot` (Vaswani et al. 2017), `additive` (Bahdanau
            et al. 2015), `normed_additive` (additive with a normalised score vector; Salimans & Kingma 2016),
            `multi_head` (Vaswani et al. 2017; additive: Chen et al. 2018), `location` (additive, by content and the
            weights of the step before: Chorowski et al. 2015), `local_m` and `local_p` (a window that moves on by
            one, or whose place is predicted: Luong et al. 2015), `monotonic` (Raffel et al. 2017).
        attention_scoring (`str`, *optional*):
            How `multi_head` (`dot`, `scaled_dot`, `additive`; defaults to `scaled_dot`), `local_m` and `local_p`
            (`dot`, `scaled_dot`, `general`, `additive`; default to `general`) score.
        attention_normalizer (`str`, defaults to `"softmax"`):
            From scores to weights: `softmax`, `sparsemax` (Martins & Astudillo 2016), `entmax15` (Peters et al.
            2019). The latter two give exact zeros.
        attention_hidden_size (`int`, *optional*):
            Width A of additive attention's hidden layer, or of all heads' queries together; defaults to
            `hidden_size`.
        attention_heads (`int`, defaults to 1):
            Number of heads of `multi_head` attention.
        attention_bias (`bool`, defaults to `False`):
            A bias inside additive scoring's tanh (Nematus; See et al. 2017, eq. 1).
        layer_norm (`bool`, defaults to `False`):
            Layer normalisation (Ba et al. 2016) of `additive` attention's two projections and, where they are used,
            of the `mean` or `linear` bridge's map and the `deep_tanh` head's three (Nematus). Cells have their own.
        attention_coverage (`bool`, defaults to `False`):
            Additive scoring also sees the sum of all earlier weights (Tu et al. 2016; See et al. 2017, eq. 11).
        attention_window (`int`, defaults to 10):
            Half-width D of the window of `local_m` and `local_p`.
        location_filters (`int`, defaults to 10), location_kernel_size (`int`, defaults to 31):
            Number and (odd) width of the filters by which `location` reads the weights of the step before.
        monotonic_bias (`float`, defaults to -1.0), monotonic_noise (`float`, defaults to 1.0):
            `monotonic` attention's first scalar r, and the standard deviation of its noise in training.
        decoder_self_attention (`bool`, defaults to `False`):
            The decoder also attends to its own earlier outputs (Cheng et al. 2016; Paulus et al. 2018).
        wiring_type (`str`, defaults to `"input_feeding"`):
            Who feeds whom in a decoder step: `output_only` (attention after the recurrence, nothing fed back),
            `input_feeding` (Luong et al. 2015, section 3.3), `context_feeding` (the context is merged into the next
            step's input: Vinyals et al. 2015, See et al. 2017), `bahdanau` (attention by the previous state),
            `bahdanau_joined` (the same, with context and new state joined and not mapped before the head: Yoyodyne),
            `context` (no attention, the source's vector enters every step: Cho et al. 2014), `conditional`
            (attention between two transitions: Sennrich et al. 2017), `gnmt` (the bottom layer's last output
            attends, for all layers: Wu et al. 2016), `gnmt_v2` (its present output attends, for the layers above:
            tf/nmt, NVIDIA), `rnmt_plus` (`gnmt` with the context in the output, too: Chen et al. 2018).
        readout_type (`str`, defaults to `"tanh"`):
            From context and state to features, where the wiring has such a map: `tanh`, tanh(W [c; s]); `affine_tanh`,
            tanh(W [c; s] + b) (Nematus, JoeyNMT); `affine`, W [c; s] + b (OpenNMT-py's "mlp" attention).
        decoder_transition_depth (`int`, defaults to 2):
            Number of transitions of the `conditional` wiring's bottom layer: one before attention, the others after
            (deep transition: Miceli Barone et al. 2017).
        head_type (`str`, defaults to `"linear"`):
            From the decoder's features to logits: `linear`; `deep` (maxout: Bahdanau et al. 2015, A.2.2); `deep_tanh`
            (Sennrich et al. 2017); `pointer_generator`, which also copies source words (See et al. 2017).
        head_hidden_size (`int`, *optional*):
            Width of the hidden layer of `deep` and `deep_tanh`; defaults to `hidden_size`.
        output_normalizer (`str`, defaults to `"softmax"`):
            From scores to probabilities of the target words, and the loss that belongs to it: `softmax`,
            `sparsemax`, `entmax15` (Peters et al. 2019).
        coverage_loss_weight (`float`, defaults to 0.0):
            Weight of the coverage loss (See et al. 2017, eq. 12), which attention of any kind can have.
        dropout (`float`, defaults to 0.2):
            Between layers (Zaremba et al. 2014), and within those of a `transformer` encoder; none after the last.
        embedding_dropout (`float`, defaults to 0.2), output_dropout (`float`, defaults to 0.2):
            On the embeddings of both sides; on the features before the head.
        attention_dropout (`float`, defaults to 0.0):
            On the attention weights.
        recurrent_dropout (`float`, defaults to 0.0):
            On the recurrent input, one mask a sequence (Gal & Ghahramani 2016). Takes a loop over time steps.
        zoneout (`float`, defaults to 0.0):
            Probability that a unit keeps its old state for a step (Krueger et al. 2017). Takes a loop over time steps.
        initializer_range (`float`, defaults to 0.1):
            Standard deviation of the embeddings at the start. Matrices start as Xavier-uniform, recurrent matrices
            orthogonal, biases zero, an LSTM's forget gate at one (Jozefowicz et al. 2015).
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the output layer is the target embedding (Press & Wolf 2017), behind a projection where the
            widths differ.
        unk_token_id (`int`, *optional*, defaults to 3):
            The unknown word: what a `pointer_generator`'s decoder reads after a copied word outside the vocabulary.

    Example:

    ```python
    >>> from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration

    >>> config = RnnSeq2SeqConfig(vocab_size=100, hidden_size=64, embedding_size=32, attention_type="dot")
    >>> model = RnnSeq2SeqForConditionalGeneration(config)
    ```
    """

    model_type = "rnn_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers declares it as a plain class attribute
    attribute_map = {"num_hidden_layers": "decoder_layers"}  # noqa: RUF012  the same

    vocab_size: int = 32000
    source_vocab_size: int | None = None
    embedding_size: int = 256
    decoder_embedding_size: int | None = None
    hidden_size: int = 512
    encoder_hidden_size: int | None = None
    encoder_layers: int = 1
    decoder_layers: int = 1
    cell_type: CellType = "lstm"
    decoder_cell_type: CellType | None = None
    encoder_type: EncoderType = "rnn"
    bidirectional: bool = True
    encoder_transition_depth: int = 1
    reverse_source: bool = False
    encoder_residual: bool = False
    decoder_residual: bool = False
    residual_start: int = 2
    encoder_heads: int = 8
    encoder_ffn_size: int | None = None
    encoder_kernel_size: int = 3
    max_source_positions: int = 1024
    bridge_type: BridgeType = "linear"
    attention_type: AttentionType = "additive"
    attention_scoring: ScoringType | None = None
    attention_normalizer: NormalizerType = "softmax"
    attention_hidden_size: int | None = None
    attention_heads: int = 1
    attention_bias: bool = False
    layer_norm: bool = False
    attention_coverage: bool = False
    attention_window: int = 10
    location_filters: int = 10
    location_kernel_size: int = 31
    monotonic_bias: float | int = -1.0
    monotonic_noise: float | int = 1.0
    decoder_self_attention: bool = False
    wiring_type: WiringType = "input_feeding"
    readout_type: Literal["tanh", "affine_tanh", "affine"] = "tanh"
    decoder_transition_depth: int = 2
    head_type: HeadType = "linear"
    head_hidden_size: int | None = None
    output_normalizer: NormalizerType = "softmax"
    coverage_loss_weight: float | int = 0.0
    dropout: float | int = 0.2
    embedding_dropout: float | int = 0.2
    output_dropout: float | int = 0.2
    attention_dropout: float | int = 0.0
    recurrent_dropout: float | int = 0.0
    zoneout: float | int = 0.0
    initializer_range: float | int = 0.1
    tie_word_embeddings: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    unk_token_id: int | None = 3

    def __post_init__(self, **kwargs: Any) -> None:
        names = [field.name for field in fields(self)]
        for name in kwargs:
            # A misspelt field would otherwise be stored as a new attribute and change nothing.
            near = [match for match in difflib.get_close_matches(name, names, n=1, cutoff=0.85) if match != name]
            if near and not name.startswith("_") and not hasattr(type(self), name):
                raise ValueError(f"RnnSeq2SeqConfig has no field `{name}`; did you mean `{near[0]}`?")
        super().__post_init__(**with_custom_pipelines(kwargs))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "RnnSeq2SeqConfig":
        """This configuration. The inherited method would rename `decoder_*` fields onto others of the same ending."""
        return self

    # What the fields amount to once their defaults are filled in: what modeling code reads, never the optional fields.

    @property
    def shared_vocabulary(self) -> bool:
        return self.source_vocab_size is None

    @property
    def source_size(self) -> int:
        """Number of source ids."""
        return self.vocab_size if self.source_vocab_size is None else self.source_vocab_size

    @property
    def target_embedding_size(self) -> int:
        return self.embedding_size if self.decoder_embedding_size is None else self.decoder_embedding_size

    @property
    def encoder_direction_size(self) -> int:
        """Width of an encoder layer, in one direction of a recurrent one."""
        if self.encoder_type == "embedding":
            return self.embedding_size
        if self.encoder_hidden_size is not None:
            return self.encoder_hidden_size
        halves = self.encoder_type in ("rnn", "pyramidal") and self.bidirectional
        return self.hidden_size // 2 if halves else self.hidden_size

    @property
    def memory_size(self) -> int:
        """Width M of the encoder's output."""
        both = self.encoder_type in ("rnn", "pyramidal") and self.bidirectional
        both = both or (self.encoder_type == "gnmt" and self.encoder_layers == 1)
        return self.encoder_direction_size * (2 if both else 1)

    @property
    def encoder_cells(self) -> int:
        """Number N of state tensors that an encoder layer ends with; one without recurrence has its mean output."""
        recurrent = self.encoder_type in RECURRENT_ENCODERS
        return 2 if recurrent and self.cell_type in CELLS_WITH_MEMORY else 1

    @property
    def final_layers(self) -> int:
        """Number L of layers that the encoder hands final states of."""
        return self.encoder_layers if self.encoder_type in RECURRENT_ENCODERS else 1

    @property
    def decoder_cell(self) -> CellType:
        return self.cell_type if self.decoder_cell_type is None else self.decoder_cell_type

    @property
    def query_size(self) -> int:
        """Width Q of attention's query: h, or with `context_feeding` the whole state of the top layer."""
        whole = self.wiring_type == "context_feeding" and self.decoder_cell in CELLS_WITH_MEMORY
        return self.hidden_size * (2 if whole else 1)

    @property
    def attention_size(self) -> int:
        return self.hidden_size if self.attention_hidden_size is None else self.attention_hidden_size

    @property
    def scoring(self) -> str:
        """What scores, under the name of the kind of attention that scores so on its own."""
        if self.attention_type == "multi_head":
            return self.attention_scoring or "scaled_dot"
        if self.attention_type in ("local_m", "local_p"):
            return self.attention_scoring or "general"
        return "additive" if self.attention_type in ("location", "monotonic") else self.attention_type

    @property
    def head_size(self) -> int:
        """Width of a deep head's hidden layer."""
        return self.hidden_size if self.head_hidden_size is None else self.head_hidden_size

    # Cross-field checks; `@strict` runs every `validate_*` method at construction and at save.

    def validate_sizes(self) -> None:
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.shared_vocabulary and self.target_embedding_size != self.embedding_size:
            raise ValueError(
                f"`decoder_embedding_size`={self.decoder_embedding_size} differs from `embedding_size`="
                f"{self.embedding_size}, but one shared vocabulary has one embedding table: give `source_vocab_size`."
            )
        if self.residual_start < 2:
            raise ValueError(f"`residual_start` must be at least 2, got {self.residual_start}.")
        for name in ("encoder_kernel_size", "location_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"`{name}` must be odd, to have a middle, got {getattr(self, name)}.")

    def validate_probabilities(self) -> None:
        for name in REGULARIZATION:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {value}.")
        for name in ("initializer_range", "coverage_loss_weight", "monotonic_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.recurrent_dropout > 0 and "ssru" in (self.cell_type, self.decoder_cell):
            raise ValueError(f"`recurrent_dropout`={self.recurrent_dropout}: the cell 'ssru' has no recurrent matrix.")

    def validate_encoder(self) -> None:
        kind = self.encoder_type
        both = kind in ("rnn", "pyramidal") and self.bidirectional
        if both and self.encoder_hidden_size is None and self.hidden_size % 2:
            raise ValueError(
                f"`hidden_size` must be even for a bidirectional encoder of half the width, got {self.hidden_size}; "
                "or give `encoder_hidden_size`, the width of one direction."
            )
        if not self.bidirectional and kind not in ("rnn", "pyramidal"):
            raise ValueError(
                f"`bidirectional`=False is for the encoders 'rnn' and 'pyramidal'; `encoder_type`={kind!r} has "
                "directions of its own: leave it out."
            )
        if self.encoder_transition_depth > 1 and kind not in RECURRENT_ENCODERS:
            depth = self.encoder_transition_depth
            raise ValueError(f"`encoder_transition_depth`={depth} is for recurrent encoders: {kind!r} has no steps.")
        if self.encoder_residual and kind != "rnn":
            raise ValueError(
                f"`encoder_residual` is for `encoder_type`='rnn'; {kind!r} has residual connections of its own or "
                "none: leave it out."
            )
        if kind == "embedding" and (self.encoder_layers != 1 or self.encoder_hidden_size is not None):
            raise ValueError("`encoder_type`='embedding' has no layers: leave out `encoder_layers` and their width.")
        if kind == "transformer" and self.memory_size % self.encoder_heads:
            raise ValueError(
                f"`encoder_heads`={self.encoder_heads} must divide the encoder's width {self.memory_size}."
            )

    def validate_attention(self) -> None:
        kind, scoring = self.attention_type, self.scoring
        allowed = dict.fromkeys(("local_m", "local_p"), get_args(ScoringType))
        allowed["multi_head"] = ("dot", "scaled_dot", "additive")
        if self.attention_scoring is not None and self.attention_scoring not in allowed.get(kind, ()):
            raise ValueError(
                f"`attention_scoring`={self.attention_scoring!r} is impossible with `attention_type`={kind!r}; "
                + (f"allowed are {', '.join(allowed[kind])}." if kind in allowed else "leave it out.")
            )
        if kind != "multi_head" and scoring in ("dot", "scaled_dot") and self.memory_size != self.query_size:
            raise ValueError(
                f"`attention_type`={kind!r} needs an encoder output as wide as the decoder: "
                f"{self.memory_size} (`encoder_hidden_size` x directions) != {self.query_size} (`hidden_size`, twice "
                "for 'context_feeding' with an LSTM); use 'general', or make them equal."
            )
        additive = scoring in ("additive", "normed_additive")
        if self.attention_hidden_size is not None and not (additive or kind == "multi_head"):
            raise ValueError(
                f"`attention_hidden_size` is additive attention's hidden layer; `attention_type`="
                f"{kind!r} has none: leave it out."
            )
        if self.attention_bias and (kind == "monotonic" or scoring != "additive"):
            raise ValueError(f"`attention_bias` is for additive scoring without one, not for {kind!r} by {scoring!r}.")
        if self.layer_norm and kind != "additive":
            raise ValueError(f"`layer_norm` is of 'additive' attention's projections, and others; got {kind!r}.")
        if self.attention_coverage and kind not in ("additive", "normed_additive"):
            raise ValueError(
                "`attention_coverage` is an input to additive scoring: `attention_type` must be 'additive' or "
                f"'normed_additive', got {kind!r}."
            )
        if self.attention_heads > 1 and kind != "multi_head":
            raise ValueError(f"`attention_heads`={self.attention_heads} needs 'multi_head', got {kind!r}.")
        if kind == "multi_head" and self.attention_size % self.attention_heads:
            raise ValueError(
                f"`attention_heads`={self.attention_heads} must divide `attention_hidden_size` (defaults to "
                f"`hidden_size`), {self.attention_size}."
            )
        scores_nothing = kind in ("none", "monotonic") and not self.decoder_self_attention
        if self.attention_normalizer != "softmax" and scores_nothing:
            raise ValueError(f"`attention_normalizer`={self.attention_normalizer!r}: {kind!r} normalises no scores.")
        if kind == "none":
            for name in ("attention_dropout", "coverage_loss_weight"):
                if getattr(self, name) > 0:
                    raise ValueError(f"`{name}` must be 0 with `attention_type`='none'.")

    def validate_decoder(self) -> None:
        if self.wiring_type == "context" and (self.attention_type != "none" or self.decoder_self_attention):
            raise ValueError(
                "`wiring_type`='context' hands the source's vector to every step in place of attention: "
                f"`attention_type` must be 'none', got {self.attention_type!r}, and `decoder_self_attention` False."
            )
        if self.wiring_type == "context" and self.bridge_type in ("zeros", "learned"):
            kind = self.bridge_type
            raise ValueError(f"`wiring_type`='context' takes the source's vector from the bridge, which is {kind!r}.")
        if self.wiring_type in ("gnmt", "gnmt_v2") and self.decoder_layers < 2:
            raise ValueError(
                f"`wiring_type`={self.wiring_type!r} feeds the layers above the bottom one: `decoder_layers` must be "
                f"at least 2, got {self.decoder_layers}."
            )
        if self.decoder_transition_depth < 2 or (
            self.decoder_transition_depth != 2 and self.wiring_type != "conditional"
        ):
            raise ValueError(
                "`decoder_transition_depth` must be at least 2, and other than 2 needs `wiring_type`='conditional'; "
                f"got {self.decoder_transition_depth} with {self.wiring_type!r}."
            )

    def validate_head(self) -> None:
        if self.head_hidden_size is not None and self.head_type not in ("deep", "deep_tanh"):
            raise ValueError(f"`head_hidden_size` is the 'deep' heads'; `head_type`={self.head_type!r} has none.")
        if self.head_type != "pointer_generator":
            return
        if self.attention_type == "none":
            raise ValueError("`head_type`='pointer_generator' copies by attention: `attention_type` can't be 'none'.")
        if self.encoder_type == "pyramidal":
            raise ValueError(
                "`head_type`='pointer_generator' copies the word at each source position, which a 'pyramidal' encoder "
                "joins with its neighbours."
            )
        if self.output_normalizer != "softmax":
            raise ValueError(
                f"`output_normalizer`={self.output_normalizer!r} is impossible with `head_type`='pointer_generator', "
                "whose probabilities are a mixture; allowed is 'softmax'."
            )
        if self.unk_token_id is None:
            raise ValueError("`head_type`='pointer_generator' needs `unk_token_id`, got None.")

    def validate_token_ids(self) -> None:
        smaller = min(self.vocab_size, self.source_size)
        for name, bound in (
            ("pad_token_id", smaller),
            ("bos_token_id", self.vocab_size),
            ("decoder_start_token_id", self.vocab_size),
            ("eos_token_id", self.vocab_size),
            *([("unk_token_id", self.vocab_size)] if self.head_type == "pointer_generator" else []),
        ):
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not 0 <= one < bound:
                    raise ValueError(f"`{name}`={one} lies outside the vocabulary of {bound} ids.")


__all__ = ["RnnSeq2SeqConfig"]
