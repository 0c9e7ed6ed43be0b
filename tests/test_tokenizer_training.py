"""Training of the inner tokenizers: round trips, special tokens, options, refusals."""

import random
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

from hf_rnn_seq2seq.tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import (
    SPECIAL_TOKENS,
    TOKENIZER_BUILDERS,
    TokenizerArguments,
    TokenizerKind,
    build_tokenizer,
    train_tokenizer,
)

KINDS = list(TOKENIZER_BUILDERS)

TEXTS = [
    "A man in a blue shirt.",
    "Zwei Männer (die lachen), don't they? T-shirt!",
    "한국어 문장입니다.",
    "مَرْحَبًا بالعالم می‌خواهم",
    "cafe\u0301 é q\u0323\u0307 हिन्दी",
    "👩‍👩‍👧 ok 🇩🇪 👍🏽",
    " one leading",
    "  several   spaces  ",
    "line\nline\ttab\r\nend\u00a0nbsp",
    "a </s> b<pad> <s> <unk>",
]
# Where round trips are promised for texts of known characters, this one too is made of characters in TEXTS.
UNSEEN = ["nam A  ni.", "", " ", "\n", "한 국", "\u0301", "👧‍👧", "</s>"]


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded


@pytest.fixture(scope="module", params=KINDS)
def kind_and_tokenizer(request: pytest.FixtureRequest) -> tuple[TokenizerKind, PreTrainedTokenizerFast]:
    return request.param, train_tokenizer(TEXTS, request.param, vocab_size=600)


def test_every_kind_has_a_builder() -> None:
    assert list(get_args(TokenizerKind)) == KINDS


