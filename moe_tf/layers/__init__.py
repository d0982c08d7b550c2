"""Keras layers: the mixture of experts, its routers, and their neighbours.

`SparseMoE` takes a router by name or as a layer. A router of your own is a
subclass of `Router`; its `call` makes `Gates` and returns a `Routing`.
"""

from moe_tf.experts.experts import Experts
from moe_tf.layers.attention.additive import AdditiveAttention
from moe_tf.layers.attention.multi_head import CrossAttention
from moe_tf.layers.attention.multi_head import SelfAttention
from moe_tf.layers.clipping import clipped_evaluation
from moe_tf.layers.feed_forward import FeedForward
from moe_tf.layers.gate_recording import recorded_gates
from moe_tf.layers.moe import SparseMoE
from moe_tf.layers.recurrent.attention_lstm import AttentionLSTM
from moe_tf.layers.recurrent.bidirectional import BidirectionalLSTM
from moe_tf.layers.recurrent.projected_lstm import ProjectedLSTMCell
from moe_tf.layers.softmax.sampled import SampledSoftmax
from moe_tf.layers.softmax.tied import WordSoftmax
from moe_tf.layers.transformer_block import DecoderBlock
from moe_tf.layers.transformer_block import EncoderBlock
from moe_tf.routing.batchwise import BatchwiseRouter
from moe_tf.routing.expert_choice import ExpertChoiceRouter
from moe_tf.routing.gating import Gates
from moe_tf.routing.hierarchical import HierarchicalRouter
from moe_tf.routing.hierarchical_batchwise import HierarchicalBatchwiseRouter
from moe_tf.routing.noisy_top_k import NoisyTopKRouter
from moe_tf.routing.router import Router
from moe_tf.routing.router import Routing
from moe_tf.routing.softmax_top_k import SoftmaxTopKRouter
from moe_tf.routing.softmax_top_k import SwitchRouter

__all__ = [
    "AdditiveAttention",
    "AttentionLSTM",
    "BatchwiseRouter",
    "BidirectionalLSTM",
    "CrossAttention",
    "DecoderBlock",
    "EncoderBlock",
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "Gates",
    "HierarchicalBatchwiseRouter",
    "HierarchicalRouter",
    "NoisyTopKRouter",
    "ProjectedLSTMCell",
    "Router",
    "Routing",
    "SampledSoftmax",
    "SelfAttention",
    "SoftmaxTopKRouter",
    "SparseMoE",
    "SwitchRouter",
    "WordSoftmax",
    "clipped_evaluation",
    "recorded_gates",
]


def __dir__() -> list[str]:
    return __all__
