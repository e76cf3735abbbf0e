"""Stores: the file formats that embeddings are kept in.

A new store is a class with @register in a file of its own, imported below; tests/test_corpus.py then holds it to the
properties of all.
"""

from pyvidx.corpus.stores.npz import Npz
from pyvidx.corpus.stores.parquet import Parquet
from pyvidx.corpus.stores.registry import STORES, Layout, Store, named, of_suffix, register, suffixes
from pyvidx.corpus.stores.safetensors import Safetensors

__all__ = ["STORES", "Layout", "Npz", "Parquet", "Safetensors", "Store", "named", "of_suffix", "register", "suffixes"]
