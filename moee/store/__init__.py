"""Folders that appear whole or not at all, their manifests and hashes, the cache.

Bytes and JSON come in; artifacts go out.
Imports no other room.
"""
