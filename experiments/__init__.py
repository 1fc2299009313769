"""Launchers: train, run, sweep, bench, table, figures."""
