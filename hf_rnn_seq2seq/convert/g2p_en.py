"""g2p_en 2.x (Park & Kim 2019): English words to ARPAbet phones, two GRUs without attention.

Reads `checkpoint20.npz`, which lies in the folder of the installed package:

    python -c "import importlib.util as u; print(u.find_spec('g2p_en').submodule_search_locations[0])"

or in its wheel (`pip download --no-deps g2p_en==2.1.0`, a zip archive). The model is `G2p().predict`, for one word in
lower-case letters; what `G2p()` does around it (numbers, homographs, a look-up in CMUdict) is no part of it.

The encoder reads the letters and `</s>`, its last state is the decoder's first, and at most 20 phones come out. In
g2p_en `</s>` is the letter 2 and the phone 3; one tokenizer has one id for a name, so the letters' is spelt `</w>`.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ..configuration_rnn_seq2seq import RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import ConversionError, ConversionOptions, Converted, check_files
from .vocabularies import SpecialTokens, character_backend, make_side, whitespace_backend

PAD, UNK, BOS, EOS, END_OF_LETTERS = "<pad>", "<unk>", "<s>", "</s>", "</w>"
GRAPHEMES = (PAD, UNK, END_OF_LETTERS, *"abcdefghijklmnopqrstuvwxyz")
PHONEMES = (
    PAD, UNK, BOS, EOS,
    "AA0", "AA1", "AA2", "AE0", "AE1", "AE2", "AH0", "AH1", "AH2", "AO0", "AO1", "AO2", "AW0", "AW1", "AW2",
    "AY0", "AY1", "AY2", "B", "CH", "D", "DH", "EH0", "EH1", "EH2", "ER0", "ER1", "ER2", "EY0", "EY1", "EY2",
    "F", "G", "HH", "IH0", "IH1", "IH2", "IY0", "IY1", "IY2", "JH", "K", "L", "M", "N", "NG", "OW0", "OW1", "OW2",
    "OY0", "OY1", "OY2", "P", "R", "S", "SH", "T", "TH", "UH0", "UH1", "UH2", "UW", "UW0", "UW1", "UW2",
    "V", "W", "Y", "Z", "ZH",
)  # fmt: skip
MAX_PHONES = 20

# Their arrays and our parameters.
NAMES = {
    "enc_emb": "model.encoder.embed_tokens.weight",
    "dec_emb": "model.decoder.embed_tokens.weight",
    "fc_w": "head.output.weight",
    "fc_b": "head.output.bias",
}
LAYERS = {
    "enc": "model.encoder.body.layers.0.directions.forward_layer",
    "dec": "model.decoder.wiring.stack.layers.0",
}
for _side, _layer in LAYERS.items():
    for _theirs, _ours in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("b_ih", "bias_ih"), ("b_hh", "bias_hh")):
        NAMES[f"{_side}_{_theirs}"] = f"{_layer}.{_ours}"


def convert(path: Path, options: ConversionOptions) -> Converted:
    """
    Args:
        path: `checkpoint20.npz`.
        options: no further files.
    """
    check_files(options, ())
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ConversionError(f"{path} is no NumPy archive of plain arrays: {error}.") from error
    if arrays.keys() != NAMES.keys():
        missing, unknown = sorted(NAMES.keys() - arrays.keys()), sorted(arrays.keys() - NAMES.keys())
        raise ConversionError(f"{path} is no g2p_en model: arrays missing {missing}, unknown {unknown}.")
    sizes = len(arrays["enc_emb"]), len(arrays["dec_emb"])
    if sizes != (len(GRAPHEMES), len(PHONEMES)):
        raise ConversionError(
            f"{path} has embeddings of {sizes[0]} letters and {sizes[1]} phones; g2p_en has {len(GRAPHEMES)} and "
            f"{len(PHONEMES)}."
        )
    config = RnnSeq2SeqConfig(
        vocab_size=len(PHONEMES),
        source_vocab_size=len(GRAPHEMES),
        embedding_size=arrays["enc_emb"].shape[1],
        decoder_embedding_size=arrays["dec_emb"].shape[1],
        hidden_size=arrays["dec_w_hh"].shape[1],
        encoder_hidden_size=arrays["enc_w_hh"].shape[1],
        cell_type="gru",
        bidirectional=False,
        bridge_type="last",
        attention_type="none",
        wiring_type="output_only",
        pad_token_id=PHONEMES.index(PAD),
        bos_token_id=PHONEMES.index(BOS),
        eos_token_id=PHONEMES.index(EOS),
        decoder_start_token_id=PHONEMES.index(BOS),
        unk_token_id=PHONEMES.index(UNK),
    )
    return Converted(
        config=config,
        weights={NAMES[name]: torch.from_numpy(array) for name, array in arrays.items()},
        tokenizer=_tokenizer(),
        origin="g2p_en 2",
        notes=("Words are spelt in lower-case letters; any other character is unknown.",),
        generation={"max_new_tokens": MAX_PHONES},
    )


def _tokenizer() -> RnnSeq2SeqTokenizer:
    letters: Tokenizer = character_backend(GRAPHEMES, UNK)
    phones: Tokenizer = whitespace_backend(PHONEMES, UNK)
    return RnnSeq2SeqTokenizer(
        make_side(letters, SpecialTokens(pad=PAD, eos=END_OF_LETTERS, unk=UNK), after=(END_OF_LETTERS,)),
        make_side(phones, SpecialTokens(pad=PAD, bos=BOS, eos=EOS, unk=UNK), after=(EOS,)),
    )
