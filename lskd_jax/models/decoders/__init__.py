"""Decoder language models: what a generative student writes with."""
