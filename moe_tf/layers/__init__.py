"""Keras layers."""

from moe_tf.experts.experts import Experts as Experts
from moe_tf.layers.attention.additive import (
    AdditiveAttention as AdditiveAttention,
)
from moe_tf.layers.attention.multi_head import CrossAttention as CrossAttention
from moe_tf.layers.attention.multi_head import SelfAttention as SelfAttention
from moe_tf.layers.clipping import clipped_evaluation as clipped_evaluation
from moe_tf.layers.feed_forward import FeedForward as FeedForward
from moe_tf.layers.gate_recording import recorded_gates as recorded_gates
from moe_tf.layers.moe import SparseMoE as SparseMoE
from moe_tf.layers.recurrent.attention_lstm import (
    AttentionLSTM as AttentionLSTM,
)
from moe_tf.layers.recurrent.bidirectional import (
    BidirectionalLSTM as BidirectionalLSTM,
)
from moe_tf.layers.recurrent.projected_lstm import (
    ProjectedLSTMCell as ProjectedLSTMCell,
)
from moe_tf.layers.softmax.sampled import SampledSoftmax as SampledSoftmax
from moe_tf.layers.softmax.tied import WordSoftmax as WordSoftmax
from moe_tf.layers.transformer_block import DecoderBlock as DecoderBlock
from moe_tf.layers.transformer_block import EncoderBlock as EncoderBlock
from moe_tf.routing.batchwise import BatchwiseRouter as BatchwiseRouter
from moe_tf.routing.expert_choice import (
    ExpertChoiceRouter as ExpertChoiceRouter,
)
from moe_tf.routing.hierarchical import HierarchicalRouter as HierarchicalRouter
from moe_tf.routing.hierarchical_batchwise import (
    HierarchicalBatchwiseRouter as HierarchicalBatchwiseRouter,
)
from moe_tf.routing.noisy_top_k import NoisyTopKRouter as NoisyTopKRouter
from moe_tf.routing.router import Router as Router
from moe_tf.routing.router import Routing as Routing
from moe_tf.routing.softmax_top_k import SoftmaxTopKRouter as SoftmaxTopKRouter
from moe_tf.routing.softmax_top_k import SwitchRouter as SwitchRouter
