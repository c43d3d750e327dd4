"""A static linter that flags parameter counts that are wrong on quantized models."""

__version__ = "0.1.0"
