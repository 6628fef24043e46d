"""Turns a dataset folder into host batches: TFRecord schema, sampling, stream, decoding; no JAX."""
