"""The same serving loop, policies and histories over a cost model. No JAX."""
