import dataclasses

import numpy as np
import pytest

from resilient_moe.recovery import big_view
from resilient_moe.sim import cost_experts
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_model import DecodeLine
from resilient_moe.sim.devices import DEVICES, device
from resilient_moe.sim.hardware import Figure, replace
from resilient_moe.sim.shapes import shape
from tests.sim.costs import PLAIN, SMALL, decode, model, only, view


def test_a_decode_step_by_hand():
  v, m = view(), model()
  load = decode([1, 1, 1, 1], context=100)
  parts = m.parts(v, load)
  # Attention 4 * (2*2 + 2*2) * 2 = 64, router 4 * 8 = 32; two layers of 4 B.
  gemm = 2 * (64 + 32) * 4 / 1e6
  kv = 100 * (2 * 2 * 2 * 4) * 2 / 1e6  # 32 B a position and layer
  assert parts.attend_s == pytest.approx(gemm + kv)
  # 4 tokens pick 2 of 8: an expert is missed by all with (3/4)^4.
  touched = 2 * (1 - 0.75**4)  # two experts a rank
  expert = 3 * 4 * 5 * 4  # bytes in one layer
  assert parts.experts_s == pytest.approx(2 * touched * expert / 1e6)
  # A token sends 2 x 4 numbers of 4 B; half of it to the other host, whose
  # link is the slower one.
  way = 2 * 4 * 4 * 0.5 / 1e4
  assert parts.dispatch_s == pytest.approx(2 * way)
  assert parts.combine_s == pytest.approx(2 * way)
  assert parts.head_s == pytest.approx(10 * 4 * 4 / 1e6)
  assert parts.total_s == pytest.approx(sum(parts[:6]))
  assert m.step_s(v, load) == parts.total_s


def test_many_tokens_are_bound_by_arithmetic():
  v = view()
  m = Roofline(replace(PLAIN, flops__fp32=Figure(1e6, "test")), SMALL)
  parts = m.parts(v, decode([1000] * 4))
  assert parts.attend_s == pytest.approx(2 * 2 * (64 + 32) * 1000 / 1e6)
  # 4000 tokens, 2 picks each, on 4 ranks; two layers of 2 x 60 flops a pair.
  assert parts.experts_s == pytest.approx(2 * 2000 * 2 * 60 / 1e6)


def test_a_chunk_by_hand():
  v = view()
  m = Roofline(replace(PLAIN, flops__fp32=Figure(1e4, "test")), SMALL)
  zero = np.zeros(4)
  chunk = np.array([8.0, 0, 0, 0])
  load = only(decode([0] * 4), chunk=chunk, chunk_context=chunk * 50)
  parts = m.parts(v, load)
  scores = 2 * 8 * 50 * (4 * 2 * 2) / 1e4
  assert parts.attend_s == pytest.approx(2 * 8 * 2 * 96 / 1e4 + scores)
  assert parts.head_s == 0.0  # no row is sampled
  assert m.step_s(v, only(load, chunk=zero)) == 0.0


def test_all_gather_moves_every_token_everywhere():
  v, m = view(), model(exchange="all_gather")
  parts = m.parts(v, decode([1, 1, 1, 1]))
  # 16 B a token; two tokens of the other host, half of them each device.
  assert parts.dispatch_s == pytest.approx(2 * 16 / 1e4)
  with pytest.raises(ValueError, match="all_to_all, all_gather"):
    model(exchange="ring")


def test_one_host_uses_the_inner_link():
  v, m = view(per_host=4), model()
  parts = m.parts(v, decode([1, 1, 1, 1]))
  assert parts.dispatch_s == pytest.approx(2 * 2 * 4 * 4 * 0.75 / 1e5)


def test_skew_loads_the_busiest_rank():
  v = view()
  even, load = model(), decode([64] * 4)
  skewed = model(load=cost_experts.zipf(8, 1.0))
  assert skewed.parts(v, load).combine_s > 1.3 * even.parts(v, load).combine_s
  assert np.isclose(skewed.rate(v).sum(), 2)
  assert even.parts(v, load).experts_s == pytest.approx(
    model(load=np.ones(8)).parts(v, load).experts_s
  )
  with pytest.raises(ValueError, match="8 experts; one each"):
    model(load=np.ones(3))


def test_masked_experts_get_no_tokens():
  v, m = view(), model()
  masked = np.zeros(8, bool)
  masked[:4] = True
  hidden = dataclasses.replace(v, masked=masked)
  assert m.rate(hidden) == pytest.approx([0] * 4 + [0.5] * 4)
  load = decode([1] * 4)
  assert m.parts(hidden, load).experts_s > m.parts(v, load).experts_s


def test_a_token_picks_no_expert_twice():
  rate = cost_experts.pick_rate(np.array([100.0, 1, 1, 1]), 2)
  assert rate == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
  masked = np.array([True, False, False, False])
  assert cost_experts.pick_rate(np.array([100.0, 1, 1, 1]), 3, masked) == (
    pytest.approx([0, 1, 1, 1])
  )
  with pytest.raises(ValueError, match="2 experts can be picked.*needs 3"):
    cost_experts.pick_rate(np.array([0.0, 0, 1, 1]), 3)


