"""Unknown words replaced by the source words that were attended to, against a plain search through single rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from transformers import PreTrainedTokenizerFast
from transformers.generation import GenerateEncoderDecoderOutput

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.ensemble import RnnSeq2SeqEnsemble
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer
from hf_rnn_seq2seq.unknown_words import (
    SourceWord,
    read_dictionary,
    replace_unknown_words,
    tokenize_with_words,
)

SOURCES = ["a b c a", "Zoë b", "q a Zoë c b a r", "c"]  # q, r and Zoë are known to no vocabulary
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 4, "num_return_sequences": 2, "use_cache": False},
    {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
]


def pair(side: str = "right") -> RnnSeq2SeqTokenizer:
    source, target = train_tokenizer(["a b c"], "symbols"), train_tokenizer(["x y z w"], "symbols")
    return RnnSeq2SeqTokenizer(source, target, padding_side=side)


def single(side: str = "right") -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["a b c"], "symbols")
    tokenizer.padding_side = side
    return tokenizer


def model_for(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> RnnSeq2SeqForConditionalGeneration:
    """A model that often generates the unknown word, and attends now here, now there."""
    sizes = {"vocab_size": len(tokenizer)}
    if isinstance(tokenizer, RnnSeq2SeqTokenizer):
        sizes["source_vocab_size"] = tokenizer.source_vocab_size
    model = tiny_model(seed, attention_type="general", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.head.output.bias[tokenizer.unk_token_id] += 2.0
        model.head.output.bias[[tokenizer.pad_token_id, tokenizer.bos_token_id]] -= 20.0
    return model


def generate(model: Any, inputs: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 7, "return_dict_in_generate": True, "output_attentions": True, **options}
    return model.generate(**inputs, **settings)


def by_hand(
    model: Any, tokenizer: PreTrainedTokenizerFast, text: str, sequence: torch.Tensor, dictionary: dict[str, str]
) -> tuple[str, set[str]]:
    """The output for one source alone, by the attention of a run over the finished output; and the words put in."""
    source = text.split()
    row = tokenizer(text, return_tensors="pt")  # words first, then the end of sequence
    (attention,) = model(**row, decoder_input_ids=sequence[None, :-1], output_attentions=True).cross_attentions
    words, replaced = [], set()
    for weights, token in zip(attention[0, 0], sequence[1:].tolist(), strict=True):
        word = tokenizer.convert_ids_to_tokens(token)
        if token == tokenizer.unk_token_id:
            word = source[int(weights[: len(source)].argmax())]
            replaced.add(word)
            word = dictionary.get(word, word)
        elif token in tokenizer.all_special_ids:
            break
        words.append(word)
    return " ".join(words), replaced


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [pair, single])
def test_each_unknown_word_becomes_the_most_attended_one(make: Any, side: str, options: dict[str, Any]) -> None:
    tokenizer = make(side)
    model = model_for(tokenizer)
    inputs, words = tokenize_with_words(tokenizer, SOURCES, padding=True, return_tensors="pt")
    outputs = generate(model, inputs, **options)
    repeats = options.get("num_return_sequences", 1)
    for dictionary in ({}, {"a": "two words", "c": "C", "b": "B"}):
        found = replace_unknown_words(model, outputs, tokenizer, words, dictionary)
        replaced: set[str] = set()
        for index, sequence in enumerate(outputs.sequences):
            expected, these = by_hand(model, tokenizer, SOURCES[index // repeats], sequence, dictionary)
            assert found[index] == expected
            replaced |= these
        assert len(replaced) > 1
    assert found != replace_unknown_words(model, outputs, tokenizer, words)
    plain = tokenizer.batch_decode(outputs.sequences, skip_special_tokens=True)
    assert plain != found
    without = [index for index, row in enumerate(outputs.sequences) if tokenizer.unk_token_id not in row]
    assert all(plain[index] == found[index] for index in without)


def test_beams_that_went_on_after_the_best_had_ended() -> None:
    """Then there are attention weights of more steps than the best output has tokens."""
    tokenizer = pair()
    model = model_for(tokenizer)
    longer = 0
    for text in SOURCES:
        inputs, words = tokenize_with_words(tokenizer, [text], return_tensors="pt")
        outputs = generate(model, inputs, num_beams=3, length_penalty=0.0, early_stopping="never")
        expected, replaced = by_hand(model, tokenizer, text, outputs.sequences[0], {})
        assert replace_unknown_words(model, outputs, tokenizer, words) == [expected]
        longer += len(outputs.cross_attentions) >= outputs.sequences.size(1) and bool(replaced)
    assert longer


def test_an_ensemble_replaces_by_its_mean_attention() -> None:
    tokenizer = pair()
    models = [model_for(tokenizer, seed) for seed in (0, 1)]
    inputs, words = tokenize_with_words(tokenizer, SOURCES, padding=True, return_tensors="pt")
    ensemble = RnnSeq2SeqEnsemble(models)
    outputs = generate(ensemble, inputs, num_beams=3)
    found = replace_unknown_words(ensemble, outputs, tokenizer, words)
    for row, matrix in enumerate(ensemble.generated_attentions(outputs)):
        source, tokens = SOURCES[row].split(), outputs.sequences[row, 1 : 1 + len(matrix)].tolist()
        for place, token in enumerate(tokens[:-1]):
            if token == tokenizer.unk_token_id:
                assert found[row].split()[place] == source[int(matrix[place, : len(source)].argmax())]
    assert "<unk>" in tokenizer.batch_decode(outputs.sequences)[0]


def replaced(
    tokenizer: PreTrainedTokenizerFast, source: str, target: list[str], attended: list[int], **options: Any
) -> str:
    """What becomes of target tokens if each attends to the position in `attended`, half as much to the one before."""
    inputs, words = tokenize_with_words(tokenizer, [source], return_tensors="pt", **options)
    length = inputs["input_ids"].size(1)
    steps = []
    for position in attended:
        weights = torch.zeros(1, 1, 1, length)
        weights[..., position], weights[..., position - 1] = 2 / 3, 1 / 3
        steps.append((weights,))
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(target)]
    outputs = GenerateEncoderDecoderOutput(sequences=torch.tensor([ids]), cross_attentions=tuple(steps))
    return replace_unknown_words(tiny_model(), outputs, tokenizer, words)[0]


def test_special_tokens_are_never_copied() -> None:
    tokenizer = pair()
    source = ["x", "<unk>", "</s>"]
    assert tokenizer("a q").input_ids[-1] == tokenizer.eos_token_id
    assert replaced(tokenizer, "a q", source, [0, 2, 0]) == "x q"  # the end attended to, then the word before it
    assert replaced(tokenizer, "a q", source, [0, 0, 0]) == "x a"
    padded = {"padding": "max_length", "max_length": 6}
    assert replaced(tokenizer, "a q", source, [0, 2, 0], **padded) == "x q"
    tokenizer.padding_side = "left"
    assert replaced(tokenizer, "a q", source, [0, 5, 0], **padded) == "x q"
    assert replaced(tokenizer, "", ["x", "<unk>", "y", "</s>"], [0, 0, 0, 0]) == "x <unk> y"  # no word at all


def test_special_tokens_written_in_a_text_are_never_copied_either() -> None:
    tokenizer = single()
    tokenizer.split_special_tokens = False
    inputs, (words,) = tokenize_with_words(tokenizer, ["a </s> q"])
    assert inputs["input_ids"][0][1] == tokenizer.eos_token_id
    assert words == [SourceWord("a", True), None, SourceWord("q", True), None]


def test_spaces_where_tokens_carry_them() -> None:
    source, target = train_tokenizer(["Der Hund läuft !"], "word"), train_tokenizer(["A dog runs."], "word")
    tokenizer = RnnSeq2SeqTokenizer(source, target)
    text = "Der Rauhaardackel läuft, Ödön!"  # tokens: Der, Rauhaardackel, läuft, a comma, Ödön, !
    words = tokenize_with_words(tokenizer, [text])[1][0]
    assert words == [
        SourceWord("Der", True),
        SourceWord("Rauhaardackel", True),
        SourceWord("läuft", True),
        SourceWord(",", False),
        SourceWord("Ödön", True),
        SourceWord("!", False),
        None,
    ]
    target_tokens = ["▁A", "<unk>", "<unk>", "▁runs", "."]
    assert replaced(tokenizer, text, target_tokens, [0, 1, 3, 2, 5]) == "A Rauhaardackel, runs."
    assert replaced(tokenizer, text, ["<unk>", "▁runs", "<unk>"], [4, 2, 4]) == "Ödön runs Ödön"


def test_characters_bring_no_spaces() -> None:
    tokenizer = RnnSeq2SeqTokenizer(train_tokenizer(["abc "], "char"), train_tokenizer(["abc "], "char"))
    assert replaced(tokenizer, "äb c", ["b", "<unk>", " ", "<unk>"], [0, 0, 0, 1]) == "bä b"


def test_a_piece_of_a_word_stands_for_all_of_it() -> None:
    corpus = ["the lower the newer the wider"] * 3
    tokenizer = train_tokenizer(corpus, "bpe", vocab_size=25)
    (words,) = tokenize_with_words(tokenizer, ["wider  newer"])[1]
    assert len(words) > 4
    assert [word for word in dict.fromkeys(words) if word] == [SourceWord("wider", True), SourceWord("newer", True)]


def test_the_spelling_is_the_text_s_own() -> None:
    lower = train_tokenizer(["der hund"], "word", lowercase=True)
    (words,) = tokenize_with_words(lower, ["Der Hund LÄUFT"])[1]
    assert [word.text for word in words if word] == ["Der", "Hund", "LÄUFT"]


def test_truncation_leaves_words_out() -> None:
    inputs, words = tokenize_with_words(pair(), SOURCES, truncation=True, max_length=3, padding=True)
    assert [len(row) for row in words] == [len(row) for row in inputs["input_ids"]] == [3] * 4
    assert words[2] == [SourceWord("q", True), SourceWord("a", True), None]


def test_a_prompt_is_kept_as_it_is() -> None:
    tokenizer = pair()
    model = model_for(tokenizer)
    inputs, words = tokenize_with_words(tokenizer, SOURCES, padding=True, return_tensors="pt")
    prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["x", "<unk>"])]] * 4)
    for options in ({}, {"num_beams": 3}):
        outputs = generate(model, inputs, decoder_input_ids=prompt, **options)
        free = generate(model, inputs, **options)
        found = replace_unknown_words(model, outputs, tokenizer, words)
        assert all(text.split()[0] == "x" and "<unk>" not in text for text in found)
        for text, row in zip(found, outputs.sequences, strict=True):  # of the prompt's unknown word nothing is left
            kept = [token for token in row[3:].tolist() if token not in (0, tokenizer.eos_token_id)]
            assert len(text.split()) == 1 + len(kept)
        assert found != replace_unknown_words(model, free, tokenizer, words)


def test_what_can_not_be_replaced_is_refused() -> None:
    tokenizer = pair()
    model = model_for(tokenizer)
    inputs, words = tokenize_with_words(tokenizer, SOURCES, padding=True, return_tensors="pt")
    outputs = generate(model, inputs)
    with pytest.raises(ValueError, match="`outputs` has no cross-attentions"):
        replace_unknown_words(model, generate(model, inputs, output_attentions=False), tokenizer, words)
    with pytest.raises(ValueError, match="`outputs` has 4 sequences, no multiple of the 3 sources"):
        replace_unknown_words(model, outputs, tokenizer, words[:3])
    with pytest.raises(ValueError, match="a row of 4 positions, but the model attends to 8"):
        replace_unknown_words(model, outputs, tokenizer, [row[:4] for row in words])
    copied = outputs.sequences.clone()
    copied[0, 1] = len(tokenizer)
    outputs.sequences = copied
    with pytest.raises(ValueError, match="`outputs` has words copied by the model itself"):
        replace_unknown_words(model, outputs, tokenizer, words)
    nameless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(ValueError, match="has no `unk_token` that could be replaced"):
        replace_unknown_words(model, generate(model, inputs), nameless, words)


def test_words_need_offsets() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match="a fast tokenizer, which ByT5Tokenizer is not"):
        tokenize_with_words(ByT5Tokenizer(), ["a"])


def test_dictionary_files(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.tsv"
    path.write_bytes("\ufeffHund\tdog\r\n\nHaus Haus\nneue Welt\tnew world\nHund dog\n".encode())
    assert read_dictionary(path) == {"Hund": "dog", "Haus": "Haus", "neue Welt": "new world"}
    path.write_text("")
    assert read_dictionary(path) == {}
    with pytest.raises(FileNotFoundError, match="missing"):
        read_dictionary(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Hund\tdog\nHaus\n", r"dictionary.tsv, line 2: 'Haus' must be a source word, a tab and its translation"),
        (b"Hund\tdog\thound\n", r"line 1: 'Hund\\tdog\\thound' must be"),
        (b"Hund\t\n", r"line 1: 'Hund\\t' must be"),
        (b"neue Welt world\n", r"line 1: 'neue Welt world' must be"),
        (b"a\tb\n\nc\td\na\tc\n", r"line 4: 'a' is translated by 'c', and before by 'b'"),
        (
            "x\ty\nHäuser\thouses\n".encode("latin-1"),
            r"dictionary.tsv, line 2: not UTF-8 \(invalid continuation byte\)",
        ),
    ],
)
def test_broken_dictionaries_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "dictionary.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dictionary(path)
