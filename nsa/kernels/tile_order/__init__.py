"""Attention of tiles of neighbouring queries, which pass over the keys."""