def test_replicas_share_the_tokens(rng):
  alone = view(ranks=4)
  twice = view("replica_promotion", ranks=4)
  rate = np.full(8, 0.25)
  found = cost_experts.expert_load(twice, rate, 100.0)
  assert found.pairs.sum() == pytest.approx(200)
  assert found.pairs == pytest.approx(50)
  # Each copy gets half of its expert's tokens, so fewer copies are missed
  # only together: more distinct copies are touched than experts.
  before = cost_experts.expert_load(alone, rate, 3.0)
  after = cost_experts.expert_load(twice, rate, 3.0)
  assert after.touched.sum() > before.touched.sum()
  # Against sampling: 3 tokens pick 2 of 8 each.
  picks = np.array([
    len(np.unique([rng.permutation(8)[:2] for _ in range(3)]))
    for _ in range(4000)
  ])  # fmt: skip
  assert before.touched.sum() == pytest.approx(picks.mean(), rel=0.02)


def test_a_step_grows_with_rows_context_and_ranks_lost():
  m = Roofline(device("h100"), shape("deepseek-v3"))
  v = view(ranks=32, shape=m.shape, per_host=8, rows=64)
  times = [m.step_s(v, decode([n] * 32, 1000)) for n in (1, 4, 16, 64, 256)]
  assert times == sorted(times)
  times = [m.step_s(v, decode([64] * 32, c)) for c in (0, 1e3, 1e4, 1e5)]
  assert times == sorted(times)
  for slower in ("memory_bytes_per_s", "inter__bytes_per_s"):
    name = slower.replace("__", ".")
    value = float(dict(m.device.figures())[name]) / 2
    worse = Roofline(
      replace(m.device, **{slower: Figure(value, "test")}), m.shape
    )
    assert worse.step_s(v, decode([64] * 32)) > m.step_s(v, decode([64] * 32))


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kind", ["mixtral-8x7b", "gpt-oss-120b"])
def test_the_decode_line_is_the_step(name, kind):
  m = Roofline(device(name), shape(kind))
  v = view(ranks=4, shape=m.shape)
  rows = np.array([3.0, 4.0, 4.0, 1.0])
  line = m.decode_line(v, rows)
  for context in (200.0, 5_000.0):  # windows are full from 128 on
    exact = m.step_s(v, decode(rows, context))
    assert line.step_s(4 * context) == pytest.approx(exact, rel=1e-9)


def test_closed_form_equals_stepping(rng):
  line = DecodeLine(base_s=0.02, slope_s=3e-7)
  rows, context = 12.0, 4_000.0
  stepped = sum(line.step_s(context + rows * i) for i in range(500))
  assert line.steps_s(500, context, rows) == pytest.approx(stepped)
  for seconds in rng.uniform(0.1, 1e4, 20):
    n = line.steps_in(seconds, context, rows)
    assert line.steps_s(n, context, rows) == pytest.approx(seconds, rel=1e-9)
  flat = DecodeLine(0.02, 0.0)
  assert flat.steps_in(1.0, 5.0, rows) == pytest.approx(50)


def test_attention_alone_shares_the_expert_ranks():
  v = view("kv_restore", ranks=6, attention=4, replicas=0)
  m = model()
  one = only(decode([5.0]), others=15.0)
  line = m.decode_line(v, np.array([5.0]), np.array([0]))
  assert line.base_s == pytest.approx(m.step_s(v, one))
  assert m.step_s(v, one) > m.step_s(v, decode([5.0]))


def test_ping_pong_hides_the_shorter_side():
  v = view("kv_restore", ranks=6, attention=4, replicas=0)
  # Arithmetic decides, so that halves take half the time.
  slow = replace(PLAIN, flops__fp32=Figure(1e3, "test"))
  one = Roofline(slow, SMALL)
  two = dataclasses.replace(one, microbatches=2)
  load = only(decode([64.0]), others=192.0)
  first, second = one.parts(v, load), two.parts(v, load)
  body = first.total_s - first.head_s - first.layers_s
  hidden = second.total_s - second.head_s - second.layers_s
  busier = max(first.attend_s, first.experts_s)
  assert busier < hidden < body


def test_the_step_of_10240_ranks_does_not_depend_on_who_holds_what():
  v = big_view(n_requests=0)
  m = Roofline(device("h200"), shape("deepseek-v3"))
  rows = np.full(10_240, 8.0)
  line = m.decode_line(v, rows)
  half = Roofline(device("h200"), shape("deepseek-v3")).decode_line(
    big_view(5_120, n_requests=0), rows[:5_120]
  )
  # The same per rank; what is touched of an expert is nearly all, each.
  assert line.base_s == pytest.approx(half.base_s, rel=0.3)
