"""Attention over the paged KV pool: one file a backend, behind the interface in backend.py."""
