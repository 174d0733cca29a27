"""Attention pooling, the φ of the presets, as kernels."""
