"""Keras's own test of a layer: the one importer of the private module."""

from keras.src import testing

TestCase = testing.TestCase
