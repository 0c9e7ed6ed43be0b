"""Vocabularies as toolkits store them: lists, dictionaries, subword-nmt codes and SentencePiece models."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_rnn_seq2seq.convert import ConversionError
from hf_rnn_seq2seq.convert.vocabularies import (
    SpecialTokens,
    character_backend,
    check_tokens,
    make_side,
    read_codes,
    read_dictionary,
    read_tokens,
    sentencepiece_backend,
    subword_nmt_backend,
    whitespace_backend,
)

SPECIALS = SpecialTokens(pad="<pad>", bos="<s>", eos="</s>", unk="<unk>")
FIRST = ["<unk>", "<pad>", "<s>", "</s>"]


# Lists of tokens


def test_token_list_keeps_whatever_a_line_holds(tmp_path: Path) -> None:
    path = tmp_path / "vocab"
    path.write_bytes("<unk>\na b\n\u2028\n\tx\r\n\nlast".encode())
    assert read_tokens(path) == ["<unk>", "a b", "\u2028", "\tx", "", "last"]


def test_token_list_with_counts(tmp_path: Path) -> None:
    path = tmp_path / "vocab"
    path.write_text("the 12\nof\t7\na b 3\n")
    assert read_tokens(path, counts=True) == ["the", "of", "a b"]
    path.write_text("the 12\nof\n")
    with pytest.raises(ConversionError, match=r"vocab, line 2: expected a token and its count, got 'of'"):
        read_tokens(path, counts=True)


@pytest.mark.parametrize("ending", [".json", ".yml", ".yaml"])
def test_dictionary(tmp_path: Path, ending: str) -> None:
    if ending != ".json":
        pytest.importorskip("yaml")
    path = tmp_path / f"vocab{ending}"
    text = '{"b": 1, "</s>": 0, "é": 2}' if ending == ".json" else '"</s>": 0\nyes: 1\n12: 2\n"null": 3\n"a: b": 4\n'
    path.write_text(text, encoding="utf-8")
    expected = ["</s>", "b", "é"] if ending == ".json" else ["</s>", "yes", "12", "null", "a: b"]
    assert read_dictionary(path) == expected


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"a": 0, "b": 2}, "none has the id 1"),
        ({"a": 0, "b": 0}, "'b' and 'a' have the same id 0"),
        ({"a": "x"}, "the id of 'a' must be a number, got 'x'"),
        (["a"], "expected a mapping from tokens to ids, got list"),
    ],
)
def test_dictionary_refuses(tmp_path: Path, entries: Any, match: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ConversionError, match=match):
        read_dictionary(path)


def test_yaml_dictionary_makes_no_objects(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "vocab.yml"
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises((ConversionError, yaml.YAMLError)):
        read_dictionary(path)


def test_dictionary_of_another_ending(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"ends with \.json, \.yml or \.yaml"):
        read_dictionary(tmp_path / "vocab.pkl")


def test_tokens_are_checked() -> None:
    check_tokens(["a", "b"], "source", 2)
    with pytest.raises(ConversionError, match="The source vocabulary has 1 tokens, the model 2"):
        check_tokens(["a"], "source", 2)
    with pytest.raises(ConversionError, match="The target vocabulary holds 'a' twice"):
        check_tokens(["a", "b", "a"], "target", 3)


# Sides


def test_whitespace_side() -> None:
    side = make_side(whitespace_backend([*FIRST, "a", "b"], "<unk>"), SPECIALS, before=("<s>",), after=("</s>",))
    assert side(" a\tc\u00a0b ").input_ids == [2, 4, 0, 5, 3]
    assert side("a", "b").input_ids == [2, 4, 3, 2, 5, 3]
    assert side.decode([4, 5, 3], skip_special_tokens=True) == "a b"
    only_spaces = make_side(whitespace_backend([*FIRST, "a", "b"], "<unk>", spaces_only=True), SPECIALS)
    assert only_spaces("a  b\u00a0a").input_ids == [4, 0]


def test_character_side() -> None:
    side = make_side(character_backend([*FIRST, "a", "é", "▁"], "<unk>", space="▁"), SPECIALS, lowercase=True)
    assert side("A é?").input_ids == [4, 6, 5, 0]
    assert side.decode([4, 6, 5]) == "a é"
    composed = make_side(character_backend([*FIRST, "é"], "<unk>"), SPECIALS, unicode_normalization="NFC")
    assert composed("e\u0301").input_ids == [4]


def test_side_refuses_special_tokens_that_are_not_there() -> None:
    with pytest.raises(ConversionError, match="does not have '</s>', which is to be eos_token"):
        make_side(whitespace_backend(["<unk>", "<pad>"], "<unk>"), SpecialTokens(eos="</s>"))
    with pytest.raises(ConversionError, match="does not have '<x>'"):
        make_side(whitespace_backend(FIRST, "<unk>"), SPECIALS, after=("<x>",))


# subword-nmt


def plain_subword_nmt(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """`subword_nmt.apply_bpe.encode` of version 0.2 and `segment_tokens`."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pairs = set(pairwise(pieces))
        ranked = [pair for pair in merges if pair in pairs]
        if not ranked:
            break
        first, second = ranked[0]
        merged, place = [], 0
        while place < len(pieces):
            if pieces[place : place + 2] == [first, second]:
                merged.append(first + second)
                place += 2
            else:
                merged.append(pieces[place])
                place += 1
        pieces = merged
    return [piece + "@@" for piece in pieces[:-1]] + [pieces[-1].removesuffix("</w>")]


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Sennrich et al. 2016, algorithm 1."""
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter[tuple[str, str]]()
        for word in words:
            pieces = [p.removesuffix("@@") for p in plain_subword_nmt(word, merges)]
            pieces[-1] += "</w>"
            pairs.update(pairwise(pieces))
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
    return merges


DRAW = random.Random(0)
WORDS = ["".join(DRAW.choice("abcd") for _ in range(DRAW.randint(1, 7))) for _ in range(60)]
MERGES = learn_merges(WORDS, 40)


def write_codes(path: Path, merges: list[tuple[str, str]]) -> Path:
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pieces_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], PreTrainedTokenizerFast]:
    """A vocabulary of the pieces that were seen more than twice, and the side with it."""
    codes = write_codes(tmp_path_factory.mktemp("codes") / "codes", [*MERGES, MERGES[3]])
    seen = Counter(piece for word in WORDS for piece in plain_subword_nmt(word, MERGES))
    tokens = [*FIRST, *(piece for piece, count in seen.items() if count > 2)]
    return tokens, make_side(subword_nmt_backend(tokens, codes, SPECIALS), SPECIALS, after=("</s>",))


@given(words=st.lists(st.text("abcde", min_size=1, max_size=9), max_size=5))
@settings(max_examples=100)
def test_subword_nmt(pieces_side: tuple[list[str], PreTrainedTokenizerFast], words: list[str]) -> None:
    tokens, side = pieces_side
    ids = side(" ".join(words)).input_ids
    pieces = [piece for word in words for piece in plain_subword_nmt(word, MERGES)]
    assert [i if i < len(tokens) else 0 for i in ids] == [
        *(tokens.index(piece) if piece in tokens else 0 for piece in pieces),
        3,
    ]


def test_subword_nmt_joins_pieces(pieces_side: tuple[list[str], PreTrainedTokenizerFast]) -> None:
    tokens, side = pieces_side
    whole = [word for word in WORDS if all(p in tokens for p in plain_subword_nmt(word, MERGES))][:6]
    assert any(len(plain_subword_nmt(word, MERGES)) > 1 for word in whole)
    text = " ".join(whole)
    assert side.decode(side(text).input_ids, skip_special_tokens=True) == text
    assert side.decode([tokens.index("<unk>"), side(whole[0]).input_ids[0]]).startswith("<unk> ")


def test_subword_nmt_itself(tmp_path: Path) -> None:
    apply_bpe = pytest.importorskip("subword_nmt.apply_bpe")
    with write_codes(tmp_path / "codes", MERGES).open(encoding="utf-8") as file:
        bpe = apply_bpe.BPE(file)
    draw = random.Random(1)
    for _ in range(300):
        word = "".join(draw.choice("abcde") for _ in range(draw.randint(1, 10)))
        assert bpe.process_line(word).split() == plain_subword_nmt(word, MERGES)


def test_codes_refusals(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    path.write_text("e n</w>\n")
    with pytest.raises(ConversionError, match=r"version 0\.1"):
        read_codes(path)
    path.write_text("#version: 0.2\na b\na b c\n")
    with pytest.raises(ConversionError, match="line 3: expected two pieces, got 'a b c'"):
        read_codes(path)
    with pytest.raises(ConversionError, match="needs an unknown token"):
        subword_nmt_backend(FIRST, path, SpecialTokens())


# SentencePiece


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("extra", [{}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False}])
def test_sentencepiece(tmp_path: Path, kind: str, extra: dict[str, Any]) -> None:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(5)) for _ in range(300)]
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), model_type=kind, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **extra,
    )  # fmt: skip
    original = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    seen = Counter(piece for text in texts for piece in original.encode(text, out_type=str))
    # In an order of its own, without the rarest.
    tokens = [*FIRST, *(piece for piece, _ in reversed(seen.most_common(len(seen) - 3)))]
    side = make_side(sentencepiece_backend(tokens, tmp_path / "m.model", SPECIALS), SPECIALS, after=("</s>",))
    cases = [*texts[:30], "  a  b ", "", "abz", "zz a", "½ ﬁ", "dcbaabcd", "x" * 20]
    for text in cases:
        pieces = original.encode(text, out_type=str)
        ids = [i if i < len(tokens) else 0 for i in side(text).input_ids]
        assert ids == [*(tokens.index(p) if p in tokens else 0 for p in pieces), 3], text
    for text in texts[:30]:
        ids = side(text).input_ids
        if 0 not in ids:
            assert side.decode(ids, skip_special_tokens=True) == text
    assert not {1, 2} & set(side("a<s>b <pad> <s>").input_ids)  # text is no special token


def test_sentencepiece_refusals(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "no.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ConversionError, match="is no SentencePiece model"):
        sentencepiece_backend(FIRST, tmp_path / "no.model", SPECIALS)
    for name, extra in (("char", {"model_type": "char"}), ("user-defined", {"user_defined_symbols": ["<x>"]})):
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(WORDS * 5), model_prefix=str(tmp_path / name),
            **{"vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 2, **extra},
        )  # fmt: skip
        with pytest.raises(ConversionError, match=r"cannot be represented"):
            sentencepiece_backend(FIRST, tmp_path / f"{name}.model", SPECIALS)
