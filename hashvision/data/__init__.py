"""Dataset folder to host batches: the TFRecord schema, sampling, the stream and decoding; no JAX."""
