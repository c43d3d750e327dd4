"""The test kit for quantized models."""
