"""Draws the picture of the README: `python docs/picture.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import hookbook as hb

grid = hb.patchscope(hb.load("gemma-3-270m"), "The Eiffel Tower is located in the city of", target_layers="all", k=1)
figure = grid.plot().figure
figure.savefig(Path(__file__).parent / "images" / "patchscope.png", dpi=110)
