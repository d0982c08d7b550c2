"""Keras layers."""

from moe_tf.layers.experts import Experts as Experts
from moe_tf.layers.feed_forward import FeedForward as FeedForward
from moe_tf.layers.moe import SparseMoE as SparseMoE
from moe_tf.layers.projected_lstm import ProjectedLSTMCell as ProjectedLSTMCell
from moe_tf.layers.router import NoisyTopKRouter as NoisyTopKRouter
from moe_tf.layers.sampled_softmax import SampledSoftmax as SampledSoftmax
