"""Keras layers."""

from moe_tf.layers.additive_attention import (
    AdditiveAttention as AdditiveAttention,
)
from moe_tf.layers.attention_lstm import AttentionLSTM as AttentionLSTM
from moe_tf.layers.batchwise_router import BatchwiseRouter as BatchwiseRouter
from moe_tf.layers.batchwise_router import (
    ExpertChoiceRouter as ExpertChoiceRouter,
)
from moe_tf.layers.clipping import clipped_evaluation as clipped_evaluation
from moe_tf.layers.experts import Experts as Experts
from moe_tf.layers.feed_forward import FeedForward as FeedForward
from moe_tf.layers.gate_recording import recorded_gates as recorded_gates
from moe_tf.layers.hierarchical_batchwise_router import (
    HierarchicalBatchwiseRouter as HierarchicalBatchwiseRouter,
)
from moe_tf.layers.hierarchical_router import (
    HierarchicalRouter as HierarchicalRouter,
)
from moe_tf.layers.moe import SparseMoE as SparseMoE
from moe_tf.layers.multi_head_attention import CrossAttention as CrossAttention
from moe_tf.layers.multi_head_attention import SelfAttention as SelfAttention
from moe_tf.layers.noisy_top_k_router import NoisyTopKRouter as NoisyTopKRouter
from moe_tf.layers.projected_lstm import ProjectedLSTMCell as ProjectedLSTMCell
from moe_tf.layers.recurrence import BidirectionalLSTM as BidirectionalLSTM
from moe_tf.layers.router import Router as Router
from moe_tf.layers.router import Routing as Routing
from moe_tf.layers.sampled_softmax import SampledSoftmax as SampledSoftmax
from moe_tf.layers.softmax_router import SoftmaxTopKRouter as SoftmaxTopKRouter
from moe_tf.layers.softmax_router import SwitchRouter as SwitchRouter
from moe_tf.layers.transformer_block import DecoderBlock as DecoderBlock
from moe_tf.layers.transformer_block import EncoderBlock as EncoderBlock
from moe_tf.layers.word_softmax import WordSoftmax as WordSoftmax
