"""Checks: from the logical tensors of an artifact to a verdict with numbers. They open no file and know no scheme."""
