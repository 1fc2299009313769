"""How tokens travel between attention and expert ranks, without JAX."""
