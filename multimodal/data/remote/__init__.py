"""Shard folders at an address: read piece by piece, through a bounded cache on this disk.

``folder.py`` is the front door: a folder, its manifest, and bytes of its shards. ``pieces.py`` says
what is read at once, ``transport.py`` reads it and tries again, ``cache.py`` holds it, and
``ahead.py`` reads in advance what a caller will need.
"""
