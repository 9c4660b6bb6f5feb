"""The three stages of the study in order, by their names in the configuration."""

from distill_pl.stages.hidden_align import HiddenAlignStage
from distill_pl.stages.kd import KDStage
from distill_pl.stages.matrix_mixing import MatrixMixingStage
from distill_pl.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {
    "matrix_mixing": MatrixMixingStage,
    "hidden_align": HiddenAlignStage,
    "kd": KDStage,
}
