"""Dataset folder to host batches: the TFRecord schema, sampling, the stream, decoding; no JAX."""
