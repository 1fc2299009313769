"""Attention ranks and expert ranks: what each holds and computes."""
