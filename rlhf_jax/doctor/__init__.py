"""Checks of the numbers, and measurements of the speed, of the machine at hand."""
