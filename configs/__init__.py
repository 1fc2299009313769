"""Configs: one `ml_collections` file is the record of one experiment."""
