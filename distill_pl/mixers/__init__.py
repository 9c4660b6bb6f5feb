"""The sequence mixers of the paper's Table 1, in its order, then newer ones. To add a mixer: a file here, a line in MIXERS."""

from distill_pl.mixers.delta_net import DeltaNet
from distill_pl.mixers.gated_delta_net import GatedDeltaNet
from distill_pl.mixers.gla import GLA
from distill_pl.mixers.hedgehog import Hedgehog
from distill_pl.mixers.hgrn2 import HGRN2
from distill_pl.mixers.kda import KDA
from distill_pl.mixers.mamba2 import Mamba2
from distill_pl.mixers.metala import MetaLA
from distill_pl.mixers.mixer import SequenceMixer
from distill_pl.mixers.mlstm import MLSTM
from distill_pl.mixers.rebased import ReBased
from distill_pl.mixers.retnet import RetNet
from distill_pl.mixers.rwkv7 import RWKV7
from distill_pl.mixers.softmax import Softmax
from distill_pl.mixers.swa import SlidingWindow

MIXERS: dict[str, type[SequenceMixer]] = {
    "softmax": Softmax,
    "mlstm": MLSTM,
    "gla": GLA,
    "hgrn2": HGRN2,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "metala": MetaLA,
    "delta_net": DeltaNet,
    "rebased": ReBased,
    "hedgehog": Hedgehog,
    "swa": SlidingWindow,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
}
