"""Weights of PyTorch's BLIP-2 in and out."""
