"""Stands in for Colab's own package in tests: of it, only where its shell and kernel live counts."""
