"""The students of the paper's Table 1, in its order: a mixer is a short file and a line in this dict."""

from distill_pl.mixers.gla import GLA
from distill_pl.mixers.mixer import SequenceMixer
from distill_pl.mixers.softmax import Softmax

MIXERS: dict[str, type[SequenceMixer]] = {
    "softmax": Softmax,
    "gla": GLA,
}
