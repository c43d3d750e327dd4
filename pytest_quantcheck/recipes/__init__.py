"""Recipes: how the libraries write a model, told from its architecture alone."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_quantcheck.recipes import awq, bnb, compressed_tensors, fp8_block, ggml, gptq, matmulnbits, plain
from pytest_quantcheck.recipes.recipe import Recipe

# In the order of tables.
RECIPES: tuple[Recipe, ...] = (
    plain.RECIPE,
    bnb.RECIPE,
    gptq.RECIPE,
    awq.RECIPE,
    compressed_tensors.RECIPE,
    fp8_block.RECIPE,
    matmulnbits.RECIPE,
    ggml.RECIPE,
)


def named(name: str) -> tuple[Recipe, Mapping[str, str]]:
    """Return the recipe of a name and its options; an unknown one is a `ValueError`."""
    for recipe in RECIPES:
        match = recipe.names.fullmatch(name)
        if match:
            return recipe, match.groupdict()
    known = ", ".join(shown())
    raise ValueError(f"recipe `{name}` is not one of {known}, or one of these with other numbers")


def shown() -> tuple[str, ...]:
    """Return the names of the recipes that tables show."""
    return tuple(name for recipe in RECIPES for name in recipe.shown)
