"""Official files to records, records to padded batches."""

import os

# TensorFlow only moves batches here: no chatter, and no notice about arithmetic that it does not do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