def test_special_tokens_and_end(kind_and_tokenizer: tuple[TokenizerKind, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = kind_and_tokenizer
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer("").input_ids == [2]
    assert tokenizer.clean_up_tokenization_spaces is False
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids[-1] == 2
        # Neither a begin token nor anything in the text, "</s>" included, becomes a special token or is unknown.
        assert not {0, 1, 2, 3}.intersection(ids[:-1]), tokenizer.convert_ids_to_tokens(ids)


def test_round_trip(kind_and_tokenizer: tuple[TokenizerKind, PreTrainedTokenizerFast]) -> None:
    kind, tokenizer = kind_and_tokenizer
    texts = {"symbols": [], "word": TEXTS}.get(kind, TEXTS + UNSEEN)
    for text in texts:
        assert round_trip(tokenizer, text) == text


def test_save_and_load(kind_and_tokenizer: tuple[TokenizerKind, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    _, tokenizer = kind_and_tokenizer
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PreTrainedTokenizerFast
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert round_trip(loaded, text) == round_trip(tokenizer, text)


def test_training_is_deterministic(kind_and_tokenizer: tuple[TokenizerKind, PreTrainedTokenizerFast]) -> None:
    kind, tokenizer = kind_and_tokenizer
    again = train_tokenizer(iter(TEXTS), kind, vocab_size=600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", ["char", "byte_bpe"])
def test_round_trip_of_random_text(kind: TokenizerKind) -> None:
    alphabet = "abé </s>\n\u0301한ا👩\u200d"
    tokenizer = train_tokenizer([alphabet, "ab a</s>"], kind, vocab_size=400)
    # Bytes: any text that UTF-8 can write; characters: any text of known ones.
    texts = st.text(st.characters(exclude_categories=["Cs"])) if kind == "byte_bpe" else st.text(alphabet)

    @settings(max_examples=200, derandomize=True)
    @given(texts)
    def check(text: str) -> None:
        assert round_trip(tokenizer, text) == text

    check()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_round_trip_of_random_text_in_subwords(kind: TokenizerKind) -> None:
    alphabet = "abé </s>'-.\n\u0301한ا👩\u200d"
    tokenizer = train_tokenizer([alphabet, "abab a</s> aba'b", "baba ab-ab"], kind, vocab_size=60)

    @settings(max_examples=200, derandomize=True)
    @given(st.text(alphabet))
    def check(text: str) -> None:
        assert round_trip(tokenizer, text) == text

    check()


def test_tokens_of_each_kind() -> None:
    texts = ["A man, don't.", "A man ."]
    assert train_tokenizer(texts, "word").tokenize("A man, don't.") == ["▁A", "▁man", ",", "▁don't", "."]
    assert train_tokenizer(texts, "word").tokenize("A man .") == ["▁A", "▁man", "▁."]
    assert train_tokenizer(texts, "symbols").tokenize("A man, don't.") == ["A", "man,", "don't."]
    assert train_tokenizer(texts, "char").tokenize("A n") == ["A", " ", "n"]
    for kind in ("bpe", "unigram"):
        pieces = train_tokenizer(texts, kind, vocab_size=40).tokenize("A man.")
        assert "".join(pieces) == "▁A▁man."
        assert pieces[-1] == "."
    assert train_tokenizer(["man"] * 3, "byte_bpe").tokenize("man man") == ["Ġman", "Ġman"]


def test_symbols_join_with_single_spaces() -> None:
    tokenizer = train_tokenizer(["t͡ʃ ɛ ˈa", "</s> <unk>"], "symbols")
    assert round_trip(tokenizer, "t͡ʃ ɛ ˈa") == "t͡ʃ ɛ ˈa"
    assert round_trip(tokenizer, "  ɛ \t ˈa\n") == "ɛ ˈa"
    assert tokenizer("zz ɛ").input_ids[0] == tokenizer.unk_token_id == 3


@pytest.mark.parametrize("kind", KINDS)
def test_vocab_size_is_a_limit(kind: TokenizerKind) -> None:
    letters = random.Random(0)
    texts = [" ".join("".join(letters.choices("abcdefgh", k=5)) for _ in range(8)) for _ in range(60)]
    sizes = {"char": (7, 12), "byte_bpe": (270, 300)}.get(kind, (20, 60))
    for size in sizes:
        tokenizer = train_tokenizer(texts, kind, vocab_size=size)
        assert len(tokenizer) <= size
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(train_tokenizer(texts, kind, vocab_size=sizes[1])) > sizes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_min_frequency(kind: TokenizerKind) -> None:
    texts = ["ab ab ab", "ab ab", "xy"]
    often, all_tokens = (set(train_tokenizer(texts, kind, min_frequency=n).get_vocab()) for n in (2, 1))
    assert often < all_tokens
    assert not any("xy" in token for token in often)
    if kind != "byte_bpe":
        assert not any("x" in token for token in often)
        unknown = train_tokenizer(texts, kind, min_frequency=2)("xy").input_ids
        assert set(unknown) <= {2, 3, train_tokenizer(texts, kind, min_frequency=2).convert_tokens_to_ids("▁")}
        assert 3 in unknown


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase_and_normalization(kind: TokenizerKind) -> None:
    composed, decomposed, wide = "caf\u00c9 \u00c9", "cafE\u0301 E\u0301", "ｃａｆ\u00c9 É"
    lower = train_tokenizer([composed], kind, lowercase=True, vocab_size=400)
    assert round_trip(lower, composed) == "caf\u00e9 \u00e9"
    nfc = train_tokenizer([decomposed], kind, unicode_normalization="nfc", vocab_size=400)
    assert nfc(composed).input_ids == nfc(decomposed).input_ids
    assert round_trip(nfc, decomposed) == composed
    nfd = train_tokenizer([composed], kind, unicode_normalization="nfd", vocab_size=400)
    assert round_trip(nfd, composed) == decomposed
    nfkc = train_tokenizer([composed], kind, unicode_normalization="nfkc", vocab_size=400)
    assert round_trip(nfkc, wide) == composed
    nfkd = train_tokenizer([composed], kind, unicode_normalization="nfkd", vocab_size=400)
    assert round_trip(nfkd, wide) == decomposed
    both = train_tokenizer([composed], kind, unicode_normalization="nfkc", lowercase=True, vocab_size=400)
    assert round_trip(both, wide) == "caf\u00e9 \u00e9"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_skipped(kind: TokenizerKind) -> None:
    tokenizer = train_tokenizer(["a b"], kind, vocab_size=400)
    ids = tokenizer("a b").input_ids
    assert tokenizer.decode([*ids, len(tokenizer), 10**6], skip_special_tokens=True) == "a b"
    assert tokenizer.convert_ids_to_tokens([len(tokenizer)]) == [None]
    with pytest.raises(OverflowError):  # labels' -100 is for the caller to replace
        tokenizer.decode([-100])


@pytest.mark.parametrize("corpus", [[], [""], ["", "  ", "\n"]])
def test_empty_corpus_is_refused(corpus: list[str]) -> None:
    with pytest.raises(ValueError, match=f"corpus for kind='bpe' is empty: {len(corpus)} texts"):
        train_tokenizer(corpus, "bpe")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind is 'words'; allowed: word, char, symbols, bpe, unigram, byte_bpe"):
        train_tokenizer(["a"], "words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unicode_normalization is 'NFC'; allowed: none, nfc, nfd, nfkc, nfkd"):
        train_tokenizer(["a"], "char", unicode_normalization="NFC")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_frequency is 0"):
        train_tokenizer(["a"], "char", min_frequency=0)
    with pytest.raises(ValueError, match="min_frequency is 3: no token of kind 'word'"):
        train_tokenizer(["a b"], "word", min_frequency=3)
    with pytest.raises(TypeError, match="corpus is one string"):
        train_tokenizer("some text", "char")
    with pytest.raises(TypeError, match=r"text 1 of the corpus .* is None"):
        train_tokenizer(["a", None], "char")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("kind", "needed"), [("word", 5), ("char", 5), ("symbols", 5), ("bpe", 9), ("unigram", 9), ("byte_bpe", 260)]
)
def test_vocab_size_too_small_is_refused(kind: TokenizerKind, needed: int) -> None:
    texts = ["abcd abcd", "ab cd"]  # four letters and the space
    with pytest.raises(ValueError, match=f"vocab_size is {needed - 1}; kind='{kind}' needs at least {needed}"):
        train_tokenizer(texts, kind, vocab_size=needed - 1)
    assert len(train_tokenizer(texts, kind, vocab_size=needed)) == needed


def test_build_tokenizer_from_flags() -> None:
    parser = HfArgumentParser((TokenizerArguments,))  # type: ignore[arg-type]
    flags = (
        "--source_tokenizer_kind char --target_tokenizer_kind symbols --tokenizer_lowercase --source_tokenizer_size 6"
    )
    (arguments,) = parser.parse_args_into_dataclasses(flags.split())
    pair = build_tokenizer(["AAB"], ["P q", "p"], arguments)
    assert isinstance(pair, RnnSeq2SeqTokenizer)
    assert pair.source_vocab_size == pair.target_vocab_size == 6
    assert pair("Ba", text_target="q P")["labels"] == [5, 4, 2]

    (arguments,) = parser.parse_args_into_dataclasses(["--source_tokenizer_kind", "bpe", "--shared_vocabulary"])
    shared = build_tokenizer(iter(["aab"]), iter(["xyx"]), arguments)
    assert type(shared) is PreTrainedTokenizerFast
    assert round_trip(shared, "aab xyx") == "aab xyx"


def test_target_defaults_to_source() -> None:
    pair = build_tokenizer(["a b"], ["c d"], TokenizerArguments(source_tokenizer_kind="char", source_tokenizer_size=5))
    assert isinstance(pair, RnnSeq2SeqTokenizer)
    assert pair.target_vocab_size == 5
    assert len(pair(text_target="cd").input_ids) == 3


def test_build_tokenizer_refusals() -> None:
    with pytest.raises(ValueError, match=r"shared_vocabulary.*target_tokenizer_kind='char'"):
        build_tokenizer(["a"], ["b"], TokenizerArguments(target_tokenizer_kind="char", shared_vocabulary=True))
    with pytest.raises(ValueError, match=r"shared_vocabulary.*target_tokenizer_size=9"):
        build_tokenizer(["a"], ["b"], TokenizerArguments(target_tokenizer_size=9, shared_vocabulary=True))
    with pytest.raises(ValueError, match=r"target tokenizer: the corpus .* is empty"):
        build_tokenizer(["a"], [], TokenizerArguments())
    with pytest.raises(TypeError, match="source tokenizer: text 0 of the corpus"):
        build_tokenizer([1], ["a"], TokenizerArguments())  # type: ignore[list-item]
