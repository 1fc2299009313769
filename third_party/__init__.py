"""Adapters to other people's formats and algorithms, one folder each."""
