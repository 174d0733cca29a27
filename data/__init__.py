"""Corpora as token shards, and the datamodules that serve windows of them.

Artefacts never live here: they go to the cache folder (`data.shards.cache_root`).
"""
