"""Ranks in processes of their own, watched by a supervisor."""
