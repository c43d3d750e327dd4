"""`python -m pytest_quantcheck` is `quantcheck`."""

from pytest_quantcheck.cli import main

main()
