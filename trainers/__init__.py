"""The project's binaries."""

import os

# Before TensorFlow is imported, or it does not count: without it the first
# screen of every run is about oneDNN and missing CUDA drivers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
