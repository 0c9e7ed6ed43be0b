"""transformers' own tests of a model class, `ModelTesterMixin` and `GenerationTesterMixin`, run on ours.

They are not part of the installed library. Unpack the source distribution of the installed version (or check its tag
out) and name the folder: `TRANSFORMERS_SOURCE=.../transformers-5.23.0 pytest tests/test_transformers_common.py`;
without it this file is skipped. The source distribution lacks the generation and export tests, a git checkout has
them; what is there is run. They need the package `parameterized`.

A class of tests a configuration, some four seconds each; together they have every value of every axis.
"""

import importlib
import importlib.util
import os
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_rnn_seq2seq import RnnSeq2SeqCache, RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqModel

PACKAGE = "transformers_tests"  # not `tests`, which may be this folder


def import_common_tests(source: Path) -> types.ModuleType:
    """The module with the mixins. Modules that a source distribution lacks are replaced by their empty classes."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(source / "tests")]
    sys.modules[PACKAGE] = package
    for folder, module_name, mixin in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        if not (source / "tests" / folder / f"{module_name}.py").is_file():
            sys.modules[f"{PACKAGE}.{folder}"] = types.ModuleType(f"{PACKAGE}.{folder}")
            module = sys.modules[f"{PACKAGE}.{folder}.{module_name}"] = types.ModuleType(module_name)
            setattr(module, mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no unpacked source of transformers", allow_module_level=True)
if f'"{transformers.__version__}"' not in (Path(SOURCE) / "src/transformers/__init__.py").read_text():
    pytest.skip(f"TRANSFORMERS_SOURCE is not of version {transformers.__version__}", allow_module_level=True)
pytest.importorskip("parameterized")
common: Any = import_common_tests(Path(SOURCE))


# Small, and together nearly every value of every axis. Two vocabularies where `source_vocab_size` is given.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LstmAdditiveInputFeedingLinear": {"cell_type": "lstm", "attention_type": "additive"},
    "GruGeneralBahdanauTwoVocabularies": {
        "cell_type": "gru",
        "attention_type": "general",
        "wiring_type": "bahdanau",
        "bridge_type": "mean",
        "source_vocab_size": 53,
    },
    "RnnTanhDotOutputOnlyTiedUnidirectional": {
        "cell_type": "rnn_tanh",
        "attention_type": "dot",
        "wiring_type": "output_only",
        "bridge_type": "last",
        "bidirectional": False,
        "tie_word_embeddings": True,
    },
    "RnnReluScaledDotZerosResidual": {
        "cell_type": "rnn_relu",
        "attention_type": "scaled_dot",
        "wiring_type": "input_feeding",
        "bridge_type": "zeros",
        "encoder_residual": True,
        "decoder_residual": True,
    },
    "LstmIntoGruNormedAdditiveTwoVocabulariesTied": {
        "cell_type": "lstm",
        "decoder_cell_type": "gru",
        "attention_type": "normed_additive",
        "wiring_type": "bahdanau",
        "bridge_type": "last",
        "source_vocab_size": 53,
        "tie_word_embeddings": True,
    },
    "GruIntoLstmNoAttentionOneLayer": {
        "cell_type": "gru",
        "decoder_cell_type": "lstm",
        "attention_type": "none",
        "wiring_type": "output_only",
        "bridge_type": "last",
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "LnGruConditionalSparsemaxCoverageDeep": {
        "cell_type": "ln_gru",
        "wiring_type": "conditional",
        "bridge_type": "dense",
        "attention_normalizer": "sparsemax",
        "attention_coverage": True,
        "head_type": "deep",
        "tie_word_embeddings": True,
    },
    "GnmtMultiHeadEntmax": {
        "encoder_type": "gnmt",
        "wiring_type": "gnmt_v2",
        "attention_type": "multi_head",
        "attention_heads": 2,
        "output_normalizer": "entmax15",
    },
    "TransformerSsruSelfAttention": {
        "encoder_type": "transformer",
        "encoder_heads": 2,
        "decoder_cell_type": "ssru",
        "wiring_type": "rnmt_plus",
        "attention_type": "location",
        "decoder_self_attention": True,
        "bridge_type": "mean",
    },
    "ConvLnLstmGnmtLocal": {
        "encoder_type": "conv",
        "decoder_cell_type": "ln_lstm",
        "wiring_type": "gnmt",
        "attention_type": "local_p",
    },
    "PyramidalContext": {
        "encoder_type": "pyramidal",
        "wiring_type": "context",
        "attention_type": "none",
    },
    "PointerGeneratorCoverage": {
        "wiring_type": "context_feeding",
        "attention_coverage": True,
        "coverage_loss_weight": 1.0,
        "head_type": "pointer_generator",
        "reverse_source": True,
    },
    "Monotonic": {"attention_type": "monotonic"},
    "RecurrentDropoutZoneout": {"recurrent_dropout": 0.1, "zoneout": 0.1, "attention_dropout": 0.1},
}

# Tests that know of one vocabulary only, and why they can't hold for two.
ONE_VOCABULARY = {
    "test_inputs_embeds": "looks the decoder's ids up in the source embeddings",
    "test_inputs_embeds_matches_input_ids": "looks the decoder's ids up in the source embeddings",
    "test_resize_tokens_embeddings": "expects resizing the source embeddings to change the target's `vocab_size`",
}
# And those that know of softmax, or of a head that reads the decoder alone.
SPARSE_OUTPUT = {
    "test_encoder_decoder_loss_no_double_shift": "expects a loss of `logits`; entmax loss is one of the scores before",
}
COPYING = {
    "test_inputs_embeds": "copying needs `copy_ids` where there are no `input_ids`",
    "test_inputs_embeds_matches_input_ids": "copying needs `copy_ids` where there are no `input_ids`",
}
# It reads arguments of from_pretrained() in many ways, none of which knows of a configuration: three seconds each.
ONCE = {"test_bc_torch_dtype": "runs with the first configuration"}


class RnnSeq2SeqModelTester:
    """Configuration and inputs in the form that the mixins ask for. (They want one number of layers and one width.)"""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {"encoder_layers": 2, "decoder_layers": 2} | fields
        self.batch_size = 4
        self.seq_length = 7
        self.encoder_seq_length = self.decoder_seq_length = self.seq_length
        self.is_training = True
        self.hidden_size = 16
        self.num_hidden_layers = self.fields["decoder_layers"]
        self.num_attention_heads = 1

    def get_config(self) -> RnnSeq2SeqConfig:
        return RnnSeq2SeqConfig(
            vocab_size=61, embedding_size=self.hidden_size, hidden_size=self.hidden_size, **self.fields
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[RnnSeq2SeqConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        # no special tokens inside a sequence
        source = common.ids_tensor([self.batch_size, self.seq_length], config.source_size).clamp(3)
        target = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size).clamp(3)
        attention_mask = common.random_attention_mask([self.batch_size, self.seq_length])
        return config, {
            "input_ids": source,
            "attention_mask": attention_mask,
            "decoder_input_ids": target,
            "decoder_attention_mask": torch.ones_like(target),
        }


class CommonTests(common.ModelTesterMixin, common.GenerationTesterMixin):
    """What all configurations share; `fields` is the configuration."""

    fields: dict[str, Any]
    all_model_classes = (RnnSeq2SeqModel, RnnSeq2SeqForConditionalGeneration)
    is_encoder_decoder = True
    # Cross-attention alone. The tests behind this flag want self-attention of both sides as well, in every layer.
    has_attentions = False
    # transformers lets off classes whose configuration's file has no copyright line with a year since 2023
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = RnnSeq2SeqModelTester(self.fields)

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: RnnSeq2SeqCache, seq_length: int, config: RnnSeq2SeqConfig
    ) -> None:
        """The mixin's hook for caches without keys and values."""
        assert isinstance(past_key_values, RnnSeq2SeqCache)
        assert past_key_values.get_seq_length() == seq_length
        assert past_key_values.batch_size == batch_size

    def _check_caches_are_equal(self, cache1: RnnSeq2SeqCache, cache2: RnnSeq2SeqCache) -> None:
        """The same."""
        assert cache1.state is not None
        assert cache2.state is not None
        torch.testing.assert_close(cache1.state.tensors(), cache2.state.tensors())


