"""Azure's public traces of requests to language models."""

from third_party.azure_traces.derive import ATTRIBUTION, statistics
from third_party.azure_traces.reader import FILES, Record, read

__all__ = ["ATTRIBUTION", "FILES", "Record", "read", "statistics"]
