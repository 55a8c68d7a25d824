"""Architectures as data. Start with `get("gemma-3-270m")`."""
