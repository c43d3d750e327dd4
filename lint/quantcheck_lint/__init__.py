"""A static linter that flags parameter counts that are wrong on quantized models."""