@pytest.fixture(autouse=True, scope="module")
def listed_by_transformers() -> Iterator[None]:
    """The mixins look classes up in transformers' tables to learn which has a loss; ours are not in there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.MODEL_MAPPING_NAMES, "rnn_seq2seq", RnnSeq2SeqModel.__name__)
        seq2seq = common.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        patch.setitem(seq2seq, "rnn_seq2seq", RnnSeq2SeqForConditionalGeneration.__name__)
        yield


def skipped(reason: str) -> Callable[[unittest.TestCase], None]:
    return unittest.skip(reason)(lambda self: None)


for name, fields in CONFIGURATIONS.items():
    body: dict[str, Any] = {"fields": fields, "__module__": __name__}
    if "source_vocab_size" in fields:
        body |= {test: skipped(reason) for test, reason in ONE_VOCABULARY.items()}
    if "output_normalizer" in fields:
        body |= {test: skipped(reason) for test, reason in SPARSE_OUTPUT.items()}
    if fields.get("head_type") == "pointer_generator":
        body |= {test: skipped(reason) for test, reason in COPYING.items()}
    if name != next(iter(CONFIGURATIONS)):
        body |= {test: skipped(reason) for test, reason in ONCE.items()}
    globals()[f"{name}Test"] = type(f"{name}Test", (CommonTests, unittest.TestCase), body)
