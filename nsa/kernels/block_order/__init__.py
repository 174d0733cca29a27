"""Attention of selection blocks, which pass over the queries that keep them."""
