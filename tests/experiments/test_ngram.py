"""The baseline is a distribution, and a strong one."""

import numpy as np
import pytest

from experiments import ngram


def _stream(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8)


TRAIN = _stream("the cat sat on the mat; the dog sat on the log. " * 40 + "ab")
HELD = _stream("the dog sat on the mat; the cat sat on the log. ")


@pytest.mark.parametrize("context", [b"", b"th", b"the cat s", b"\xff\xfe"])
def test_it_is_a_normalised_distribution(context: bytes) -> None:
  p = ngram.train(TRAIN, 5).distribution(context)
  assert p.shape == (256,)
  assert (p > 0).all()
  assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_scoring_a_stream_is_the_distribution_byte_by_byte() -> None:
  model = ngram.train(TRAIN, 4)
  bits = model.bits(HELD)
  for i in (0, 1, 3, 20, len(HELD) - 1):
    p = model.distribution(HELD[:i].tobytes())
    assert bits[i] == pytest.approx(-np.log2(p[HELD[i]]))


def test_it_beats_uniform_and_longer_contexts_beat_short_ones() -> None:
  bits = [ngram.train(TRAIN, c).bits_per_byte(HELD) for c in (0, 2, 5)]
  assert 8 > bits[0] > bits[1] > bits[2]


def test_unseen_bytes_cost_a_finite_price() -> None:
  bits = ngram.train(TRAIN, 7).bits(_stream("ÿ€"))
  assert np.isfinite(bits).all()


def test_lower_orders_count_contexts_not_occurrences() -> None:
  # "b" is frequent but always behind "a"; "c" is rarer, behind many bytes.
  stream = _stream("ab" * 50 + "dcecfcgchc")
  p = ngram.train(stream, 1).orders[0]
  counts = dict(zip(p.pairs.tolist(), p.counts.tolist(), strict=True))
  assert counts[ord("b")] == 1
  assert counts[ord("c")] == 5


def test_best_is_the_best_of_its_orders() -> None:
  context, bits = ngram.best(TRAIN, HELD)
  assert bits == ngram.train(TRAIN, context).bits_per_byte(HELD)
  assert bits <= ngram.train(TRAIN, 3).bits_per_byte(HELD)


@pytest.mark.parametrize("context", [-1, 8])
def test_a_context_out_of_range_is_refused(context: int) -> None:
  with pytest.raises(ValueError, match=f"context={context}: must be 0 to 7"):
    ngram.train(TRAIN, context)
