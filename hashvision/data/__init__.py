"""Dataset folder to host batches: the TFRecord schema, sampling, the stream and crops; no JAX."""
