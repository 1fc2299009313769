"""What travels between an attention rank (AW) and an expert rank (EW).

An AW sends the tokens that an EW's experts are to see, once per EW however
many of its experts want them; the EW sends back one row per assignment,
unsummed, so that the AW adds the k contributions in the router's order and its
tokens don't depend on who served (DESIGN, invariant 3).
"""

from typing import NamedTuple, Protocol

import numpy as np


class Parcel(NamedTuple):
  """Tokens of one AW for one EW at one MoE layer."""

  layer: int
  rows: np.ndarray  # [n, D] embeddings
  token: np.ndarray  # [m] int32: row of `rows` of each assignment
  slot: np.ndarray  # [m] int32: the EW's slot of each assignment


class Result(NamedTuple):
  """What an EW computed of a parcel."""

  rank: int
  ticket: int  # of the parcel
  y: np.ndarray  # [m, D] each assignment's output, unsummed


class Gone(NamedTuple):
  """The link to an EW has ended: nothing more will come of it."""

  rank: int
  incarnation: int | None = None  # None: of whom the AW has last sent to


class Transport(Protocol):
  """One AW's links to the EWs."""

  def send(self, rank: int, ticket: int, parcel: Parcel) -> None:
    """Sends a parcel; a link that has ended is told by `receive`."""

  def send_urgent(self, rank: int, ticket: int, parcel: Parcel) -> None:
    """The same, ahead of other AWs' parcels that wait there (a replay)."""

  def receive(self, wait_s: float) -> list[Result | Gone]:
    """What has come, waiting for the first at most `wait_s`."""

  def answers(self, rank: int) -> bool:
    """Whether the EW answers probes, which its compute can't hold up."""
