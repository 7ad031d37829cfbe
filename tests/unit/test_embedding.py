"""Embeddings of features against their definition: a sum of rows, or the mask vector."""

import pytest
import torch

from hmoe_ds.model.embedding import FeatureEmbedding

SIZES = (4, 2, 3)
FEATURES = torch.tensor([[3, 1, 0], [0, 0, 2], [3, 0, 2], [1, 1, 1]], dtype=torch.uint8)


@pytest.mark.parametrize("hidden", [None, [False, True, True, False], [False] * 4, [True] * 4])
def test_states_and_gradients_are_those_of_the_definition(hidden):
    torch.manual_seed(0)
    embedding = FeatureEmbedding(SIZES, 5).double()
    hidden_R = None if hidden is None else torch.tensor(hidden)
    expected = []
    for row, features in enumerate(FEATURES.tolist()):
        states = [embedding.table[first + feature] for first, feature in zip((0, 4, 6), features, strict=True)]
        expected.append(embedding.mask if hidden and hidden[row] else sum(states))
    found, weights = embedding(FEATURES, hidden_R), torch.randn(4, 5).double()
    torch.testing.assert_close(found, torch.stack(expected))
    gradients = [
        torch.autograd.grad(
            (states * weights).sum(), [embedding.table, embedding.mask], materialize_grads=True, allow_unused=True
        )
        for states in (found, torch.stack(expected))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_many_rows_do_not_stop_growing_in_bf16():
    """Added up one by one, bf16 numbers of one size stop at 256 times it."""
    torch.manual_seed(0)
    embedding = FeatureEmbedding(SIZES, 5).to(torch.bfloat16)
    features_RF, hidden_R = torch.zeros(10_000, 3, dtype=torch.uint8), torch.arange(10_000) % 4 == 0
    embedding(features_RF, hidden_R).sum().backward()
    torch.testing.assert_close(embedding.mask.grad, torch.full((5,), 2500.0).bfloat16())
    torch.testing.assert_close(embedding.table.grad[0], torch.full((5,), 7500.0).bfloat16())
