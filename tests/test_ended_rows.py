"""Which sequences end: as transformers' criteria say, with or without calling them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_rnn_seq2seq.ended_rows import Ends

CRITERIA = st.one_of(
    st.lists(st.integers(0, 4), min_size=1, max_size=3).map(EosTokenCriteria),
    st.integers(1, 6).map(MaxLengthCriteria),
    st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda lengths: MaxLengthCriteria(*lengths)),
    st.just(1e9).map(MaxTimeCriteria),
)


@given(st.lists(CRITERIA, max_size=3), st.integers(1, 6), st.integers(0, 9))
def test_ends_are_those_of_the_criteria(criteria: list[StoppingCriteria], length: int, seed: int) -> None:
    listed = StoppingCriteriaList(criteria)
    sequences = torch.randint(0, 5, (3, 2, length), generator=torch.Generator().manual_seed(seed))
    expected = listed(sequences.flatten(0, 1), None).view(3, 2)
    for shaped, wanted in ((sequences, expected), (sequences[:, 0], expected[:, 0])):
        found = Ends(listed)(shaped)
        assert found.dtype == torch.bool
        assert torch.equal(found, wanted)


class Never(EosTokenCriteria):
    """A subclass may do anything."""

    def __call__(self, input_ids: torch.Tensor, scores: None, **kwargs: object) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("criteria", "called"),
    [
        ([EosTokenCriteria(2), MaxLengthCriteria(9)], False),
        ([], False),
        ([Never(2)], True),
        ([EosTokenCriteria(2), MaxTimeCriteria(1e9)], True),
        ([MaxLengthCriteria(9, max_position_embeddings=4)], True),  # which warns
    ],
)
def test_only_what_is_known_is_not_called(criteria: list[StoppingCriteria], called: bool) -> None:
    calls: list[torch.Size] = []

    class Listed(StoppingCriteriaList):
        def __call__(self, input_ids: torch.Tensor, scores: None, **kwargs: object) -> torch.Tensor:
            calls.append(input_ids.shape)
            return super().__call__(input_ids, scores, **kwargs)

    ends = Ends(Listed(criteria))(torch.tensor([[[4, 2], [2, 4]]]))
    assert calls == ([(2, 2)] if called else [])
    assert ends.tolist() == [[any(type(one) is EosTokenCriteria for one in criteria), False]]
