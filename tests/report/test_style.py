"""The look of figures: told apart twice, embedded, the same bytes."""

import re

import pytest

from resilient_moe.report import style


def _luminance(colour: str) -> float:
  red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_names_differ_in_colour_with_dashes_and_in_colour_with_marker() -> None:
  found = style.styles([*style.KNOWN, *(f"mine{i}" for i in range(13))])
  looks = list(found.values())
  assert len(looks) == 28
  assert len({(look.colour, str(look.dashes)) for look in looks}) == 28
  assert len({(look.colour, look.marker) for look in looks}) == 28


def test_a_known_policy_looks_the_same_in_every_figure() -> None:
  alone = style.styles(["kv_restore"])["kv_restore"]
  assert style.styles(["a", "kv_restore", "spare"])["kv_restore"] == alone
  known = style.styles(style.KNOWN).values()
  assert style.styles(["mine"])["mine"] not in known


def test_every_colour_can_be_seen_on_white() -> None:
  assert all(_luminance(colour) < 0.72 for colour in style.COLOURS)


def test_text_is_embedded_and_large_enough(tmp_path) -> None:
  with style.context():
    figure = style.figure(style.COLUMN_IN, 1.5)
    axis = figure.subplots()
    axis.set_xlabel("time (s)")
    paths = style.save(figure, tmp_path / "x")
    sizes = [axis.xaxis.label.get_size()]
    sizes += [label.get_size() for label in axis.get_xticklabels()]
  assert min(sizes) >= 8
  assert [path.name for path in paths] == ["x.png", "x.pdf"]
  pdf = paths[1].read_bytes()
  assert b"/FontFile2" in pdf  # TrueType, which is what type 42 embeds
  assert not re.search(rb"/Subtype\s*/Type3", pdf)
  with style.context():
    assert style.save(figure, tmp_path / "y")[1].read_bytes() == pdf
  assert len(list(tmp_path.iterdir())) == 4  # nothing half-written


def test_settings_end_with_the_context() -> None:
  matplotlib = pytest.importorskip("matplotlib")
  before = matplotlib.rcParams["font.size"]
  with style.context():
    assert matplotlib.rcParams["font.size"] == style.FONT_PT
  assert matplotlib.rcParams["font.size"] == before
