"""Decoding over networks that are slow, lossy or narrow, and a server under load."""
