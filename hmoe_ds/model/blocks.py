"""Blocks of the encoder: pre-norm message passing, then a pre-norm feed-forward, both residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch_geometric.nn import GINEConv

from hmoe_ds.model.messages import pass_messages
from hmoe_ds.moe.experts import GatedFeedForward
from hmoe_ds.moe.forms import ScaffoldRouting
from hmoe_ds.moe.gate import FINAL_STAGE, AtomRouting, RoutingStage
from hmoe_ds.moe.layer import HMoELayer


class BondGINEConv(GINEConv):
    """PyG's GINE convolution for states of bonds, each of which stands for both directions; the same result."""

    def forward(self, x_ND: Tensor, edge_index_2M: Tensor, bond_MD: Tensor) -> Tensor:
        """[N, D] -> [N, D]; bond j has the directed edges 2j and 2j + 1."""
        return self.nn(pass_messages(x_ND, edge_index_2M, bond_MD, self.eps))


class MessagePassing(nn.Module):
    """Pre-norm GINE convolution with a residual (Hu et al., "Strategies for Pre-training GNNs", 2020).

    Args:
        hidden_size: width D of atom and bond states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        update = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.conv = BondGINEConv(update, train_eps=True)

    def forward(self, h_ND: Tensor, edge_index_2M: Tensor, bond_MD: Tensor) -> Tensor:
        """[N, D] -> [N, D]; bond j has the directed edges 2j and 2j + 1."""
        return h_ND + self.conv(self.norm(h_ND), edge_index_2M, bond_MD)


class DenseBlock(nn.Module):
    """Message passing and a dense feed-forward.

    Args:
        hidden_size: width D.
        size: hidden width F of the feed-forward.
    """

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.messages = MessagePassing(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = GatedFeedForward(hidden_size, size)

    def forward(self, h_ND: Tensor, edge_index_2M: Tensor, bond_MD: Tensor) -> Tensor:
        """[N, D] -> [N, D]"""
        h_ND = self.messages(h_ND, edge_index_2M, bond_MD)
        return h_ND + self.feed_forward(self.norm(h_ND))


class HMoEBlock(nn.Module):
    """Message passing and an H-MoE feed-forward.

    Args:
        hidden_size: width D.
        layer: the H-MoE layer.
    """

    def __init__(self, hidden_size: int, layer: HMoELayer) -> None:
        super().__init__()
        self.messages = MessagePassing(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = layer

    def forward(
        self,
        h_ND: Tensor,
        edge_index_2M: Tensor,
        bond_MD: Tensor,
        routing: ScaffoldRouting,
        molecule_N: Tensor,
        stage: RoutingStage = FINAL_STAGE,
    ) -> tuple[Tensor, AtomRouting]:
        """[N, D] -> [N, D] and the atom gate's decision."""
        h_ND = self.messages(h_ND, edge_index_2M, bond_MD)
        y_ND, atom_routing = self.feed_forward(self.norm(h_ND), routing, molecule_N, stage)
        return h_ND + y_ND, atom_routing
