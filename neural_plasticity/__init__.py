"""Measure, prune, remove and regrow attention heads of Hugging Face transformers."""
__version__ = "0.1.0"
