"""Messages against PyG's layer: the same result and gradients, on either way of computing them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import GINEConv

from hmoe_ds.model import messages
from hmoe_ds.model.blocks import BondGINEConv

ATOMS, WIDTH = 7, 5
# Two molecules and an atom without bonds; one bond twice.
BEGIN, END = torch.tensor([0, 1, 2, 4, 1]), torch.tensor([1, 2, 0, 5, 2])


def edges(begin_M, end_M):
    """Both directions of each bond, one after the other."""
    return torch.stack([torch.stack([begin_M, end_M], 1), torch.stack([end_M, begin_M], 1)]).flatten(1)


def layers():
    torch.manual_seed(0)
    ours, peer = (kind(nn.Linear(WIDTH, 3), train_eps=True).double() for kind in (BondGINEConv, GINEConv))
    peer.load_state_dict(ours.state_dict())
    for layer in (ours, peer):
        layer.eps.data.fill_(0.3)
    return ours, peer


def outcome(layer, edge_index, x, bond, repeats, dtype):
    """What a layer gives, and the gradients of atoms, bonds and parameters."""
    layer = layer.to(dtype)
    x, bond = (value.to(dtype).requires_grad_() for value in (x.detach(), bond.detach()))
    y = layer(x, edge_index, bond.repeat_interleave(repeats, dim=0))
    weight = torch.linspace(-1, 2, y.numel(), dtype=dtype).view(y.shape)
    return y, *torch.autograd.grad((y * weight).sum(), [x, bond, *layer.parameters()])


@pytest.fixture(params=["looped", "torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(messages, "_is_looped", lambda *_: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bonds", [5, 0])
def test_they_are_those_of_pygs_layer(dtype, bonds):
    generator = torch.Generator().manual_seed(1)
    x, bond = (torch.randn(rows, WIDTH, generator=generator) for rows in (ATOMS, bonds))
    edge_index = edges(BEGIN[:bonds], END[:bonds])
    ours, peer = layers()
    found = outcome(ours, edge_index, x, bond, 1, dtype)
    expected = outcome(peer, edge_index, x, bond, 2, dtype)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_follows_double_precision():
    generator = torch.Generator().manual_seed(1)
    x, bond = (torch.randn(rows, WIDTH, generator=generator).bfloat16() for rows in (ATOMS, 5))
    ours, peer = layers()
    found = outcome(ours, edges(BEGIN, END), x, bond, 1, torch.bfloat16)
    expected = outcome(peer, edges(BEGIN, END), x, bond, 2, torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_no_atoms_no_messages():
    x = torch.zeros(0, WIDTH, requires_grad=True)
    eps, bond = torch.zeros(1, requires_grad=True), torch.zeros(0, WIDTH, requires_grad=True)
    y = messages.pass_messages(x, torch.zeros(2, 0, dtype=torch.long), bond, eps)
    y.sum().backward()
    assert y.shape == (0, WIDTH)
    assert eps.grad.item() == 0


class LargestTensor(TorchDispatchMode):
    """The most numbers in one tensor made under this mode."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if isinstance(output, torch.Tensor):
            self.numbers = max(self.numbers, output.numel())
        return output


def test_no_row_for_each_directed_edge_is_made(way):
    atoms, bonds = 4, 50
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(atoms, WIDTH, requires_grad=True)
    bond = torch.randn(bonds, WIDTH, requires_grad=True)
    begin = torch.randint(atoms, (bonds,), generator=generator)
    edge_index, eps = edges(begin, (begin + 1) % atoms), torch.zeros(1, requires_grad=True)
    with LargestTensor() as largest:
        messages.pass_messages(x, edge_index, bond, eps).sum().backward()
    assert largest.numbers == bonds * WIDTH


def test_an_atom_that_there_is_not_is_refused(way):
    x, bond = torch.randn(ATOMS, WIDTH), torch.randn(1, WIDTH)
    with pytest.raises(IndexError, match="atoms from 0 to 7, expected 0 to 6" if way == "looped" else None):
        messages.pass_messages(x, edges(torch.tensor([0]), torch.tensor([ATOMS])), bond, torch.zeros(1))


def test_what_is_no_number_goes_where_it_goes_in_pygs_layer():
    x, bond = torch.randn(ATOMS, WIDTH), torch.randn(len(BEGIN), WIDTH)
    bond[3] = float("nan")
    ours, peer = layers()
    found = outcome(ours, edges(BEGIN, END), x, bond, 1, torch.float64)
    expected = outcome(peer, edges(BEGIN, END), x, bond, 2, torch.float64)
    assert found[0][[4, 5]].isnan().all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_states_may_lie_column_by_column():
    columns = [torch.randn(WIDTH, rows, dtype=torch.float64).t() for rows in (ATOMS, len(BEGIN))]
    gradients = []
    for states in (columns, [values.contiguous() for values in columns]):
        x, bond = (values.detach().requires_grad_() for values in states)
        y = messages.pass_messages(x, edges(BEGIN, END), bond, torch.zeros(1, dtype=torch.float64))
        gradients.append(torch.autograd.grad(y.square().sum(), [x, bond]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
